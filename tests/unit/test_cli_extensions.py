"""Commands of other packages: found by entry points, listed beside ours, and harmless when they are broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helios.cli import main

PLUGIN = '''
import typer

EXAMPLES = "Example: helios stranger --count 3"

def stranger(count: int = 1) -> None:
    """Does what a stranger does."""
    typer.echo(f"{count} strangers")
    raise typer.Exit(3)

app = typer.Typer()

@app.callback()
def group() -> None:
    """Many strangers."""

@app.command()
def wave() -> None:
    typer.echo("hello")

def generate() -> None:
    """A command of a name that is taken."""
    typer.echo("theirs")
'''

POINTS = """[helios.commands]
absent = not_there:command
broken = broken_plugin:command
claimed = plugin:stranger
generate = plugin:generate
many = plugin:app
stranger = plugin:stranger
"""


@pytest.fixture(autouse=True)
def _plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('half installed')\n")
    for name, points in (("plugin", POINTS), ("rival", "[helios.commands]\nclaimed = rival:command\n")):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_function_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stranger", "--count", "2"]) == 3
    assert capsys.readouterr().out == "2 strangers\n"
    assert main(["stranger", "-h"]) == 0
    assert "helios stranger --count 3" in capsys.readouterr().out


def test_an_app_is_a_group_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["many", "wave"]) == 0
    assert capsys.readouterr().out == "hello\n"
    assert main(["many", "wav"]) == 2


def test_what_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    certify = " ".join(out[out.index("─ Certify ─") :].split())
    for words in ("stranger Does what a stranger does.", "many Many strangers.", "broken Not available:"):
        assert words in certify
    assert "A command of a name that is taken" not in out


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("broken", "broken_plugin:command raised RuntimeError: half installed"),
        ("absent", "ModuleNotFoundError"),
        ("claimed", "two packages claim it: plugin:stranger and rival:command"),
    ],
)
def test_a_broken_one_says_why_and_harms_nobody(name: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: the command '{name}' is not available: ")
    assert why in err
    assert "\nfix: " in err
    assert main(["stranger"]) == 3


def test_a_built_in_command_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", "--help"])
    assert "taken" not in capsys.readouterr().out


def test_nothing_of_others_is_imported_for_our_own_commands() -> None:
    code = "import sys; from helios.cli import main; main(['fit', '--help']); print('plugin' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.splitlines()[-1] == "False"
