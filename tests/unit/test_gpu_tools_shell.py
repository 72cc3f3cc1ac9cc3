"""``tools/on_gpu.sh`` itself, in a small tree with parts of our own: crashes, budgets, what is not there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The dispatcher and the script that writes entry points; an environment check that passes; no part."""
    for name in ("tools/on_gpu.sh", "tools/gpu/entry_points.py", "pyproject.toml", "helios/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tools/gpu/environment.py").write_text("print('a machine')\n")
    return tmp_path


def part(tree: Path, name: str, text: str) -> None:
    (tree / "tools" / "gpu" / f"part_{name}.py").write_text(text)


def run(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "PYTHON": sys.executable, "OUT": str(tree / "results"), **environment}
    command = ["bash", str(tree / "tools" / "on_gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=known, cwd=tree)


def test_a_part_that_is_not_written_says_so(tree: Path) -> None:
    done = run(tree, "kernels")
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == "kernels: not written yet"


@pytest.mark.parametrize("arguments", [("kernel",), ("kernels", "--budget", "soon")])
def test_what_makes_no_sense_is_refused_with_a_fix(tree: Path, arguments: tuple[str, ...]) -> None:
    done = run(tree, *arguments)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "fix: " in done.stderr


def test_all_runs_every_part_and_ends_with_the_worst_code(tree: Path) -> None:
    part(tree, "ceilings", "print('first')")
    part(tree, "realtime", "raise SystemExit(1)")
    part(tree, "certify", "import sys; print('third', *sys.argv[1:])")
    done = run(tree, "all", "--device", "cpu", "--budget", "30", "--tiny")
    assert done.returncode == 2
    words = done.stdout.splitlines()
    assert words[:3] == ["a machine", "first", "kernels: not written yet"]
    assert words[3] == f"third --budget 30 --out {tree / 'results'} --device cpu --tiny"
    assert run(tree, "realtime").returncode == 1
    assert run(tree, "certify").returncode == 0


@pytest.mark.parametrize("end", ["import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "raise SystemExit(75)"])
def test_after_a_lost_process_a_fresh_one_goes_on(tree: Path, end: str) -> None:
    part(
        tree,
        "ceilings",
        f"import pathlib\nmark = pathlib.Path('mark')\nif not mark.exists():\n    mark.touch()\n    {end}\n",
    )
    done = run(tree, "ceilings")
    assert done.returncode == 0, done.stderr
    assert "a fresh one goes on" in done.stderr


def test_a_process_that_is_always_lost_comes_to_an_end(tree: Path) -> None:
    part(tree, "ceilings", "print('again')\nraise SystemExit(75)")
    done = run(tree, "ceilings")
    assert done.returncode == 1
    assert done.stdout.count("again") == 7


def test_earlier_results_are_gone_on_with_and_never_overwritten(tree: Path) -> None:
    part(tree, "ceilings", "import pathlib; print(pathlib.Path('results/ceilings.jsonl').read_text())")
    (tree / "old").mkdir()
    (tree / "old" / "ceilings.jsonl").write_text("earlier")
    (tree / "old" / "certify.zip").write_text("an unfinished run")
    assert run(tree, "ceilings", PREVIOUS="old").stdout.splitlines()[-1] == "earlier"
    assert (tree / "results" / "certify.zip").read_text() == "an unfinished run"
    (tree / "results" / "ceilings.jsonl").write_text("later")
    assert run(tree, "ceilings", PREVIOUS="old").stdout.splitlines()[-1] == "later"


def test_a_machine_that_cannot_measure_ends_it_before_any_part(tree: Path) -> None:
    part(tree, "ceilings", "print('ran')")
    (tree / "tools/gpu/environment.py").write_text("raise SystemExit(2)")
    done = run(tree, "ceilings")
    assert done.returncode == 2
    assert "ran" not in done.stdout


def test_entry_points_are_found_without_an_installation(tree: Path) -> None:
    part(
        tree,
        "ceilings",
        "from importlib.metadata import entry_points, version\n"
        "print(sorted(p.name for p in entry_points(group='helios.backends')), version('helios-hal'))\n",
    )
    # -S: without the site packages, so that only what the script puts on the path is found.
    (tree / "bare").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    (tree / "bare").chmod(0o755)
    done = run(tree, "ceilings", PYTHON=str(tree / "bare"))
    assert done.returncode == 0, done.stderr
    assert "'cpu'" in done.stdout.splitlines()[-1]


def test_the_metadata_are_those_of_the_installation(tmp_path: Path) -> None:
    path = ROOT / "tools" / "gpu" / "entry_points.py"
    spec = importlib.util.spec_from_file_location("gpu_entry_points", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(tmp_path)
    (made,) = distributions(path=[str(tmp_path)])
    assert made.name == "helios-hal"
    names = {(point.group, point.name) for point in made.entry_points}
    assert {("helios.backends", "cpu"), ("helios.commands", "certify"), ("console_scripts", "helios")} <= names


def test_without_a_gpu_the_check_says_so_and_what_to_do() -> None:
    command = [sys.executable, str(ROOT / "tools" / "gpu" / "environment.py")]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=hidden)
    assert done.returncode == 2
    assert "finds no NVIDIA GPU" in done.stderr
    assert "fix: " in done.stderr
