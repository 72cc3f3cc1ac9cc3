"""``helios fit``: what it prints for devices, for this machine, and for settings that do not fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from helios.backend import Backend, DeviceInfo
from helios.cli import main
from helios.fit.devices import find, table
from helios.fit.host import Host

HOST = Host("Linux", "CPU", 2, 2, 16 * 10**9, 10 * 10**9, 9 * 10**9, "/cache", 30 * 10**9)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["fit", *arguments]) == 0
    return " ".join(capsys.readouterr().out.replace("\\\n", "").split())


def loaded(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["fit", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_device_that_is_large_enough(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "--device", "h100", "--steps", "1,1,1")
    assert "fits; " in out
    assert "Speed: a prediction, not a measurement" in out
    assert "Published for this device and these steps: 19.5 frames a second" in out
    assert "--variant distilled --height 384 --width 640 --backend cuda --precision bf16 --steps 1,1,1" in out
    assert "data sheet: NVIDIA H100" in out
    assert "Computed from parameter counts" in out


def test_a_device_that_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "--device", "rtx4090")
    assert "does NOT fit" in out
    assert "if it did fit" in out
    assert "With --memory low: a prediction" in out
    assert "at most" in out
    assert "--memory low" in " ".join(out.partition("Suggested")[2].split())
    out = printed(capsys, "--device", "ascend-910b", "--height", "3840", "--width", "3840")
    assert "does NOT fit" in out
    assert "--memory low" not in out
    assert "helios generate" not in out
    assert "have enough" in out


def test_little_memory_as_plain_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert loaded(capsys, "--device", "h100")["memory_low"] is None
    data = loaded(capsys, "--device", "rtx4090", "--steps", "1,1,1")
    low = data["memory_low"]
    assert low["label"] == "prediction"
    assert low["fits"] is True
    assert data["flags"][-2:] == ["--memory", "low"]
    assert low["resident"] + low["fetched"] == data["work"]["step_weights"] < data["work"]["weights"]
    assert low["seconds"] == pytest.approx(low["fetched"] / 25e9)
    assert low["fps"] == pytest.approx(33 / (3 * low["seconds"]))


def test_the_suggested_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """Each flag, as far as it is shared, is one of this command's own."""
    flags = loaded(capsys, "--device", "h100")["flags"]
    assert flags[:2] == ["--model", "PATH_OR_REPO"]
    assert loaded(capsys, "--device", "h100", "--size", "mini")["flags"][:2] == ["--size", "mini"]


def test_the_vae_is_counted_in_what_it_decodes_in(capsys: pytest.CaptureFixture[str]) -> None:
    """By itself in what the device's backend declares; of a backend that is not installed, as published."""
    assert ", bf16, VAE in bf16, steps" in printed(capsys, "--device", "h200")
    half = loaded(capsys, "--device", "h200")
    single = loaded(capsys, "--device", "h200", "--vae-precision", "fp32")
    assert (half["vae_precision"], single["vae_precision"]) == ("bf16", "fp32")
    assert single["work"]["vae_weights"] == 2 * half["work"]["vae_weights"]
    assert single["speed"]["vae"][1] > 2 * half["speed"]["vae"][1]
    assert "--vae-precision" not in half["flags"]
    assert single["flags"][-2:] == ["--vae-precision", "fp32"]
    assert loaded(capsys, "--device", "ascend-910b")["vae_precision"] == "bf16"
    assert loaded(capsys, "--device", "mi300x")["vae_precision"] == "fp32"
    assert main(["fit", "--device", "h200", "--vae-precision", "fb16"]) == 2
    assert "did you mean 'fp16'" in capsys.readouterr().err


def test_json_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    data = loaded(capsys, "--device", "h200", "--variant", "base", "--steps", "30")
    assert data["label"] == "prediction"
    assert data["fits"] is True
    assert data["steps"] == [30]
    assert data["speed"]["forwards"] == 60
    assert data["speed"]["fps"][0] < data["speed"]["fps"][1]
    assert set(data["memory"]["moments"]) == {"encode", "step", "decode"}
    assert data["download"]["total"] == sum(data["download"][name] for name in ("transformer", "text", "vae"))


def test_fp32_is_not_predicted_from_a_bf16_peak(capsys: pytest.CaptureFixture[str]) -> None:
    assert loaded(capsys, "--device", "h100", "--precision", "fp32")["speed"] is None
    assert "no fp32 peak of it is known" in printed(capsys, "--device", "h100", "--precision", "fp32")


@pytest.mark.parametrize("precision", ["fp8", "fp8-weights"])
def test_quantised_weights_take_half_the_memory_and_promise_no_speed(
    precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usual, quantised = (loaded(capsys, "--device", "h100", "--precision", p) for p in ("bf16", precision))
    # 38 of 40 blocks have products of 350 million weights each, now of one byte and a scale a row.
    block = 6 * 5120 * 5120 + 2 * 5120 * 5120 + 2 * 5120 * 13824
    saved = usual["work"]["weights"] - quantised["work"]["weights"]
    assert saved == pytest.approx(38 * block, rel=2e-3)
    assert quantised["work"]["step_weights"] < 0.55 * usual["work"]["step_weights"]
    assert usual["speed"] is not None
    assert quantised["speed"] is None
    assert quantised["precision"] == precision
    assert quantised["flags"][quantised["flags"].index("--precision") + 1] == precision


def test_quantised_products_are_not_predicted_from_a_product_measured_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIOS_BACKEND", "reference")
    monkeypatch.setattr("helios.fit.measure.matrix_rate", lambda dtype: 4e11)
    asked = ("--size", "tiny", "--height", "64", "--width", "64")
    assert loaded(capsys, *asked)["speed"] is not None
    assert loaded(capsys, *asked, "--precision", "fp8")["speed"] is None
    assert "peak: not measured" in printed(capsys, *asked, "--precision", "fp8")


# --- precisions of e4m3 numbers ---


def test_which_devices_multiply_e4m3_numbers() -> None:
    without = ["rtx3090", "a100-40", "a100-80", "a800", "mi300x", "ascend-910b-32", "ascend-910b", "ascend-910c"]
    assert [name for name, device in table().items() if not device.fp8] == without


@pytest.mark.parametrize(("device", "precision"), [("a100-80", "fp8"), ("rtx3090", "fp8-attention"), ("mi300x", "fp8")])
def test_a_device_without_fp8_units_is_told_and_nothing_is_suggested(
    device: str, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = loaded(capsys, "--device", device, "--precision", precision)
    title = find(device).title
    assert data["flags"] == []
    assert data["refused"] == {"why": f"{title} multiplies no e4m3 numbers", "fix": "--precision fp8-weights"}
    advice = printed(capsys, "--device", device, "--precision", precision).partition("Suggested")[2]
    assert advice.strip() == f"{title} multiplies no e4m3 numbers: --precision fp8-weights."


@pytest.mark.parametrize(("device", "precision"), [("a100-80", "fp8-weights"), ("a100-80", "bf16"), ("l40s", "fp8")])
def test_what_a_device_multiplies_is_suggested(device: str, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = loaded(capsys, "--device", device, "--precision", precision)
    assert data["refused"] is None
    assert data["flags"][data["flags"].index("--precision") + 1] == precision


@pytest.mark.parametrize(("backend", "instead"), [("reference", "fp8-weights"), ("cpu", "bf16")])
def test_this_machine_s_cpu_multiplies_no_e4m3_numbers(
    backend: str, instead: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is suggested instead is a precision that the backend offers."""
    monkeypatch.setenv("HELIOS_BACKEND", backend)
    monkeypatch.setattr("helios.fit.host.read_host", lambda: HOST)
    data = loaded(capsys, "--size", "tiny", "--height", "64", "--width", "64", "--precision", "fp8")
    assert data["flags"] == []
    assert data["refused"] == {
        "why": "this machine's CPU multiplies no e4m3 numbers",
        "fix": f"--precision {instead}",
    }


@pytest.mark.parametrize("precision", ["fp16", "fp8-weights"])
def test_what_this_machine_s_backend_lacks_is_not_suggested(
    precision: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIOS_BACKEND", "cpu")
    monkeypatch.setattr("helios.fit.host.read_host", lambda: HOST)
    monkeypatch.setattr("helios.fit.measure.matrix_rate", lambda dtype: pytest.fail(f"{dtype} was multiplied"))
    data = loaded(capsys, "--size", "tiny", "--height", "64", "--width", "64", "--precision", precision)
    assert data["flags"] == []
    assert data["refused"]["why"] == f"backend 'cpu' does not compute in {precision}"


# --- this machine ---


def test_the_host_s_cgroup_and_disk_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helios.fit.host.read_host", lambda: HOST)
    out = printed(capsys, "--device", "h100")
    assert "NOT enough: this host has 16.00 GB, its cgroup allows 10.00 GB, 9.00 GB available now" in out
    assert "NOT enough: 30.00 GB are free here, in /cache" in out


def test_this_machine_is_its_host_where_it_has_no_accelerator(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIOS_BACKEND", "reference")
    monkeypatch.setattr("helios.fit.host.read_host", lambda: HOST)
    monkeypatch.setattr("helios.fit.measure.matrix_rate", lambda dtype: 4e11)
    data = loaded(capsys, "--size", "mini")
    assert data["target"]["memory"] == HOST.memory_limit
    assert data["target"]["peak"] == 4e11
    assert data["target"]["shared"] is True
    assert "measured now" in data["target"]["source"]
    assert data["flags"][-3:] == ["bf16", "--steps", "2,2,2"]


class Card(Backend):
    """A device with memory of its own, which the table knows by its name, or does not."""

    name = "card"
    reported = "NVIDIA H100 80GB HBM3"

    def devices(self) -> Sequence[DeviceInfo]:
        return [DeviceInfo(0, self.reported, 70 * 10**9)]

    @property
    def device(self) -> torch.device:
        return torch.device("meta")


def test_this_machine_s_device_is_found_in_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helios.backend.select", lambda spec=None: Card())
    target = loaded(capsys)["target"]
    assert (target["title"], target["backend"]) == ("NVIDIA H100 80GB HBM3", "card")
    assert target["memory"] == 70 * 10**9
    assert target["peak"] == 989e12
    assert loaded(capsys, "--precision", "fp8")["refused"] is None
    monkeypatch.setattr(Card, "reported", "NVIDIA A100-SXM4-80GB")
    assert loaded(capsys, "--precision", "fp8")["refused"]["fix"] == "--precision fp8-weights"


def test_an_unknown_device_here_is_measured_by_memory_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helios.backend.select", lambda spec=None: Card())
    monkeypatch.setattr(Card, "reported", "Brand New Thing")
    data = loaded(capsys)
    assert data["speed"] is None
    assert data["fits"] is True
    assert "Not predicted: its peak is not known" in printed(capsys)
    assert loaded(capsys, "--precision", "fp8")["refused"] is None  # what is not known is not refused


def test_a_wrong_device_is_told_before_torch_is_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "helios.fit.estimate", None)
    assert main(["fit", "--device", "abacus"]) == 2
    assert "unknown device 'abacus'" in capsys.readouterr().err
