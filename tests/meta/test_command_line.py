"""The installed command: its helps work, and what the documents tell a reader to type exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from helios.cli import app

ROOT = Path(__file__).resolve().parents[2]
GROUP: Any = typer.main.get_command(app)
CONTEXT: Any = GROUP.make_context("helios", ["doctor"], resilient_parsing=True)
COMMANDS: dict[str, Any] = {name: GROUP.get_command(CONTEXT, name) for name in GROUP.list_commands(CONTEXT)}


def helios(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = shutil.which("helios", path=str(Path(sys.executable).parent))
    assert script, "the console script is not installed: make setup"
    return subprocess.run([script, *arguments], capture_output=True, text=True, check=False)


def told() -> list[list[str]]:
    """Every helios command line of the README, in words, without what stands before ``helios``."""
    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"^\$ (?:\w+=\S+ )*helios (.+)$|`helios ([^`]+)`", text, re.MULTILINE)
    return [shlex.split(first or second) for first, second in lines]


def test_the_help_names_every_command() -> None:
    run = helios("--help")
    assert run.returncode == 0, run.stderr
    assert COMMANDS
    assert [name for name in COMMANDS if name not in run.stdout] == []


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_command_has_a_help(name: str) -> None:
    run = helios(name, "--help")
    assert run.returncode == 0, run.stderr
    assert "Usage" in run.stdout


def test_the_suites_commands_are_there() -> None:
    assert {"cases", "certify", "compare", "diff", "verify"} <= set(COMMANDS)
    assert [name for name, command in COMMANDS.items() if "Not available" in (command.help or "")] == []


def test_an_unknown_command_is_a_mistake_and_no_traceback() -> None:
    run = helios("generat")
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert "generat" in run.stderr


@pytest.mark.parametrize("words", told(), ids=" ".join)
def test_what_the_readme_tells_to_type_exists(words: list[str]) -> None:
    assert words[0] in COMMANDS
    command = COMMANDS[words[0]]
    if hasattr(command, "commands"):
        assert words[1] in command.commands
        command = command.commands[words[1]]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


def test_the_readme_was_read() -> None:
    assert {"generate", "backends", "fit"} <= {words[0] for words in told()}
