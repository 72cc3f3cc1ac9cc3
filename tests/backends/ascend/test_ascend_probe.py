"""Why a machine has no NPU to run on: one line each, with one thing to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helios.errors import BackendError, BackendUnavailable
from helios_ascend import failures, operators, probe, versions

Patch = pytest.MonkeyPatch
GIB = 1 << 30


class Machine:
    """What packages, files and CANN say; each test changes one thing."""

    def __init__(self, patch: Patch, folder: Path) -> None:
        self.installed = {"torch-npu": "2.12.0", "torch": "2.12.0+cpu"}
        self.cards = [("Ascend910B3", 60 * GIB, 64 * GIB)]
        self.reserved = 3 * GIB + GIB // 2
        self.import_error: Exception | None = None
        self.start_error: Exception | None = None
        self.toolkit: Path | None = folder
        self._write(folder, "8.5.0")
        patch.setattr(importlib.util, "find_spec", lambda name: object() if "torch-npu" in self.installed else None)
        patch.setattr(importlib.metadata, "version", lambda name: self.installed[name])
        patch.setattr(versions, "toolkit", lambda: self.toolkit)
        patch.setattr(operators, "torch_npu", self._module)

    def _write(self, folder: Path, version: str) -> None:
        (folder / "aarch64-linux").mkdir(exist_ok=True)
        text = f"package_name=Ascend-cann-toolkit\nversion={version}\narch=aarch64\n"
        (folder / "aarch64-linux" / "ascend_toolkit_install.info").write_text(text)

    def cann(self, version: str) -> None:
        assert self.toolkit is not None
        self._write(self.toolkit, version)

    def _module(self) -> Any:
        if self.import_error is not None:
            raise self.import_error
        return SimpleNamespace(npu=self)

    def device_count(self) -> int:
        return len(self.cards)

    def get_device_name(self, index: int) -> str:
        return self.cards[index][0]

    def mem_get_info(self, index: int) -> tuple[int, int]:
        if self.start_error is not None:
            raise self.start_error
        return self.cards[index][1:]

    def memory_reserved(self, index: int) -> int:
        return self.reserved


@pytest.fixture
def machine(monkeypatch: Patch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def refused() -> tuple[str, str]:
    with pytest.raises(BackendUnavailable) as caught:
        probe.devices()
    for text in (caught.value.why, caught.value.fix):
        assert "\n" not in text
        assert 0 < len(text) < 160
    return caught.value.why, caught.value.fix


@pytest.mark.usefixtures("machine")
def test_a_whole_machine_has_its_devices() -> None:
    (device,) = probe.devices()
    assert (device.index, device.name, device.memory) == (0, "Ascend910B3", 64 * GIB)


def test_several_devices_have_their_indices(machine: Machine) -> None:
    machine.cards = machine.cards * 2
    assert [device.index for device in probe.devices()] == [0, 1]


def test_no_torch_npu(machine: Machine) -> None:
    del machine.installed["torch-npu"]
    why, fix = refused()
    assert why == "torch_npu is not installed"
    assert "helios-hal[ascend]" in fix


def test_torch_npu_of_another_torch(machine: Machine) -> None:
    machine.installed["torch"] = "2.13.0+cpu"
    why, fix = refused()
    assert why == "torch_npu 2.12.0 is built for another torch than 2.13.0+cpu"
    assert "torch-npu==2.13.0" in fix


def test_a_post_release_matches_its_torch(machine: Machine) -> None:
    machine.installed |= {"torch-npu": "2.9.0.post2", "torch": "2.9.0"}
    assert probe.devices()


def test_torch_npu_that_is_too_old(machine: Machine) -> None:
    machine.installed |= {"torch-npu": "2.8.0", "torch": "2.8.0"}
    assert refused()[0] == "torch_npu 2.8.0 is older than 2.9, the first that this backend was checked against"


def test_cann_that_is_too_old(machine: Machine) -> None:
    machine.cann("8.3.RC1")
    why, _ = refused()
    assert why == "CANN 8.3.RC1 is older than 8.5, which torch_npu 2.12.0 is made with"


def test_no_cann(machine: Machine) -> None:
    machine.toolkit = None
    machine.import_error = ImportError("libhccl.so: cannot open shared object file: No such file or directory")
    why, fix = refused()
    assert why == "CANN is not installed: torch_npu misses libhccl.so"
    assert "docs/ascend.md" in fix


def test_cann_that_is_not_in_the_environment(machine: Machine) -> None:
    machine.import_error = ImportError("libhccl.so: cannot open shared object file: No such file or directory")
    why, fix = refused()
    assert why == "CANN is not in this shell's environment: torch_npu misses libhccl.so"
    assert fix.startswith("source ")


def test_a_torch_with_another_accelerator(machine: Machine) -> None:
    machine.import_error = RuntimeError("Two accelerators cannot be used at the same time in PyTorch: npu and cuda")
    why, fix = refused()
    assert why == "torch_npu refuses this torch, which has another accelerator"
    assert "CPU build" in fix


def test_no_device(machine: Machine) -> None:
    machine.cards = []
    why, fix = refused()
    assert why == "CANN shows no NPU to this process"
    assert "ASCEND_RT_VISIBLE_DEVICES" in fix


def test_a_device_that_another_has_for_itself(machine: Machine) -> None:
    machine.start_error = RuntimeError("SetDevice error\nEL0005: Resource_Busy: the resources are busy")
    why, fix = refused()
    assert why == "the NPU is busy: another process or container has it for itself"
    assert "npu-smi info" in fix


def test_memory_that_others_hold_stands_behind_the_name(machine: Machine) -> None:
    machine.cards, machine.reserved = [("Ascend910B3", 20 * GIB, 64 * GIB)], 0
    (device,) = probe.devices()
    assert device.name == "Ascend910B3 (44.0 GiB of it taken by other processes)"


def test_a_device_that_does_not_start(machine: Machine) -> None:
    machine.start_error = RuntimeError("ERR99999 UNKNOWN application exception, error code is 107001")
    assert refused()[0].startswith("CANN cannot start the NPU: ERR99999")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "NPU out of memory. Tried to allocate 2.50 GiB (NPU 0; 61.00 GiB total capacity)",
            "no room for step: it needs 2.50 GiB",
        ),
        ("EL0005: Resource_Busy", "is taken"),
        ("synchronize failed, error code is 507015 aicore exception", "was lost during step"),
    ],
)
def test_what_a_device_raises_is_told(text: str, said: str) -> None:
    with pytest.raises(BackendError) as caught, failures.explained("step", "ascend", lambda: (1 * GIB, 64 * GIB)):
        raise RuntimeError(text)
    assert said in caught.value.why
    assert "npu-smi" in caught.value.fix


def test_other_errors_stay() -> None:
    with pytest.raises(RuntimeError, match="shapes"), failures.explained("step", "ascend", lambda: None):
        raise RuntimeError("shapes do not match")


def test_weights_that_cannot_fit_are_told_beforehand() -> None:
    with pytest.raises(
        BackendError, match=r"need 27.9 GiB on ascend; 20.0 GiB of 64.0 GiB is free, 44.0 GiB is in use"
    ):
        failures.require_room(30 * 10**9, (20 * GIB, 64 * GIB), 0, "ascend")
    with pytest.raises(BackendError) as caught:
        failures.require_room(70 * 10**9, (30 * GIB, 32 * GIB), 0, "ascend")
    assert "helios fit" in caught.value.fix
    failures.require_room(30 * 10**9, (60 * GIB, 64 * GIB), 0, "ascend")
