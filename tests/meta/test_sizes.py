"""The bounds on files and functions hold, and the tool that checks them can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "lines.py"), "--check", str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def source(root: Path, text: str) -> None:
    (root / "helios").mkdir()
    (root / "helios" / "made.py").write_text(text)


def test_everything_shipped_is_within_bounds() -> None:
    run = check(ROOT)
    assert run.returncode == 0, run.stderr
    assert "helios/errors.py" in run.stdout


def test_a_long_function_is_refused(tmp_path: Path) -> None:
    source(tmp_path, "def long():\n" + "    x = 1\n" * 60)
    run = check(tmp_path)
    assert run.returncode == 1
    assert "helios/made.py:1: long has 61 lines, at most 60" in run.stderr


def test_a_long_file_is_refused(tmp_path: Path) -> None:
    source(tmp_path, "x = 1\n" * 501)
    run = check(tmp_path)
    assert run.returncode == 1
    assert "helios/made.py: 501 lines, at most 500" in run.stderr


def test_the_bounds_themselves_pass(tmp_path: Path) -> None:
    source(tmp_path, "def f():\n" + "    x = 1\n" * 59 + "x = 1\n" * 440)
    assert check(tmp_path).returncode == 0


def test_an_empty_tree_is_not_a_pass(tmp_path: Path) -> None:
    run = check(tmp_path)
    assert run.returncode == 1
    assert "nothing was checked" in run.stderr
