"""The files that stand in the tree: no leftovers of a merge, and no document that names what is not there."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# Written in pieces, so that this file does not find itself.
MERGE_MARKER = re.compile("^(" + "<" * 7 + " |" + "=" * 7 + "$|" + ">" * 7 + " )", re.MULTILINE)


def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def text_of(path: Path) -> str:
    data = path.read_bytes()
    return "" if b"\0" in data[:8192] else data.decode("utf-8")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_no_tracked_file_has_merge_markers() -> None:
    files = tracked()
    assert len(files) > 10
    assert [str(path.relative_to(ROOT)) for path in files if MERGE_MARKER.search(text_of(path))] == []


@pytest.mark.parametrize("line", ["<" * 7 + " ours", "=" * 7, ">" * 7 + " theirs"])
def test_the_marker_pattern_finds_each_marker(line: str) -> None:
    assert MERGE_MARKER.search(f"a\n{line}\nb\n")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_that_a_document_names_exist(document: Path) -> None:
    named = re.findall(r"(?:^\$ |`)make ([a-z-]+)", document.read_text(), re.MULTILINE)
    assert set(named) <= make_targets()


def test_the_readme_names_the_two_commands() -> None:
    named = re.findall(r"^\$ make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert named == ["demo", "test"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_every_script_that_the_makefile_runs_exists() -> None:
    scripts = re.findall(r"\btools/[\w./]+", (ROOT / "Makefile").read_text())
    assert scripts
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_everything_that_is_asked_for() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {normal(name): pin for name, _, pin in (x.partition("==") for x in lines if not x.startswith("#"))}
    assert pins["torch"] == "2.13.0", "a local suffix would bind the pins to one build of torch"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in asked}
    assert {"torch", "pytest"} <= names
    assert names - set(pins) == set()
