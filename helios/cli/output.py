"""What the commands print: tables for a terminal, plain columns for a pipe, JSON for a program."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = [
    "command",
    "count",
    "fail",
    "fix",
    "gigabytes",
    "heading",
    "line",
    "note",
    "print_json",
    "seconds",
    "table",
    "teraflops",
]


def _console(*, stderr: bool = False) -> Console:
    """A console for now: no markup, no guessed colours, no symbols that change by name."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def line(text: str = "", style: str | None = None) -> None:
    """One paragraph, wrapped at the width of the terminal."""
    _console().print(Text(text, style=style or ""))


def heading(text: str) -> None:
    """A line above what belongs together."""
    console = _console()
    console.print()
    console.print(Text(text, style="bold"))


def note(text: str) -> None:
    """What qualifies the figures above it."""
    line(text, "dim")


def fix(text: str, indent: str = "") -> None:
    """What to do next, on one line however long: a command that is broken in two cannot be pasted."""
    _console().print(Text(f"{indent}fix: {text}"), soft_wrap=True)


def command(words: Sequence[str]) -> None:
    """A command to paste, continued with backslashes where the terminal ends."""
    width, lines = _console().width - 2, [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    _console().print(Text(" \\\n".join(lines)), soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> None:
    """Rows below their headings; a cell that is too wide wraps, so nothing is wider than the terminal.

    Args:
        columns: headings.
        rows: one cell a column.
        right: headings of the columns of numbers.
    """
    console = _console()
    numbers = set(right)
    made = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    console.print(made)


def print_json(data: Any) -> None:
    """The data as JSON on standard output, and nothing else."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def fail(why: str, fix: str = "") -> None:
    """A mistake of the user's: two lines on standard error, not wrapped, so that a command can be pasted."""
    console = _console(stderr=True)
    for label, text, style in (("error", why, "bold red"), ("fix", fix, "bold")):
        if text:
            console.print(Text.assemble((f"{label}: ", style), text), soft_wrap=True)


def gigabytes(size: float) -> str:
    """Bytes for people, in powers of ten.

    >>> gigabytes(28_624_855_168), gigabytes(4096), gigabytes(0)
    ('28.62 GB', '4.1 kB', '0 B')
    """
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1)):
        if abs(size) < 1000:
            return f"{size:.{digits}f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def teraflops(flops: float) -> str:
    """FLOP for people, in units of 10¹²; small ones keep three significant digits.

    >>> teraflops(355.88e12), teraflops(12_582_912_000), teraflops(0)
    ('355.880', '0.0126', '0')
    """
    value = flops / 1e12
    if not value:
        return "0"
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def seconds(value: float) -> str:
    """Seconds for people.

    >>> seconds(3045.6), seconds(12.345), seconds(0.9997), seconds(0.0123), seconds(0.0000123)
    ('3,046 s', '12.3 s', '1 s', '12.3 ms', '12.3 µs')
    """
    if value >= 100:
        return f"{value:,.0f} s"
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if value * factor >= 0.9995:  # what three digits round to 1
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def count(number: int, one: str, many: str = "") -> str:
    """A number with its noun.

    >>> count(1, "node"), count(2, "node")
    ('1 node', '2 nodes')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"
