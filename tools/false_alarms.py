"""Right backends on the suite's cases, seed after seed: how many fail, and how near to its bound each statistic comes.

Usage: ``python tools/false_alarms.py [--backend NAME]… [--precision P]… [--level LEVEL] [--seeds N] [--nonce TEXT]
[--suite quick|full] [ID…]``. ``--level`` is the highest that runs. Another nonce draws other inputs for the same seeds.
Exit 1 if any case fails, 2 if there is none.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from helios.backend import select
from helios_conformance import execute, references, suite
from helios_conformance.case import LEVELS, PRECISIONS, Case, Verdict
from helios_conformance.draws import Root
from helios_conformance.session import Session

STATISTICS = ("norm", "worst", "gain", "misrounded")


def main() -> int:
    """Run, print a table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids", nargs="*")
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--nonce", default="false alarms")
    parser.add_argument("--suite", choices=("quick", "full"), default="quick")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, default=[])
    parser.add_argument("--level", choices=LEVELS[:-1], default="pipeline")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = references.committed()
    failed = 0
    for name in arguments.backend or ("reference", "cpu"):
        for precision in arguments.precision or PRECISIONS:
            levels = suite.levels_up_to(arguments.level)
            cases = suite.choose(precision, arguments.suite, levels, arguments.ids)
            if not cases:
                parser.error(f"no case of {precision} at the level {arguments.level} or below has such an id")
            started = time.perf_counter()
            nearest: dict[str, tuple[float, str]] = {}
            wrong = 0
            for seed in range(arguments.seeds):
                session = Session(select(name), Root(seed, arguments.nonce))
                for case in cases:
                    verdict = execute.run_here(case, session, known)[1]
                    wrong += _told(case, seed, verdict)
                    _note(nearest, case, verdict)
            failed += wrong
            spent = time.perf_counter() - started
            print(
                f"{name} {precision}: {len(cases) * arguments.seeds} cases, {wrong} alarms, {spent:.0f} s", flush=True
            )
            print("".join(f"  {part} {ratio:.2f} {where}\n" for part, (ratio, where) in nearest.items()), end="")
    return 1 if failed else 0


def _told(case: Case, seed: int, verdict: Verdict) -> int:
    if verdict.state == "pass":
        return 0
    print(f"  seed {seed}: {case.id} {verdict.state}: {verdict.reason}", flush=True)
    return 1


def _note(nearest: dict[str, tuple[float, str]], case: Case, verdict: Verdict) -> None:
    """The largest ratio to its bound, of each statistic that has one."""
    for output, numbers in verdict.judged.items():
        for part in STATISTICS:
            bound = getattr(numbers.bounds, part)
            if bound > 0 and not (part == "misrounded" and bound >= 1):
                ratio = abs(getattr(numbers.errors, part)) / bound
                nearest[part] = max(nearest.get(part, (0.0, "")), (ratio, f"{case.id} {output}"))


if __name__ == "__main__":
    sys.exit(main())
