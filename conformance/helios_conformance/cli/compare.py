"""``helios compare``: what changed from one bundle to the next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helios.cli import output
from helios.cli.options import JsonOption

if TYPE_CHECKING:
    from helios_conformance.compare import Change

__all__ = ["EXAMPLES", "compare"]

EXAMPLES = "Example: helios compare out/certify/before out/certify/after"
_MOST = 40


def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="The earlier bundle.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The later one.")],
    json: JsonOption = False,
) -> None:
    """Compare two bundles: regressions, improvements, times, and what else differs.

    Neither is verified here. Exit status: 0 nothing got worse, 1 something did, 2 a mistake in the command.
    """
    import dataclasses

    from helios_conformance import compare as comparing

    found = comparing.compare(comparing.read(before), comparing.read(after))
    status = int(bool(found.regressions))
    if json:
        output.print_json(dataclasses.asdict(found))
        raise typer.Exit(status)
    for title, changes in (
        ("Regressions", found.regressions),
        ("Improvements", found.improvements),
        ("Slower cases", found.slower),
        ("Faster cases", found.faster),
        ("Also different", found.environment),
    ):
        _print(title, changes)
    for note in found.notes:
        output.note(f"Note: {note}")
    count = output.count(len(found.regressions), "regression")
    output.line(count if status else "No regression", "bold red" if status else "bold green")
    raise typer.Exit(status)


def _print(title: str, changes: Sequence[Change]) -> None:
    from helios_conformance.intake import shown

    if not changes:
        return
    output.heading(title)
    rows = [(shown(c.what), c.before, c.after, "" if c.factor is None else f"{c.factor:.3g}×") for c in changes[:_MOST]]
    output.table(["what", "before", "after", "factor"], rows, right=["factor"])
    if len(changes) > _MOST:
        output.note(f"and {len(changes) - _MOST} more; --json has all")
