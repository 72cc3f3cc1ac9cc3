"""The to-do list that ``helios certify`` prints where required cases of single ops did not pass."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from helios.cli import output
from helios_conformance import todo
from helios_conformance.run import RunResult
from helios_conformance.todo import Item

__all__ = ["SHOWN", "of", "tell"]

SHOWN = 10
"""Ops that are listed; of the others the number is told."""

STATES = {"unsupported": "not done", "fail": "fails"}


def of(result: RunResult) -> list[Item]:
    """What a run leaves to do; nothing where the backend could not start, since then no op is known."""
    if not result.backend.get("device"):
        return []
    return todo.items(result.backend, result.setup.precision, result.records)


def tell(items: Sequence[Item], spec: str) -> None:
    """The first ops to write or to mend, and the command to begin with.

    Args:
        items: in their order.
        spec: of the backend, as it was selected.
    """
    if not items:
        return
    output.heading(f"To do: {output.count(len(items), 'op')}, the largest share of a chunk's time first")
    columns = ["share", "nodes", "op", "slowest node's operands; first case"]
    output.table(columns, map(_row, items[:SHOWN]), right=["share", "nodes"])
    if len(items) > SHOWN:
        output.line(f"and {len(items) - SHOWN} more")
    output.note(todo.ASSUMED)
    output.line("Begin with:")
    words = ["helios", "certify", "--backend", spec, "--filter", items[0].case]
    output.command([shlex.quote(word) for word in words])
    output.line()


def _row(item: Item) -> tuple[str, int, str, str]:
    operands = f"{item.largest}\n" if item.largest else ""
    return f"{item.share:.1%}", item.nodes, f"{item.op}\n{item.kind}, {STATES[item.state]}", operands + item.case
