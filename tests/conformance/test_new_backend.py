"""A package of ``helios new-backend``, installed: it is found, certifies nothing, and a kernel turns its op green."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helios.backend import select
from helios.cli import main
from helios.scaffold import Package, write
from helios_conformance import bundle, execute, suite
from helios_conformance.draws import Root
from helios_conformance.record import record
from helios_conformance.references import committed
from helios_conformance.run import RunResult, Setup
from helios_conformance.session import Session
from helios_conformance.subject import describe
from helios_conformance.verdict import judge_run

PACKAGES = {
    "newchip": Package("newchip", "kernels"),
    "newdevice": Package("newdevice", "torch-device", "cpu"),
    "newengine": Package("newengine", "engine"),
}
NAMES = sorted(PACKAGES)
ABSENT = Package("nodevice", "torch-device")
"""Of a device that no torch here knows."""

ADD = {
    "newchip": (
        "kernels.py",
        "KERNELS: Mapping",
        "def add(x: Tensor, y: Tensor) -> Tensor:\n    return x + y\n\n\n",
        '    "add": Kernel(add),\n',
    ),
    "newdevice": ("kernels.py", "KERNELS: Mapping", "", '    "add": body("add"),\n'),
    "newengine": (
        "translate.py",
        "TRANSLATIONS: Mapping",
        "",
        '    "add": FORMS["add"],\n',
    ),
}
"""What a vendor would write for a second op: file, where, a function before it, a line in the table."""


def install(folders: list[Path], site: Path) -> None:
    """As a vendor would, but into a folder of its own."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--target", str(site), *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, each in a folder of its name, and all installed in ``site``."""
    folder = tmp_path_factory.mktemp("vendors")
    packages = [*PACKAGES.values(), ABSENT]
    for package in packages:
        write(package, folder / package.name)
    install([folder / package.name for package in packages], folder / "site")
    return folder


def python(site: Path, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Another process, for which the packages are installed."""
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "100"}
    command = [sys.executable, "-P", "-m", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd or site)


@pytest.fixture
def certify(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Runs certify here, the backend in its worker; what it prints as JSON, with the cases by id and the status."""
    monkeypatch.syspath_prepend(str(home / "site"))
    monkeypatch.setenv("PYTHONPATH", str(home / "site"))
    # Lowering the published size for each bundle would be most of the time here.
    monkeypatch.setattr(bundle.graphs, "of_spec", lambda *given: "left out by a test")

    def run(name: str, *arguments: str) -> dict[str, Any]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        status = main(["certify", "--backend", name, "--out", str(out), "--json", *arguments])
        told: dict[str, Any] = json.loads(capsys.readouterr().out)
        cases = json.loads((out / "report.json").read_text())["cases"]
        return told | {"status": status, "states": {case["id"]: case["state"] for case in cases}}

    return run


def test_the_packages_are_listed(home: Path) -> None:
    run = python(home / "site", "helios", "backends", "--json")
    assert run.returncode == 0, run.stderr
    listed = {entry["name"]: entry for entry in json.loads(run.stdout)["backends"]}
    assert [listed[name]["available"] for name in NAMES] == [True] * 3
    assert [listed[name]["kernels"] for name in NAMES] == [1, 1, 0]
    assert "emulated" in listed["newchip"]["devices"][0]["name"]
    absent = listed[ABSENT.name]
    assert not absent["available"]
    assert "torch cannot use a device 'nodevice'" in absent["why"]
    assert "plugin" in absent["fix"]


@pytest.mark.parametrize("name", ["newchip", "newengine", pytest.param("newdevice", marks=pytest.mark.slow)])
def test_an_op_is_green_once_it_is_written_and_not_before(
    name: str, home: Path, certify: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIOS_FALLBACK", "reference")  # which makes nothing green
    filters = ["--filter", "add[fp32,small*", "--filter", "silu[fp32,small*"]
    before = certify(name, *filters)
    assert before["status"] == 1
    assert before["verdict"]["word"] == "not certified"
    assert len(before["states"]) > 10
    assert all(
        state == ("pass" if case.startswith("silu") else "unsupported") for case, state in before["states"].items()
    )
    assert [item["op"] for item in before["todo"]] == ["add"]
    monkeypatch.delenv("HELIOS_FALLBACK")
    file, where, function, line = ADD[name]
    path = home / "site" / PACKAGES[name].module / file
    text = path.read_text()
    try:
        head, table = text.split(where)
        path.write_text(head + function + where + table.replace('    "silu"', line + '    "silu"', 1))
        after = certify(name, *filters)
    finally:
        path.write_text(text)
    assert set(after["states"].values()) == {"pass"}
    assert after["states"].keys() == before["states"].keys()
    assert after["todo"] == []
    assert after["verdict"]["word"] == "passed", "two ops of many certify nothing"


def test_certify_has_no_fallback_to_ask_for(certify: Callable[..., dict[str, Any]]) -> None:
    assert main(["certify", "--backend", "newchip", "--fallback", "reference"]) == 2


def test_what_the_fallback_runs_is_counted_and_certifies_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(home / "site"))
    session = Session(select("newdevice"), Root(3), fallback="reference")
    case = suite.find("add[fp32,small]")
    observation, judged = execute.run_here(case, session, committed())
    assert judged.state == "pass"
    assert [(row[0], row[3] > 0) for row in observation.coverage] == [("add", True)]
    setup = Setup("newdevice", "fp32", "quick", ("ops",), (case.id,), Root(3))
    told = describe(session.backend, "newdevice", session)
    result = RunResult(setup, [record(case, observation, judged, 0.1)], told, {"git": {}}, "", "")
    verdict = judge_run(result)
    assert verdict["word"] == "passed"
    assert "1 nodes ran by the reference in the backend's place" in verdict["reasons"]


# --- as it is typed, in a process of its own --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_skeleton_fails_with_the_list_of_what_to_do(name: str, home: Path, tmp_path: Path) -> None:
    words = ["helios", "certify", "--backend", name, "--level", "ops", "--out", str(tmp_path / "out")]
    run = python(home / "site", *words)
    assert run.returncode == 1, run.stderr
    cases = json.loads((tmp_path / "out" / "report.json").read_text())["cases"]
    ran = [case for case in cases if case["check"] != "op_refuses"]  # Helios itself refuses what no backend may see
    green = {case["id"].partition("[")[0] for case in ran if case["state"] == "pass"}
    assert green == {"silu", "full", "rope_table"}, "the example, and what has no operands"
    assert "is not certified" in " ".join(run.stdout.split())
    lines = run.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("To do: "))
    assert lines[at + 2].split()[2] == "linear"
    (command,) = (line for line in lines if line.startswith(f"helios certify --backend {name} --filter "))
    assert "linear[" in command


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_its_own_tests_pass_and_can_fail(name: str, home: Path) -> None:
    tests = ["pytest", "-q", "-p", "no:cacheprovider", str(home / name / "tests")]
    run = python(home / "site", *tests, cwd=home / name)
    assert run.returncode == 0, run.stdout + run.stderr
    path = home / "site" / PACKAGES[name].module / ADD[name][0]
    text = path.read_text()
    wrong = {
        "newchip": ("wide / (1.0", "1.01 * wide / (1.0"),
        "newdevice": ('"silu": body("silu")', '"silu": body("gelu")'),
        "newengine": ('"silu": FORMS["silu"]', '"silu": FORMS["gelu"]'),
    }[name]
    try:
        path.write_text(text.replace(*wrong))
        assert path.read_text() != text
        run = python(home / "site", *tests, cwd=home / name)
    finally:
        path.write_text(text)
    assert run.returncode == 1
    assert "test_every_op_that_it_offers_is_right" in run.stdout
