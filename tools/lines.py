"""A table of lines per file and function sizes; with ``--check``, an error where one is too long.

Usage: ``python tools/lines.py [--check] [ROOT]``. Lines are all lines, blank ones and comments included; a function
runs from its ``def`` to its last line, docstring included. The bounds hold for what is shipped (``SHIPPED``); tests and
tools are shown, not judged.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHIPPED = ("helios", "helios_hal", "backends", "conformance")
SHOWN = (*SHIPPED, "tools", "tests", "examples")
FILE_LINES = 500
FUNCTION_LINES = 60


@dataclass(frozen=True, slots=True)
class Function:
    """A function of a file: where it starts, what it is called, how many lines it has."""

    line: int
    name: str
    lines: int


@dataclass(frozen=True, slots=True)
class Source:
    """A Python file with its length and its functions, methods and nested functions included."""

    path: str
    lines: int
    functions: tuple[Function, ...]

    @property
    def shipped(self) -> bool:
        """Whether the bounds hold for it."""
        return self.path.split("/")[0] in SHIPPED


def measure(path: Path, root: Path) -> Source:
    """The sizes of one file; raises SyntaxError where it is not Python."""
    text = path.read_text(encoding="utf-8")
    functions = tuple(
        Function(node.lineno, node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(ast.parse(text, filename=str(path)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return Source(path.relative_to(root).as_posix(), len(text.splitlines()), functions)


def sources(root: Path) -> list[Source]:
    """Every Python file below the folders of ``SHOWN``, in the order of their names."""
    return [measure(path, root) for folder in SHOWN for path in sorted((root / folder).rglob("*.py"))]


def violations(found: list[Source]) -> Iterator[str]:
    """One line for each shipped file or function over its bound."""
    for source in found:
        if not source.shipped:
            continue
        if source.lines > FILE_LINES:
            yield f"{source.path}: {source.lines} lines, at most {FILE_LINES}: split it by what it does"
        for function in source.functions:
            if function.lines > FUNCTION_LINES:
                where = f"{source.path}:{function.line}"
                yield f"{where}: {function.name} has {function.lines} lines, at most {FUNCTION_LINES}"


def row(name: str, lines: int, functions: list[Function]) -> str:
    """One line of the table: lines, functions, median and longest function."""
    sizes = [function.lines for function in functions]
    median = f"{statistics.median(sizes):.0f}" if sizes else "-"
    longest = max(functions, key=lambda function: function.lines, default=None)
    tail = f"{longest.lines:5d}  {longest.name}" if longest else "    -"
    return f"{name:52s} {lines:6d} {len(sizes):6d} {median:>6s} {tail}"


def table(found: list[Source]) -> Iterator[str]:
    """The table: a line a file of what is shipped, then a line a folder."""
    yield f"{'file':52s} {'lines':>6s} {'funcs':>6s} {'median':>6s} {'max':>5s}  longest function"
    for source in found:
        if source.shipped:
            yield row(source.path, source.lines, list(source.functions))
    yield ""
    for folder in SHOWN:
        inside = [source for source in found if source.path.split("/")[0] == folder]
        if inside:
            functions = [function for source in inside for function in source.functions]
            yield row(f"{folder}/ ({len(inside)} files)", sum(source.lines for source in inside), functions)


def main() -> int:
    """Print the table; exit code 1 where ``--check`` finds something too long or nothing at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a shipped file or function is too long")
    args = parser.parse_args()
    found = sources(args.root)
    print("\n".join(table(found)))
    if not args.check:
        return 0
    if not any(source.shipped for source in found):
        print(f"no Python file below {args.root}: nothing was checked", file=sys.stderr)
        return 1
    wrong = list(violations(found))
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
