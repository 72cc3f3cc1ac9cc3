"""The package that ``helios new-backend`` writes: its files, their text, and what it refuses to write."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest
import yaml

from helios.backend import API_VERSION
from helios.cli import main
from helios.errors import InputError, StorageError
from helios.scaffold import KINDS, Package, package, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package of each kind."""
    home = tmp_path_factory.mktemp("made")
    for kind in KINDS:
        write(Package("my_chip", kind), home / kind)
    return {kind: home / kind for kind in KINDS}


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_all_that_a_vendor_needs(kind: str, made: dict[str, Path]) -> None:
    names = {path.relative_to(made[kind]).as_posix() for path in made[kind].rglob("*") if path.is_file()}
    wanted = {"pyproject.toml", "README.md", "xfails.toml", ".gitignore", ".github/workflows/ci.yml"}
    wanted |= {"helios_my_chip/__init__.py", "helios_my_chip/py.typed", "helios_my_chip/backend.py"}
    own = {"engine": {"engine.py", "translate.py"}}.get(kind, {"kernels.py"})
    assert names == wanted | {f"helios_my_chip/{name}" for name in own} | {"tests/test_my_chip.py"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_project_registers_the_backend(kind: str, made: dict[str, Path]) -> None:
    project = tomllib.loads((made[kind] / "pyproject.toml").read_text())["project"]
    assert project["name"] == "helios-my-chip"
    assert project["entry-points"]["helios.backends"] == {"my_chip": "helios_my_chip:MyChipBackend"}
    assert "helios-hal" in project["dependencies"]
    assert ("onnx-ir>=0.1.4" in project["dependencies"]) is (kind == "engine")


@pytest.mark.parametrize("kind", KINDS)
def test_the_workflow_tests_and_tells_what_is_to_do(kind: str, made: dict[str, Path]) -> None:
    workflow = yaml.safe_load((made[kind] / ".github/workflows/ci.yml").read_text())
    commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert {"mypy", "pytest", "pip install -e '.[dev]'"} <= set(commands)
    assert any(command.startswith("helios certify --backend my_chip ") for command in commands)


@pytest.mark.parametrize("kind", KINDS)
def test_the_expected_failures_are_an_empty_list_and_an_example(kind: str, made: dict[str, Path]) -> None:
    text = (made[kind] / "xfails.toml").read_text()
    assert tomllib.loads(text) == {"xfail": []}
    example = "\n".join(line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   "))
    (entry,) = tomllib.loads(example)["xfail"]
    assert set(entry) == {"case", "reason", "link", "until"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_backend_is_short_and_made_for_this_api(kind: str, made: dict[str, Path]) -> None:
    text = (made[kind] / "helios_my_chip" / "backend.py").read_text()
    assert len(text.splitlines()) <= 100
    assert f"api_version = {API_VERSION}\n" in text


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_one_place_for_the_vendors_code(kind: str, made: dict[str, Path]) -> None:
    texts = [path.read_text() for path in (made[kind] / "helios_my_chip").glob("*.py")]
    assert sum(text.count("Your code goes here") for text in texts) == 1
    assert sum(text.count("Build your engine here") for text in texts) == int(kind == "engine")


@pytest.mark.parametrize("kind", KINDS)
def test_every_op_is_entered_by_name(kind: str, made: dict[str, Path]) -> None:
    """No loop over the opset, no reference backend, no fallback: what is green was put there."""
    for path in (made[kind] / "helios_my_chip").glob("*.py"):
        text = path.read_text()
        assert not re.search(r"op\.names|ReferenceBackend|fallback=\"reference\"", text)
        tables = [
            node.value
            for node in ast.parse(text).body
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) in ("KERNELS", "TRANSLATIONS")
        ]
        for table in tables:
            assert isinstance(table, ast.Dict)
            assert [ast.literal_eval(key) for key in table.keys if key] == ["silu"]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_templates_is_left(kind: str, made: dict[str, Path]) -> None:
    for path in (p for p in made[kind].rglob("*") if p.is_file()):
        text = path.read_text()
        assert "{{" not in text, path
        assert "{%" not in text, path
        assert not re.search(r"\n{4,}|[ \t]\n", text), path
        assert text == "" or text.endswith("\n")


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_is_clean(kind: str, made: dict[str, Path]) -> None:
    """By the package's own settings, and by the stricter ones of this project."""
    ours = ["--config", str(ROOT / "pyproject.toml"), "--config", 'lint.isort.known-first-party=["helios*"]']
    for words in (["check", "."], ["format", "--check", "."], ["check", *ours, "helios_my_chip"]):
        run = subprocess.run(
            [sys.executable, "-m", "ruff", *words], cwd=made[kind], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_code_is_typed(kind: str, made: dict[str, Path]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(made["kernels"].parent / "cache")],
        cwd=made[kind],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_torch_device_is_the_name_unless_it_is_told() -> None:
    path = "helios_my_chip/backend.py"
    assert 'DEVICE = "my_chip"' in Package("my_chip", "torch-device").files()[path]
    assert 'DEVICE = "xpu"' in Package("my_chip", "torch-device", "xpu").files()[path]


def test_every_template_is_package_data_and_used() -> None:
    root = resources.files("helios.scaffold").joinpath("templates")
    there = {f"{folder.name}/{file.name}" for folder in root.iterdir() for file in folder.iterdir()}
    used = {f"common/{name}" for name in package.COMMON.values()}
    used |= {f"{kind}/{name}.j2" for kind, names in package.OWN.items() for name in names}
    assert there == used
    assert set(package.OWN) == set(KINDS)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "why", "fix"),
    [
        (["My-Chip"], "'My-Chip' cannot name a backend", "helios new-backend my_chip"),
        (["7nm"], "'7nm' cannot name a backend", "helios new-backend mychip"),
        (["class"], "'class' cannot name a backend", "helios new-backend mychip"),
        (["../up"], "'../up' cannot name a backend", "helios new-backend up"),
        (["naïve"], "cannot name a backend", "helios new-backend na_ve"),
        (["chip\n"], "cannot name a backend", "helios new-backend chip"),
        (["auto"], "'auto' is reserved", "another name"),
        (["reference"], "'reference' is reserved", "another name"),
        (["cpu"], "an installed backend has the name 'cpu'", "helios backends"),
        (["conformance"], "an installed package has the name helios_conformance", "another name"),
        (["hal"], "an installed package has the name helios_hal", "another name"),
        (["chip", "--kind", "kernel"], "did you mean 'kernels'?", "--kind kernels"),
        (["chip", "--torch-device", "xpu"], "says nothing to kind 'kernels'", "--kind torch-device"),
        (["chip", "--kind", "torch-device", "--torch-device", "xpu:1"], "'xpu:1' is not what torch calls", "NAME:1"),
        ([], "NAME", "new-backend"),
    ],
)
def test_a_mistake_is_one_error_with_a_fix_and_nothing_is_written(
    arguments: list[str],
    why: str,
    fix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-backend", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error, _, rest = captured.err.partition("\nfix: ")
    assert error.startswith("error: ")
    assert why in error
    assert fix in rest
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_a_folder_stays(tmp_path: Path) -> None:
    home = tmp_path / "helios-chip"
    home.mkdir()
    (home / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty") as caught:
        write(Package("chip"), home)
    assert "--out" in caught.value.fix
    assert [path.name for path in home.iterdir()] == ["notes.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["helios-chip"]


def test_a_file_or_a_dangling_link_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(InputError, match="is not a folder"):
            write(Package("chip"), tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "link").is_symlink()


def test_an_empty_folder_is_taken_and_new_ones_are_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for folder in (tmp_path / "link", tmp_path / "a" / "b"):
        paths = write(Package("chip"), folder)
        assert paths
        assert all(path.is_file() for path in paths)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty", "link"]


def test_the_folder_that_one_stands_in_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-backend", "chip", "--out", "."]) == 0
    assert "pip install -e .\n" in capsys.readouterr().out
    assert Path("helios_chip/backend.py").is_file()


@pytest.mark.parametrize("there", [False, True])
def test_nothing_half_written_is_left(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = Path.write_text, []

    def full(self: Path, text: str, encoding: str | None = None) -> int:
        written.append(self)
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        return real(self, text, encoding)

    monkeypatch.setattr(Path, "write_text", full)
    if there:
        (tmp_path / "new").mkdir()
    with pytest.raises(StorageError, match="No space left") as caught:
        write(Package("chip"), tmp_path / "new")
    assert "--out" in caught.value.fix
    assert len(written) == 5
    assert list(tmp_path.rglob("*")) == ([tmp_path / "new"] if there else [])


def test_a_place_that_cannot_be_written_is_told() -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        write(Package("chip"), Path("/proc/helios-chip"))


# --- what is said -----------------------------------------------------------------------------------------------------


def test_the_next_three_commands_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-backend", "my_chip", "--out", "a chip"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("Next")
    assert lines[at + 1 : at + 4] == [
        "pip install -e './a chip'",
        "helios backends",
        "helios certify --backend my_chip --level ops",
    ]
    assert (tmp_path / "a chip" / "helios_my_chip" / "backend.py").is_file()


def test_without_a_folder_it_is_named_like_the_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-backend", "my_chip", "--kind", "engine"]) == 0
    assert "pip install -e ./helios-my-chip\n" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["helios-my-chip"]
