"""The command itself: help, version, how mistakes end, and what it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import helios
from helios.cli import app, main, output
from helios.errors import BackendUnavailable, HeliosError

FAKE_TORCH = """
raise RuntimeError(
    "Failed to load the backend extension: torch_npu. You can disable extension auto-loading with "
    "TORCH_DEVICE_BACKEND_AUTOLOAD=0."
)
"""


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "helios", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd or "/", env=os.environ | environment
    )


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """A command ``fail`` in an app of its own, which ``main`` then runs; it raises what ``raised`` holds."""
    made = typer.Typer()
    monkeypatch.setattr(sys.modules["helios.cli.app"], "app", made)  # helios.cli.app is also the name of the app
    return made


def command_raises(made: typer.Typer, error: BaseException) -> None:
    @made.command()
    def fail() -> None:
        raise error


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"helios-hal {helios.__version__}"


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_help_stands_in_three_panels_and_once(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    out = capsys.readouterr().out
    for panel in ("Make video", "Port", "Certify"):
        assert out.count(f"─ {panel} ─") == 1


def test_every_command_is_in_one_of_the_panels() -> None:
    panels = {command.rich_help_panel for command in app.registered_commands}
    assert panels == {"Make video", "Port", "Certify"}


def test_a_mistake_is_two_lines_and_no_traceback(failing: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    command_raises(failing, BackendUnavailable("no device " + "x" * 200, "plug one in: " + "y" * 200))
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["error: no device " + "x" * 200, "fix: plug one in: " + "y" * 200]


def test_a_mistake_without_a_fix_is_one_line(failing: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    command_raises(failing, HeliosError("[bold]odd[/bold] :smile:"))
    assert main([]) == 2
    assert capsys.readouterr().err == "error: [bold]odd[/bold] :smile:\n"


def test_ctrl_c_is_130(failing: typer.Typer) -> None:
    command_raises(failing, KeyboardInterrupt())
    assert main([]) == 130


def test_a_defect_keeps_its_traceback(failing: typer.Typer) -> None:
    command_raises(failing, ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError, match="ours"):
        main([])


def test_an_exit_code_is_passed_on(failing: typer.Typer) -> None:
    command_raises(failing, typer.Exit(7))
    assert main([]) == 7


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["backend"], "'backends'"),
        (["fit", "--varient", "mid"], "--variant"),
        (["fit", "--variant", "distiled"], "'distilled'"),
        (["fit", "--size", "14B"], "'14b'"),
        (["fit", "--device", "h1000"], "'h100'"),
        (["fit", "--precision", "bf17"], "'bf16'"),
        (["ops", "atention"], "'attention'"),
        (["bench", "--backend", "cup"], "'cpu'"),
        (["graph", "--height", "tall"], "--height"),
        (["graph", "--height"], "--height"),
        (["graph", "extra"], "extra"),
    ],
)
def test_a_wrong_word_exits_2_and_names_the_nearest(
    arguments: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "\nfix: " in captured.err
    assert near in captured.err


def test_help_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was imported')\n")
    for arguments in (["--help"], ["--version"], ["graph", "--help"], ["fit", "--device", "nothing"]):
        done = run(*arguments, PYTHONPATH=str(tmp_path))
        assert "torch was imported" not in done.stderr
        assert done.returncode == (2 if "nothing" in arguments else 0)


def test_a_device_package_that_breaks_torch_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    done = run("backends", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in done.stderr.splitlines()[1]


@pytest.mark.parametrize("arguments", [["backends"], ["ops", "--json"], ["graph", "--size", "mini"]], ids=" ".join)
def test_a_reader_that_goes_away_is_no_defect(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "helios", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_json_is_the_only_thing_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"a": "×", "b": (1, 2)})
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": "×", "b": [1, 2]}
    assert "×" in out


def test_no_cell_is_wider_than_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    output.table(["name", "text"], [("a" * 30, "word " * 30), ("b", "unbroken" * 20)], right=["name"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert max(map(len, lines)) <= 40


def test_a_long_command_is_continued_so_that_it_can_be_pasted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    words = ["helios", "generate", *(f"--flag-{n}" for n in range(8))]
    output.command(words)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 30
    assert out.count(" \\\n") == len(out.splitlines()) - 1 > 2
    assert out.replace("\\\n", "").split() == words


def test_a_fix_is_never_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    output.fix("pip install " + "word " * 20, "  ")
    assert capsys.readouterr().out == "  fix: pip install " + "word " * 20 + "\n"
