"""The installed command where another package named ``helios`` is in front of ours, or has overwritten it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import helios_hal

OURS = Path(helios_hal.__file__).resolve().parents[1] / "helios"
BROKEN = "raise AssertionError('imported')\n"


def command(path: str | None, folder: Path) -> subprocess.CompletedProcess[str]:
    """The real console script, started in a folder with that PYTHONPATH."""
    script = shutil.which("helios", path=str(Path(sys.executable).parent))
    assert script, "the console script is not installed: make setup"
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    known |= {} if path is None else {"PYTHONPATH": path}
    return subprocess.run([script, "--version"], capture_output=True, text=True, check=False, cwd=folder, env=known)


def package(folder: Path) -> Path:
    """Another package ``helios``, which must not be imported."""
    (folder / "helios").mkdir(parents=True)
    (folder / "helios" / "__init__.py").write_text(BROKEN)
    return folder / "helios"


def distribution(folder: Path, name: str, *files: str) -> None:
    """What pip leaves behind of a distribution with these files."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def refused(run: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    assert (run.returncode, run.stdout) == (2, ""), run.stderr
    error, fix = run.stderr.splitlines()
    assert error.startswith("error: ")
    assert fix.startswith("fix: ")
    return error, fix


def test_alone_it_works(tmp_path: Path) -> None:
    run = command(None, tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("helios-hal ")


@pytest.mark.parametrize("kind", ["package", "module"])
def test_another_on_pythonpath_is_refused(kind: str, tmp_path: Path) -> None:
    place = package(tmp_path) if kind == "package" else tmp_path / "helios.py"
    if kind == "module":
        place.write_text(BROKEN)
    error, fix = refused(command(str(tmp_path), Path("/")))
    assert f" {place}," in error
    assert f" {OURS} " in error
    assert fix == f"fix: unset PYTHONPATH, or take {tmp_path} off it"


def test_an_empty_part_of_pythonpath_is_the_working_folder(tmp_path: Path) -> None:
    place = package(tmp_path)
    error, fix = refused(command("/nowhere:", tmp_path))
    assert f" {place}," in error
    assert "leave that folder" in fix


def test_one_in_the_working_folder_alone_is_no_obstacle(tmp_path: Path) -> None:
    package(tmp_path)
    assert command(None, tmp_path).returncode == 0


def test_a_folder_that_is_no_package_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "helios").mkdir()
    assert command(str(tmp_path), tmp_path).returncode == 0


def test_our_own_tree_on_pythonpath_is_no_obstacle(tmp_path: Path) -> None:
    assert command(str(OURS.parent), tmp_path).returncode == 0


def test_an_installed_rival_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert "move " in helios_hal._fix(place)
    distribution(tmp_path, "helios-lang", "helios/__init__.py")
    distribution(tmp_path, "innocent", "innocent/__init__.py")
    assert helios_hal._fix(place).startswith("pip uninstall -y helios-lang, or ")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The launcher beside a ``helios`` whose ``__init__`` is that of another project."""
    shutil.copytree(OURS.parent / "helios_hal", tmp_path / "helios_hal")
    (tmp_path / "helios").mkdir()
    (tmp_path / "helios" / "__init__.py").write_text("")
    return tmp_path


def test_a_rival_that_overwrote_ours_is_named(installed: Path) -> None:
    run = command(str(installed), installed)
    assert run.returncode == 1
    assert "ModuleNotFoundError: No module named 'helios.cli'" in run.stderr
    distribution(installed, "helios-lang", "helios/__init__.py")
    error, fix = refused(command(str(installed), installed))
    assert "helios-lang" in error
    assert fix.startswith("fix: pip uninstall -y helios-lang; pip install ")


def test_what_a_rival_left_behind_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helios_hal, "find_spec", lambda name: None)
    trouble = helios_hal._trouble()
    assert trouble is not None
    assert "not complete" in trouble[0]
    assert trouble[1] == helios_hal.REINSTALL
