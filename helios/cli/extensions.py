"""Commands of other packages: the entry points of the group ``helios.commands``, found when somebody asks for them.

An entry point names a function that typer takes, or a ``typer.Typer`` with commands of its own. Its module may hold
``EXAMPLES``, shown below its help. What cannot be loaded harms nobody: it is listed as unavailable, and says why when
it is called.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from helios.cli.options import CERTIFY
from helios.errors import HeliosError

__all__ = ["GROUP", "Commands"]

GROUP = "helios.commands"


class Commands(TyperGroup):
    """The group of all commands: the built-in ones in their order, then those of others, by name."""

    def list_commands(self, ctx: Any) -> list[str]:
        own = super().list_commands(ctx)
        return own + [name for name in _points() if name not in own]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        points = _points().get(cmd_name)
        return None if points is None else _command(cmd_name, points)


def _points() -> dict[str, list[EntryPoint]]:
    """By name, sorted; more than one value under a name is a conflict."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        known = found.setdefault(point.name, [])
        if all(other.value != point.value for other in known):
            known.append(point)
    return found


def _command(name: str, points: list[EntryPoint]) -> Any:
    """The command as the parser takes it, or one that only says why it is not there."""
    if len(points) > 1:
        claims = " and ".join(point.value for point in points)
        return _made(name, _unavailable(name, f"two packages claim it: {claims}", "uninstall one of them"))
    try:
        return _made(name, points[0].load())
    except Exception as error:
        why = f"{points[0].value} raised {type(error).__name__}: {error}"
        return _made(name, _unavailable(name, why, "repair or uninstall the package that brings it"))


def _made(name: str, given: Any) -> Any:
    """A function, or a group of commands, under its name in the help's panel."""
    if isinstance(given, typer.Typer):
        made = typer.main.get_command(given)
    else:
        app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
        examples = getattr(sys.modules.get(given.__module__), "EXAMPLES", None)
        app.command(name, epilog=examples)(given)
        made = typer.main.get_command(app)
    made.name = name
    made.rich_help_panel = CERTIFY  # type: ignore[attr-defined]
    return made


def _unavailable(name: str, why: str, fix: str) -> Any:
    def missing() -> None:
        raise HeliosError(f"the command {name!r} is not available: {why}", fix)

    missing.__doc__ = f"Not available: {' '.join(why.split())[:120]}"
    return missing
