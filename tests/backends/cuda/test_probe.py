"""Why a machine has no NVIDIA device: one line each, with one thing to do; and listing backends costs nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helios import backend as backends
from helios.backend import DeviceInfo
from helios.errors import BackendUnavailable
from helios_cuda import probe

Patch = pytest.MonkeyPatch


class Machine:
    """What torch and the installed packages say; each test changes one thing."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self.cards: list[tuple[str, tuple[int, int]]] = [("NVIDIA H200", (9, 0))]
        self.versions = {"triton": "3.6.0", "torch": "2.11.0"}
        self.requires = ["filelock", "triton==3.6.0; platform_system == 'Linux'"]
        patch.setattr(torch.version, "cuda", "13.0")
        cuda = torch.cuda
        patch.setattr(cuda, "is_available", self.is_available)
        patch.setattr(cuda, "device_count", lambda: len(self.cards))
        patch.setattr(cuda, "get_device_name", lambda i: self.cards[i][0])
        patch.setattr(cuda, "get_device_capability", lambda i: self.cards[i][1])
        patch.setattr(cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=141 << 30))
        patch.setattr(importlib.metadata, "version", self.version)
        patch.setattr(importlib.metadata, "requires", lambda name: self.requires)
        patch.setattr(importlib.util, "find_spec", lambda name: object() if name in self.versions else None)

    def is_available(self) -> bool:
        if not self.cards:
            warnings.warn("CUDA initialization: as torch says of an old driver", UserWarning, stacklevel=2)
        return bool(self.cards)

    def version(self, name: str) -> str:
        if name not in self.versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return self.versions[name]

    def starts_with(self, message: str) -> None:
        """CUDA refuses to start."""
        self.cards = []

        def init() -> None:
            raise RuntimeError(message)

        self.patch.setattr(torch.cuda, "init", init)


@pytest.fixture
def machine(monkeypatch: Patch) -> Machine:
    return Machine(monkeypatch)


def refused() -> BackendUnavailable:
    with pytest.raises(BackendUnavailable) as caught:
        probe.devices()
    assert "\n" not in caught.value.why
    assert "\n" not in caught.value.fix
    assert len(caught.value.why) < 160
    assert caught.value.fix
    return caught.value


def test_all_is_there(machine: Machine) -> None:
    machine.cards.append(("NVIDIA RTX PRO 6000", (12, 0)))
    gigabytes = 141 << 30
    assert probe.devices() == [DeviceInfo(0, "NVIDIA H200", gigabytes), DeviceInfo(1, "NVIDIA RTX PRO 6000", gigabytes)]


def test_torch_without_cuda(machine: Machine) -> None:
    machine.patch.setattr(torch.version, "cuda", None)
    error = refused()
    assert "is built without CUDA" in error.why
    assert "CUDA build of torch" in error.fix


# What torch says, by version: see torch/csrc and c10/cuda.
STARTS: dict[str, tuple[str, str, str]] = {
    "no_driver": (
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
        "http://www.nvidia.com/Download/index.aspx",
        "there is no NVIDIA driver on this machine",
        "install the driver",
    ),
    "old_driver": (
        "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by "
        "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx "
        "Alternatively, go to: https://pytorch.org to install a PyTorch version that has been compiled with your "
        "version of the CUDA driver.",
        "the NVIDIA driver is too old: it is for CUDA 12.4, this torch for CUDA 13.0",
        "update the NVIDIA driver",
    ),
    "other": (
        "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() "
        "that might have already set an error? Error 802: system not yet initialized",
        "torch cannot start CUDA: Error 802: system not yet initialized",
        "nvidia-smi",
    ),
    "silent": ("", "torch cannot start CUDA: RuntimeError", "nvidia-smi"),
}


@pytest.mark.parametrize("name", STARTS)
def test_cuda_does_not_start(machine: Machine, name: str) -> None:
    said, why, fix = STARTS[name]
    machine.starts_with(said)
    error = refused()
    assert error.why.startswith(why), error.why
    assert fix in error.fix


def test_no_gpu_is_visible(machine: Machine) -> None:
    machine.cards = []
    machine.patch.setattr(torch.cuda, "init", lambda: None)
    error = refused()
    assert error.why == "the driver shows no GPU"
    assert "CUDA_VISIBLE_DEVICES" in error.fix


def test_old_cards_are_left_out(machine: Machine) -> None:
    machine.cards = [("Tesla V100", (7, 0)), ("NVIDIA A100", (8, 0))]
    assert [d.index for d in probe.devices()] == [1]
    machine.cards = [("Tesla V100", (7, 0))]
    error = refused()
    assert error.why == "Tesla V100 has compute capability 7.0"
    assert "8.0 or newer" in error.fix


def test_no_triton(machine: Machine) -> None:
    del machine.versions["triton"]
    error = refused()
    assert error.why == "Triton is not installed"
    assert error.fix == "pip install 'triton==3.6.0', the version that torch 2.11.0 is made with"


def test_no_triton_and_torch_names_none(machine: Machine) -> None:
    del machine.versions["triton"]
    machine.requires = ["filelock"]
    assert refused().fix == "pip install triton"


def test_old_triton(machine: Machine) -> None:
    machine.versions["triton"], machine.requires = "3.1.0", []
    error = refused()
    assert error.why == "Triton 3.1.0 is older than 3.2"
    assert error.fix == "pip install 'triton>=3.2'"


@pytest.mark.parametrize("version", ["3.2.0rc1", "4.0", "3.10.1+git1234"])
def test_triton_without_a_pin(machine: Machine, version: str) -> None:
    machine.versions["triton"], machine.requires = version, []
    assert probe.devices()


@pytest.mark.parametrize("pin", ["triton==3.7.1", 'triton==3.7.1; platform_system == "Linux"', "triton (==3.7.1)"])
def test_triton_of_another_torch(machine: Machine, pin: str) -> None:
    machine.requires = ["sympy>=1.13.3", pin, "pytorch-triton-rocm==9; extra == 'never'"]
    error = refused()
    assert error.why == "Triton 3.6.0 does not match torch 2.11.0, which is made with 3.7.1"
    assert error.fix == "pip install 'triton==3.7.1'"


@pytest.mark.parametrize(
    ("installed", "pin"),
    [
        ("3.6.0+git9999", "triton==3.6.0"),  # a build of the same version
        ("3.6.3", "triton==3.6.*"),
        ("3.6.1", "triton>=3.6"),
        ("3.6.0", 'triton==3.7.1; platform_machine == "never"'),
    ],
)
def test_triton_that_matches(machine: Machine, installed: str, pin: str) -> None:
    machine.versions["triton"], machine.requires = installed, [pin]
    assert probe.devices()


def test_triton_of_unknown_version(machine: Machine) -> None:
    """A source tree on the path, without metadata: nothing is known against it."""
    machine.versions = {"torch": "2.11.0", "triton": ""}
    real = machine.version
    machine.patch.setattr(importlib.metadata, "version", lambda name: real(name) if name != "triton" else _absent(name))
    assert probe.devices()


def _absent(name: str) -> Any:
    raise importlib.metadata.PackageNotFoundError(name)


def test_a_bare_machine_cannot_compare_versions(machine: Machine) -> None:
    for name in ("packaging.specifiers", "packaging.requirements"):
        machine.patch.setitem(sys.modules, name, None)
    machine.versions["triton"] = "3.1.0"
    assert probe.devices()
    del machine.versions["triton"]
    assert refused().fix == "pip install triton"


def test_a_device_that_is_not_there(machine: Machine) -> None:
    with pytest.raises(BackendUnavailable, match=r"backend 'cuda' has no device 3; it has 0 \(NVIDIA H200\)"):
        backends.select("cuda:3")


def test_listing_starts_neither_triton_nor_cuda() -> None:
    program = """
import sys, torch
def never(*_): raise AssertionError("CUDA was started by looking")
torch.cuda.init = torch.cuda._lazy_init = never
import helios.backend
import time
begin = time.process_time()
found = helios.backend.probe("cuda")
seconds = time.process_time() - begin
assert seconds < 0.5, seconds
from helios_cuda import CudaBackend
backend = CudaBackend()
assert len(backend.kernels) == len([*backend.kernels]) > 30
assert "attention" in backend.kernels and "no_op" not in backend.kernels
assert "triton" not in sys.modules
assert found.why if torch.version.cuda is None else True
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_name_has_its_kernel() -> None:
    kernels = backends.select("cuda:interpret").kernels
    assert [name for name in kernels if kernels[name].run is None] == []
    with pytest.raises(KeyError):
        kernels["no_op"]
