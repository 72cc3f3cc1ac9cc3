"""Whether the suite catches a mutant: its cases in this process, the likeliest first, until one fails."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence

from helios.backend import Backend
from helios_conformance import suite
from helios_conformance.case import LEVELS, Case, Judged, Level, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.execute import run_here
from helios_conformance.mutants.mutant import Mutant
from helios_conformance.references import References
from helios_conformance.session import Session

__all__ = ["Attempt", "Kill", "attempt", "likeliest_first"]


@dataclasses.dataclass(frozen=True, slots=True)
class Kill:
    """What caught a mutant.

    Attributes:
        case: id of the case that failed; empty where the backend gave itself away.
        level: of that case.
        statistic: what failed, in a few words.
        reason: the verdict's own words.
    """

    case: str
    level: Level
    statistic: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One mutant in one precision: killed, or it survived. ``tried`` cases ran, in ``seconds``."""

    mutant: Mutant
    precision: str
    kill: Kill | None
    tried: int
    seconds: float


def attempt(
    mutant: Mutant,
    right: Backend,
    precision: str,
    root: Root,
    references: References,
    levels: Iterable[Level] | None = None,
) -> Attempt:
    """Run cases against a mutant until one fails.

    Args:
        mutant: to catch.
        right: the backend that it is made of.
        precision: ``bf16`` or ``fp32``.
        root: of all draws.
        references: reference errors.
        levels: whose cases run; by default its own and those below.
    """
    started = time.perf_counter()
    session = Session(mutant.apply(right), root)
    if session.backend.emulated:
        told = Kill("", "ops", "emulated", session.backend.emulated)
        return Attempt(mutant, precision, told, 0, time.perf_counter() - started)
    taken = suite.levels_up_to(mutant.level) if levels is None else tuple(levels)
    cases = likeliest_first(suite.choose(precision, mutant.suite, taken), mutant)
    kill, tried = None, 0
    while kill is None and tried < len(cases):
        kill = _killed_by(cases[tried], session, references)
        tried += 1
    return Attempt(mutant, precision, kill, tried, time.perf_counter() - started)


def likeliest_first(cases: Sequence[Case], mutant: Mutant) -> list[Case]:
    """By level; in each, cases of ops that the mutant computes otherwise come before the rest, as the suite orders
    them. It is a rule about ops and not about mutants: which case of an op catches it, the suite must find out."""

    def rank(case: Case) -> tuple[int, bool]:
        return LEVELS.index(case.level), case.params.get("op") not in mutant.ops

    return sorted(cases, key=rank)


def _killed_by(case: Case, session: Session, references: References) -> Kill | None:
    """The kill, if a run with this case could not be certified."""
    try:
        seen, verdict = run_here(case, session, references)
    except SystemExit as error:  # in a worker of its own this ends the worker, which fails the case
        return Kill(case.id, case.level, "crash", f"the worker ended with {error.code}")
    if verdict.state == "fail":
        return Kill(case.id, case.level, _statistic(seen, verdict), verdict.reason)
    if verdict.state == "unsupported" and case.required:
        return Kill(case.id, case.level, "unsupported", verdict.reason)
    if any(row[3] for row in seen.coverage):
        ops = ", ".join(row[0] for row in seen.coverage if row[3])
        return Kill(case.id, case.level, "fallback", f"{ops} ran by the reference")
    return None


def _statistic(seen: Observation, verdict: Verdict) -> str:
    """What failed: the statistic that is furthest beyond its bound, or the facts."""
    if "error" in seen.facts:
        return "raised"
    beyond = [found for name, judged in verdict.judged.items() for found in _beyond(name, judged)]
    if beyond:
        return max(beyond)[1]
    return verdict.reason.split(";")[0][:60]


def _beyond(output: str, judged: Judged) -> list[tuple[float, str]]:
    found = []
    for name in ("norm", "worst", "gain", "misrounded"):
        came, bound = abs(getattr(judged.errors, name)), getattr(judged.bounds, name)
        if not came <= bound:
            ratio = came / bound if bound else float("inf")
            found.append((ratio, f"{name} {came:.2g} > {bound:.2g} ({output})"))
    return found
