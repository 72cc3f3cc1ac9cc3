"""The conformance suite on engines: all levels to pipeline, three precisions, both ways of holding weights; verified.

tools/on_tensorrt.sh certify [--tiny]
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import certified
import running
from results import Clock, Item, Record
from setting import WAYS, arguments

PART = "certify"
RUNS = tuple((precision, way) for way in WAYS for precision in ("bf16", "fp16", "fp32"))
TINY = ("--filter", "gated_add[fp32,odd]", "--suite", "quick", "--precision", "fp32")


def main(argv: list[str] | None = None) -> int:
    """Run; the exit codes of ``running.run``, and 1 where a verdict is not good."""
    args = arguments(PART, "The conformance suite.", sys.argv[1:] if argv is None else argv)
    clock = Clock(args.budget)
    args.out.mkdir(parents=True, exist_ok=True)
    with certified.working(args.out) as folder:
        return running.run(PART, args, clock, lambda _: _items(args, clock, folder), report)


def _items(args: argparse.Namespace, clock: Clock, folder: Path) -> Iterator[Item]:
    for precision, way in RUNS[-1:] if args.tiny else RUNS:
        options = ["--precision", precision, "--suite", "full", "--level", "pipeline"]
        # The last of two --backend counts: this one.
        given = ["--backend", f"trt:{way}", *(TINY if args.tiny else options)]
        run = functools.partial(certified.certify, args, clock, folder / f"{precision}-{way}", given)
        yield Item(f"certify/{way}/{precision}", "ops, blocks, model, pipeline", way, precision, run, 5.0)


def report(records: Sequence[Record]) -> Iterator[str]:
    """A verdict a line."""
    for r in records:
        if "sentence" in r:
            levels = ", ".join(f"{name} {state}" for name, state in r["levels"].items())
            yield f"{r['column']} {r['row']}: {r['sentence']}"
            yield f"   {levels}; helios verify {'agrees' if r['verified'] else 'does not: ' + r['verify_said']}"


if __name__ == "__main__":
    sys.exit(main())
