"""``helios doctor``: each trouble that it knows is seen, with one fix, and it works where torch does not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helios.backend import Candidate
from helios.cli import checks, main
from helios.cli.doctor import Finding
from helios.fit.host import Host

BROKEN_TORCH = """
raise RuntimeError(
    "Failed to load the backend extension: torch_npu. You can disable extension auto-loading with "
    "TORCH_DEVICE_BACKEND_AUTOLOAD=0."
)
"""


def only(findings: list[Finding], part: str) -> Finding:
    found = [finding for finding in findings if part in finding.text]
    assert len(found) == 1, findings
    return found[0]


def test_this_machine_can_run_helios(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for topic in ("This machine", "Python", "torch", "Packages", "Backends", "Settings"):
        assert f"\n{topic}\n" in out
    assert "Helios can run here, by backend" in out


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["able"] is True
    assert {finding["state"] for finding in data["findings"]} <= {"ok", "note", "problem"}
    assert sum(backend["chosen"] for backend in data["backends"]) == 1


def test_no_backend_is_exit_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "helios.backend.candidates", lambda: iter([Candidate("sad", None, why="no card", fix="plug one in")])
    )
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "note sad: no card\n     fix: plug one in\n" in out
    assert "Helios cannot run here" in out


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Host:
        raise OSError("no /proc")

    monkeypatch.setattr(checks, "read_host", broken)
    findings, _ = checks.run()
    assert only(findings, "no /proc").state == "note"


def test_a_package_in_the_working_folder_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [f for f in checks.shadows() if str(tmp_path) in f.text] == []
    (tmp_path / "helios").mkdir()
    (tmp_path / "helios" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert only(list(checks.shadows()), str(tmp_path / "helios")).state == "note"


def test_a_package_on_the_path_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helios.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = only(list(checks.shadows()), str(tmp_path / "helios.py"))
    assert found.state == "problem"
    assert str(tmp_path) in found.fix


def test_our_own_folder_is_no_shadow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(checks.helios.__file__).parents[1])
    assert list(checks.shadows()) == []


def test_another_distribution_that_owns_helios_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.metadata, "packages_distributions", lambda: {"helios": ["helios-hal", "helios-lang", "helios-hal"]}
    )
    found = only(list(checks.shadows()), "'helios-lang'")
    assert (found.state, found.fix.split(";")[0]) == ("problem", "pip uninstall -y helios-lang")


def test_two_builds_of_onnxruntime_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_distribution", lambda name: name == "onnxruntime")
    assert list(checks.onnxruntime()) == []
    monkeypatch.setattr(checks, "_distribution", lambda name: True)
    (found,) = checks.onnxruntime()
    assert found.state == "problem"
    assert found.fix.endswith("pip install onnxruntime-gpu")


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_installed", lambda name: name != "av")
    (found,) = checks.packages()
    assert (found.state, found.text) == ("problem", "not installed: av")


@pytest.mark.parametrize(
    ("name", "value", "state", "said"),
    [
        ("HELIOS_BACKEND", "reference", "ok", "HELIOS_BACKEND=reference"),
        ("HELIOS_BACKEND", "cup", "problem", "did you mean 'cpu'?"),
        ("HELIOS_FALLBACK", "refrence", "problem", "did you mean 'reference'?"),
        ("HELIOS_BACKENDS", "cpu", "note", "did you mean 'HELIOS_BACKEND'?"),
    ],
)
def test_variables(name: str, value: str, state: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    (found,) = checks.variables(True)
    assert found.state == state
    assert said in found.text
    assert bool(found.fix) == (state != "ok")


def test_offline_is_noted_and_a_token_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    findings = list(checks.hub())
    assert only(findings, "HF_HUB_OFFLINE").state == "note"
    assert [f for f in findings if "TRANSFORMERS_OFFLINE" in f.text] == []
    assert only(findings, "https://mirror.example").state == "ok"
    assert [f for f in findings if "hf_secret" in f.text + f.fix] == []


def test_too_little_disk_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host("Linux", "CPU", 4, 1.5, 8 * 10**9, 2 * 10**9, 10**9, "/cache", 10**9)
    monkeypatch.setattr(checks, "read_host", lambda: host)
    findings = list(checks.machine())
    assert only(findings, "disk: 1.00 GB free").state == "note"
    assert "4 cores, 1.5 usable" in only(findings, "CPU").text
    assert "cgroup allows 2.00 GB" in only(findings, "memory").text


def doctor_with(folder: Path, **environment: str) -> tuple[int, Any]:
    command = [sys.executable, "-m", "helios", "doctor", "--json"]
    known = os.environ | {"PYTHONPATH": str(folder)} | environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=known)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def test_a_torch_that_breaks_by_a_device_package_is_diagnosed(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(BROKEN_TORCH)
    code, data = doctor_with(tmp_path)
    (found,) = [finding for finding in data["findings"] if finding["topic"] == "torch"]
    assert code == 1
    assert data["able"] is False
    assert found["state"] == "problem"
    assert "torch_npu" in found["text"]
    assert found["fix"].startswith("export TORCH_DEVICE_BACKEND_AUTOLOAD=0")


def test_an_npu_package_that_is_switched_off_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch_npu.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    found = only(list(checks.torch()), "torch_npu")
    assert found.state == "note"
    assert "unset TORCH_DEVICE_BACKEND_AUTOLOAD" in found.fix
