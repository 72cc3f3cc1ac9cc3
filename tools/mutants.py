"""The suite's own test: run wrong backends against it, print which case catches each, fail if one survives.

    python tools/mutants.py [NAME ...] [--backend reference] [--precision bf16 fp32] [--seed 0] [--out FILE.md]

NAME takes ``*``. A mutant must be caught in each precision that it names, at its level or below. A case counts
only if the right backend passes it: one that fails everything catches nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from helios.backend import select
from helios_conformance import references
from helios_conformance.case import LEVELS, PRECISIONS
from helios_conformance.draws import Root
from helios_conformance.mutants import MUTANTS, Attempt, Bench, Mutant, attempt

HEAD = ("mutant", "precision", "must fail by", "caught by", "what failed", "repeats", "cases", "seconds")
WIDTHS = (24, 9, 13, 44, 44, 7, 5, 7)


def main() -> None:
    """Run, print each row as it comes, and write the table."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    bench = Bench(select(args.backend), Root(args.seed), references.committed())
    rows = _known(args.resume)
    wrong = []
    print(_line(HEAD))
    for mutant, precision in _chosen(args):
        if (mutant.name, precision) in rows:
            continue
        found = attempt(mutant, bench, precision)
        row = _row(found)
        print(_line(row), flush=True)
        if problem := _problem(found, bench, args.above):
            wrong.append(f"{mutant.name} in {precision}: {problem}")
            print(f"    {problem}", flush=True)
            continue
        rows[mutant.name, precision] = row
        if args.resume:
            with args.resume.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(f"{len(rows)} caught, {len(wrong)} not")
    wrong += [f"false alarm, {case}: {reason}" for case, reason in bench.alarms.items()]
    if args.out and not wrong:
        args.out.write_text(_document([rows[key] for key in _chosen_names(args)], args))
    sys.exit("\n".join(wrong) if wrong else 0 if rows else "no mutant ran")


def _known(file: Path | None) -> dict[tuple[str, str], tuple[str, ...]]:
    """Rows of an earlier run by mutant and precision."""
    lines = file.read_text().splitlines() if file is not None and file.exists() else []
    found = [tuple(json.loads(line)) for line in lines]
    return {(row[0], row[1]): row for row in found}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["*"])
    parser.add_argument("--backend", default="reference", help="the right one that is wrapped")
    parser.add_argument("--precision", nargs="*", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--seed", type=int, default=0, help="of the suite")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="only those that the quick suite must catch")
    parser.add_argument(
        "--above", action="store_true", help="of a survivor, find out whether a higher level catches it"
    )
    parser.add_argument("--resume", type=Path, help="file of rows that are done: read, and added to")
    parser.add_argument("--out", type=Path, help="write the table as Markdown")
    return parser.parse_args()


def _chosen(args: argparse.Namespace) -> Iterator[tuple[Mutant, str]]:
    for mutant in MUTANTS:
        if not any(fnmatch.fnmatchcase(mutant.name, name) for name in args.names or ["*"]):
            continue
        if args.quick and mutant.suite != "quick":
            continue
        yield from ((mutant, precision) for precision in args.precision if precision in mutant.precisions)


def _chosen_names(args: argparse.Namespace) -> list[tuple[str, str]]:
    return [(mutant.name, precision) for mutant, precision in _chosen(args)]


def _problem(found: Attempt, bench: Bench, look_above: bool) -> str:
    """That nothing caught it, and which level above would have."""
    if found.kill is not None:
        return ""
    above = LEVELS[LEVELS.index(found.mutant.level) + 1 : LEVELS.index("realtime")] if look_above else ()
    later = attempt(found.mutant, bench, found.precision, above).kill if above else None
    return f"survived; {later.case} above its level would catch it" if later else "survived"


def _row(found: Attempt) -> tuple[str, ...]:
    mutant, kill = found.mutant, found.kill
    by = kill.case or "what it declares" if kill else "nothing"
    level = mutant.level + (" (full)" if mutant.suite == "full" else "")
    what = kill.statistic if kill else ""
    seconds = f"{found.seconds:.1f}"
    return mutant.name, found.precision, level, by, what, str(mutant.repeats), str(found.tried), seconds


def _line(row: tuple[str, ...]) -> str:
    return "  ".join(cell[:width].ljust(width) for cell, width in zip(row, WIDTHS, strict=True)).rstrip()


def _document(rows: list[tuple[str, ...]], args: argparse.Namespace) -> str:
    about = {mutant.name: mutant for mutant in MUTANTS}
    lines = [
        "# Mutants: what the suite catches",
        "",
        f"Made by `make mutants` on {time.strftime('%Y-%m-%d', time.gmtime())}: {len({r[0] for r in rows})} wrong"
        f" backends, made of backend `{args.backend}`, suite seed {args.seed}. A row is a mutant in a precision that"
        " must catch it: the level by which it must fail, the first case that failed, what failed there, how many runs"
        " of a kernel it takes to see the mistake, and how many cases ran before. Cases of ops that a mutant computes"
        " otherwise go first.",
        "",
        *_notes(),
    ]
    for family in dict.fromkeys(mutant.family for mutant in MUTANTS):
        mine = [row for row in rows if about[row[0]].family == family]
        if not mine:
            continue
        lines += [
            "",
            f"## {family.capitalize()}",
            "",
            _cells(("mutant", "what is wrong", *HEAD[1:7])),
            _cells(("---",) * 8),
        ]
        lines += [_cells((f"`{r[0]}`", about[r[0]].wrong, r[1], r[2], f"`{r[3]}`", *r[4:7])) for r in mine]
    return "\n".join(lines) + "\n"


def _notes() -> list[str]:
    return [
        "What no case can catch: a backend that computes right numbers elsewhere than it says. Which device it was is"
        " attested by the machine that ran, and the report says so.",
    ]


def _cells(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
