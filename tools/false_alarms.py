#!/usr/bin/env python3
"""A right backend must pass with any seed: run the suite's cases in this process with many, and print what fails.

    python tools/false_alarms.py --backend cpu --precision bf16 --seeds 20

Exit status 1 if anything failed. Without workers, so that what is measured is the suite's judgement alone.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time

import torch

from helios.backend import select
from helios_conformance import execute, suite
from helios_conformance.case import LEVELS, PRECISIONS, SUITES, Case
from helios_conformance.draws import Root
from helios_conformance.references import committed
from helios_conformance.session import Session


def main() -> int:
    """Run; 0 where no case failed with any seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, action="append")
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--level", choices=LEVELS[:-1], default="pipeline", help="the highest level to run")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--filter", action="append", default=[], metavar="ID")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    alarms = 0
    for precision in asked.precision or PRECISIONS:
        cases = suite.choose(precision, asked.suite, suite.levels_up_to(asked.level), asked.filter)
        print(f"{asked.backend}, {precision}: {len(cases)} cases, {asked.seeds} seeds", flush=True)
        for seed in range(asked.first, asked.first + asked.seeds):
            alarms += run(asked.backend, cases, seed)
    print(f"{alarms} false alarms")
    return 1 if alarms else 0


def run(backend: str, cases: list[Case], seed: int) -> int:
    """One seed; the number of cases that failed."""
    started = time.perf_counter()
    session = Session(select(backend), Root(seed, "false-alarms"))
    states: collections.Counter[str] = collections.Counter()
    for case in cases:
        _, verdict = execute.run_here(case, session, committed())
        states[verdict.state] += 1
        if verdict.state == "fail":
            print(f"  seed {seed} {case.id}: {verdict.reason[:300]}", flush=True)
    print(f"seed {seed}: {dict(states)}, {time.perf_counter() - started:.0f} s", flush=True)
    return states["fail"]


if __name__ == "__main__":
    sys.exit(main())
