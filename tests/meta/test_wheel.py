"""What the wheel carries: the packages that have code, the licence, the marker of types; no tests, no scripts."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, capture_output=True, check=True)
    (wheel,) = out.glob("helios_hal-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_every_module_of_the_packages_is_there(names: set[str]) -> None:
    for home, package in (
        (ROOT, "helios"),
        (ROOT, "helios_hal"),
        (ROOT / "backends" / "cpu", "helios_cpu"),
        (ROOT / "conformance", "helios_conformance"),
    ):
        modules = {path.relative_to(home).as_posix() for path in (home / package).rglob("*.py")}
        assert modules
        assert modules <= names


def test_data_files_of_the_suite_are_there(names: set[str]) -> None:
    home = ROOT / "conformance"
    wanted = subprocess.run(
        ["git", "ls-files", "-z", "helios_conformance"], cwd=home, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    assert "helios_conformance/references.json" in wanted
    assert {name for name in wanted if name} <= names


def test_the_schema_of_a_manifest_is_there(names: set[str]) -> None:
    assert "helios/export/manifest.schema.json" in names


def test_it_is_typed_and_licensed(names: set[str]) -> None:
    assert "helios/py.typed" in names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


def test_nothing_else_is_there(names: set[str]) -> None:
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "helios",
        "helios_hal",
        "helios_ascend",
        "helios_cpu",
        "helios_cuda",
        "helios_ort",
        "helios_trt",
        "helios_conformance",
    }


def test_every_package_with_code_is_listed() -> None:
    """A backend that got code but is not in the wheel would be found by nobody."""
    homes = [*(ROOT / "backends").glob("*/helios_*"), *(ROOT / "conformance").glob("helios_*")]
    with_code = {path.relative_to(ROOT).as_posix() for path in homes if any(path.rglob("*.py"))}
    project = (ROOT / "pyproject.toml").read_text()
    assert {home for home in with_code if f'"{home}"' not in project} == set()
