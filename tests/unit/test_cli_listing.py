"""``helios backends`` and ``helios ops``: the lists, their JSON, broken plugins, narrow terminals."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helios import op
from helios.backend import GROUP, Backend, DeviceInfo
from helios.cli import main
from helios.errors import BackendUnavailable
from helios.ops import OPSET

ROOT = Path(__file__).resolve().parents[2]


class Absent(Backend):
    """Says that its device is missing."""

    name = "absent"

    def devices(self) -> Sequence[DeviceInfo]:
        raise BackendUnavailable("no such card in this machine", "plug one in")


class Wild(Backend):
    """Its probe fails in a way that nobody foresaw."""

    name = "wild"

    def devices(self) -> Sequence[DeviceInfo]:
        raise KeyError("driver")


class Hollow(Backend):
    """Has a device, and members that fail."""

    name = "hollow"

    @property
    def precisions(self) -> tuple[str, ...]:  # type: ignore[override]
        raise RuntimeError("no table")

    def devices(self) -> Sequence[DeviceInfo]:
        return [DeviceInfo(0, "hollow thing")]


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four strangers beside our own backends."""
    import helios.backend

    own = helios.backend.entry_points()
    strangers = {"gone": "helios_gone:Gone"} | {
        name: f"{__name__}:{name.title()}" for name in ("absent", "wild", "hollow")
    }
    points = {name: [importlib.metadata.EntryPoint(name, value, GROUP)] for name, value in strangers.items()}
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Absent.__module__])
    monkeypatch.setattr("helios.backend.entry_points", lambda: {**own, **points})


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(list(arguments)) == code
    return capsys.readouterr().out


def loaded(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(printed(capsys, *arguments, "--json"))


def test_backends_lists_ours_with_their_devices(capsys: pytest.CaptureFixture[str]) -> None:
    data = loaded(capsys, "backends")
    found = {backend["name"]: backend for backend in data["backends"]}
    assert {"cpu", "reference"} <= set(found)
    assert found["reference"]["available"]
    assert found["reference"]["devices"][0]["name"] == "torch cpu"
    assert found["reference"]["kernels"] == data["ops"] == len(op.names())
    assert data["auto"][-1]["reason"] == "chosen"


def test_backends_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "backends")
    assert out.splitlines()[0].split()[:3] == ["backend", "state", "devices"]
    assert "auto chooses" in out


@pytest.mark.usefixtures("plugins")
def test_a_broken_plugin_shows_its_cause_and_harms_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    found = {backend["name"]: backend for backend in loaded(capsys, "backends")["backends"]}
    assert "No module named 'helios_gone'" in found["gone"]["why"]
    assert found["absent"]["fix"] == "plug one in"
    assert "KeyError: 'driver'" in found["wild"]["why"]
    assert "RuntimeError: no table" in found["hollow"]["why"]
    assert not any(found[name]["available"] for name in ("gone", "absent", "wild", "hollow"))
    assert found["reference"]["available"]


@pytest.mark.usefixtures("plugins")
def test_the_table_says_why_and_one_fix(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "backends")
    assert "absent: no such card in this machine\n  fix: plug one in\n" in out
    away = [backend["name"] for backend in loaded(capsys, "backends")["backends"] if not backend["available"]]
    assert {"absent", "gone", "hollow", "wild"} <= set(away)
    assert out.count("fix: ") == len(away)


def test_a_variable_that_decides_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOS_BACKEND", "reference")
    assert "HELIOS_BACKEND=reference is set" in printed(capsys, "backends")


def test_backends_is_quick() -> None:
    """Within 3 s on a free machine, torch included; the bound here allows for neighbours."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "helios", "backends"], capture_output=True, check=True, cwd="/")
    assert time.perf_counter() - start < 12
    assert b"reference" in done.stdout


def test_ops_lists_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    data = loaded(capsys, "ops")
    assert data["opset"] == OPSET
    assert [record["name"] for record in data["ops"]] == op.names()
    assert [record["name"] for record in data["ops"] if not record["summary"] or not record["dims"]] == []


def test_every_op_has_a_line_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "ops").splitlines()
    first = {line.split()[0] for line in lines if line and not line.startswith(" ")}
    assert set(op.names()) <= first


def test_one_op_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "ops", "layer_norm")
    assert out.startswith("layer_norm(x, weight?, bias?) {eps=1e-06, dtype=None}\n")
    assert "biased variance" in out
    assert "samples: small, affine" in out
    data = loaded(capsys, "ops", "layer_norm")
    assert data["attributes"] == {"eps": "1e-06", "dtype": "None"}
    assert [i["optional"] for i in data["inputs"]] == [False, True, True]


@pytest.mark.parametrize(
    "arguments",
    [
        ["backends"],
        ["ops"],
        ["ops", "attention"],
        ["doctor"],
        ["fit", "--device", "h100"],
        ["fit", "--device", "rtx4090", "--size", "mini"],
        ["graph", "--size", "tiny", "--height", "64", "--width", "64", "--flops", "--backend", "reference"],
        ["--help"],
        ["fit", "--help"],
    ],
    ids=" ".join,
)
def test_nothing_is_wider_than_the_terminal(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = printed(capsys, *arguments).splitlines()
    assert lines
    assert [line for line in lines if len(line) > 60 and not line.lstrip().startswith("fix: ")] == []
    assert "\x1b" not in "".join(lines), "escape codes in a pipe"
