"""The conformance suite on this device: ``helios certify`` up to the level model, its bundle verified and packed.

    tools/on_gpu.sh certify [--device cpu --tiny] [--budget SECONDS] [--out FOLDER]

The quick suite in every precision, then the full one. A run that time ends is gone on with by the next, from
``certify.zip`` in the folder, where its environment is the same. ``--tiny`` runs two ops.
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import certified
import running
from results import Clock, Item, Record

PART = "certify"
FIRST = ("bf16", "fp8-attention", "fp8", "fp32", "fp16", "fp8-weights")
RUNS = tuple((precision, suite) for suite in ("quick", "full") for precision in FIRST)
TINY = ("--filter", "gated_add[bf16,odd]", "--suite", "quick")


def main(argv: list[str] | None = None) -> int:
    """Run; the exit codes of ``running.run``, and 1 where a verdict is not good."""
    args = running.parser(PART, "The conformance suite: ops, blocks, model.").parse_args(argv)
    clock = Clock(args.budget)
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what there is must be packed even so
    with certified.working(args.out) as folder:
        return running.run(PART, args, clock, lambda _: _items(args, clock, folder), report)


def _items(args: argparse.Namespace, clock: Clock, folder: Path) -> Iterator[Item]:
    for precision, suite in RUNS[:1] if args.tiny else RUNS:
        options = ["--precision", precision, "--suite", suite, "--level", "model"]
        run = functools.partial(
            certified.certify, args, clock, folder / f"{precision}-{suite}", list(TINY) if args.tiny else options
        )
        yield Item(
            f"certify/{suite}/{precision}", "ops, blocks, model", suite, precision, run, 5.0 if args.tiny else 40.0
        )


def report(records: Sequence[Record]) -> Iterator[str]:
    """A verdict a line."""
    for r in records:
        if "sentence" in r:
            levels = ", ".join(f"{name} {state}" for name, state in r["levels"].items())
            yield f"{r['column']} {r['row']}: {r['sentence']}"
            yield f"   {levels}; helios verify {'agrees' if r['verified'] else 'does not: ' + r['verify_said']}"


if __name__ == "__main__":
    sys.exit(main())
