"""What every part does around its measurements: the command line, the log, the tables last, the exit code."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import totals
from environment import header
from results import Clock, DeviceLostError, Item, Record, Results, run_items

__all__ = ["LOST", "Report", "parser", "run", "seconds_of"]

LOST = 75
"""Exit code after which a fresh process can go on."""
MOST_TROUBLES = 20
"""Lines on what went wrong: the tables have to stay in sight at the end of a log."""

Report: TypeAlias = Callable[[Sequence[Record]], Iterator[str]]


def parser(part: str, about: str) -> argparse.ArgumentParser:
    """The options that all parts have; ``--budget`` is in seconds."""
    made = argparse.ArgumentParser(prog=f"tools/on_gpu.sh {part}", description=about)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--tiny", action="store_true", help="small shapes: does everything run?")
    made.add_argument("--budget", type=float, default=420.0, help="seconds after which nothing more is begun")
    made.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the results")
    return made


def run(
    part: str,
    args: argparse.Namespace,
    clock: Clock,
    items: Callable[[Results], Iterable[Item]],
    report: Report,
) -> int:
    """Take what is not finished, then print the tables and keep them.

    Args:
        part: names the log.
        args: of ``parser``.
        clock: of the budget, begun before anything was loaded.
        items: what there is to take, given the log so far.
        report: lines from all records.

    Returns:
        1 if anything was wrong or failed, ``LOST`` if a fresh process should go on, else 0.
    """
    head = header(part, args.device, args.tiny)
    results = Results(args.out / f"{part}.jsonl", {**head, "code": head["commit"]})
    try:
        run_items(items(results), results, clock, _show)
    except DeviceLostError as lost:
        print(f"error: the device was lost in {lost}\nfix: run the same command again: it goes on after that")
        return LOST
    records = list(results.records.values())
    text = "\n".join([_title(part, head), *report(records), *_endings(part, records)])
    with (args.out / "tables.txt").open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    print(text)
    return 1 if totals.problems(records) else 0


def _title(part: str, head: Record) -> str:
    return f"== {part}: {head['device']}, torch {head['torch']}, driver {head['driver']}, commit {head['commit'][:12]}"


def _endings(part: str, records: Sequence[Record]) -> Iterator[str]:
    """What there was no time for, what is not there, and what went wrong."""
    late = [r["id"] for r in records if r["status"] == "not measured"]
    if late:
        yield f"not measured: out of time: {len(late)}, from {late[0]} on; the same command again goes on there"
    absent = [r for r in records if r["status"] == "not there"]
    if absent:
        yield f"not there: {len(absent)}, such as {absent[0]['id']}: {absent[0]['why'][:160]}"
    troubles = totals.problems(records)
    yield from troubles[:MOST_TROUBLES]
    if len(troubles) > MOST_TROUBLES:
        yield f"and {len(troubles) - MOST_TROUBLES} more: see {part}.jsonl"


def _show(record: Record) -> None:
    figure = totals.cell(record) if record["status"] == "measured" else record.get("why", record["status"])
    print(f"{record['id']}: {figure}", flush=True)


def seconds_of(clock: Clock, most: float, share: float = 1.0) -> float:
    """Seconds that a measurement may take: at most ``most``, and that share of what is left."""
    return max(0.0, min(most, share * clock.left()))
