"""``tools/on_ascend.sh`` on a machine without an NPU: what it says, and what its pieces make of given files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    asked = ["bash", str(ROOT / "tools" / "on_ascend.sh"), *arguments]
    return subprocess.run(asked, capture_output=True, text=True, check=False, env=given, cwd=tmp_path)


def test_a_machine_without_an_npu_is_told_so(tmp_path: Path) -> None:
    run = command(tmp_path)
    assert run.returncode == 2, run.stderr
    assert "error: torch_npu is not installed" in run.stdout
    assert "versions that belong together" in (tmp_path / "out" / "environment.txt").read_text()
    assert (tmp_path / "out.tar.gz").is_file()
    assert "certify" not in run.stdout  # nothing else begins on a machine that cannot run it


@pytest.mark.parametrize("asked", [("everything",), ("all", "--fast")])
def test_what_it_does_not_know_is_refused_with_a_fix(asked: tuple[str, ...], tmp_path: Path) -> None:
    run = command(tmp_path, *asked)
    assert run.returncode == 2
    assert run.stderr.startswith("error: no ")
    assert "fix: " in run.stderr


def test_the_fastest_way_to_run_steps_is_named(tmp_path: Path) -> None:
    for kind, times in {"off": (1.0, 2.0, 6.0), "npu": (0.9, 1.9, 5.9)}.items():
        for stage, taken in enumerate(times):
            phases = {"prompt": {"p50": 0.1}, f"stage{stage}": {"p50": taken}}
            (tmp_path / f"graphs-{kind}-{stage}.json").write_text(json.dumps({"phases": phases}))
    (tmp_path / "graphs-torchair-0.json").write_text("")  # it did not run
    script = ROOT / "tools" / "ascend" / "npu_fastest.py"
    run = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "fastest: graphs=npu"
    assert "none" in run.stdout.splitlines()[2]
