"""Whether the suite catches a mutant: its cases in this process, the likeliest first, until one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from helios.backend import Backend
from helios_conformance import suite
from helios_conformance.case import LEVELS, Case, Judged, Level, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.execute import judge, observe
from helios_conformance.mutants.mutant import Mutant
from helios_conformance.references import References
from helios_conformance.session import Session

__all__ = ["Attempt", "Bench", "Kill", "attempt", "likeliest_first"]


SMALL: Mapping[str, Any] = {
    "size": "tiny",
    "height": 64,
    "width": 64,
    "tokens": 16,
    "chunks": 8,
    "seconds": 0.5,
    "warmup": 1,
    "ceiling": 0.02,
    "pairs": 2,
    "steps": (1, 1, 1),
}
"""Options of level realtime: its rules are exercised, no speed is measured."""


@dataclasses.dataclass(eq=False)
class Bench:
    """What mutants are tried on: a right backend, and what it does with the same cases.

    A case that the right backend fails as well catches nothing. ``alarms`` keeps those that were met, by id, with the
    reason: each is a defect of the suite or of that backend.
    """

    right: Backend
    root: Root
    references: References
    alarms: dict[str, str] = dataclasses.field(default_factory=dict)
    _sound: set[str] = dataclasses.field(default_factory=set)

    def session(self, backend: Backend) -> Session:
        return Session(backend, self.root, options=SMALL)

    def sound(self, case: Case) -> bool:
        """Whether the right backend passes a case; run once."""
        if case.id not in self._sound and case.id not in self.alarms:
            try:
                with _clocks_put_back(_CLOCKS):
                    verdict = _run(case, self.session(self.right), self.references)[1]
            except KeyError as error:  # no reference error yet
                verdict = Verdict("not_run", str(error))
            if verdict.state == "pass":
                self._sound.add(case.id)
            else:
                self.alarms[case.id] = f"{verdict.state}: {verdict.reason}"
        return case.id in self._sound


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


def attempt(mutant: Mutant, bench: Bench, precision: str, levels: Iterable[Level] | None = None) -> Attempt:
    """Run cases against a mutant until one fails that the right backend passes.

    Args:
        mutant: to catch.
        bench: of the right backend that it is made of.
        precision: one of the mutant's.
        levels: whose cases run; by default its own and those below.
    """
    started = time.perf_counter()
    session = bench.session(mutant.apply(bench.right))
    if session.backend.emulated:
        told = Kill("", "ops", "emulated", session.backend.emulated)
        return Attempt(mutant, precision, told, 0, time.perf_counter() - started)
    taken = suite.levels_up_to(mutant.level) if levels is None else tuple(levels)
    cases = likeliest_first(suite.choose(precision, mutant.suite, taken), mutant)
    kill, tried = None, 0
    with _clocks_put_back():
        while kill is None and tried < len(cases):
            kill = _killed_by(cases[tried], session, bench)
            tried += 1
    return Attempt(mutant, precision, kill, tried, time.perf_counter() - started)


def likeliest_first(cases: Sequence[Case], mutant: Mutant) -> list[Case]:
    """Its own level's before those below; in each, cases of ops that the mutant computes otherwise before the rest, and
    the quick suite's before the full one's. It is a rule about ops and not about mutants: which case of an op catches
    it, the suite must find out."""

    def rank(case: Case) -> tuple[int, bool, bool]:
        return -LEVELS.index(case.level), case.params.get("op") not in mutant.ops, case.suite == "full"

    return sorted(cases, key=rank)


def _run(case: Case, session: Session, references: References) -> tuple[Observation, Verdict]:
    """Both halves of a case in this process, with the clock that a parent would hold outside of the worker."""
    begin, told = _clock(), list[list[Any]]()
    session.tell = lambda line: told.append([_clock() - begin, dict(line)])
    seen = observe(case, session)
    if told:
        seen = dataclasses.replace(seen, facts={**seen.facts, "told": told})
    return seen, judge(case, seen, session.root, references)


_clock = functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)
_TIMERS = ("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "time", "time_ns")
_CLOCKS: Mapping[str, Any] = {name: getattr(time, name) for name in _TIMERS}


@contextlib.contextmanager
def _clocks_put_back(within: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
    """A worker of its own dies with its clocks; here they are put back.

    Args:
        within: the clocks that hold meanwhile, by name; by default those that hold already.
    """
    held = {name: getattr(time, name) for name in _TIMERS}
    try:
        for name, timer in within.items():
            setattr(time, name, timer)
        yield
    finally:
        for name, timer in held.items():
            setattr(time, name, timer)


def _killed_by(case: Case, session: Session, bench: Bench) -> Kill | None:
    """The kill, if a run with this case could not be certified but the right backend's could."""
    try:
        seen, verdict = _run(case, session, bench.references)
    except SystemExit as error:  # in a worker of its own this ends the worker, which fails the case
        return Kill(case.id, case.level, "crash", f"the worker ended with {error.code}")
    except KeyError:
        if bench.sound(case):
            raise
        return None
    kill = _kill(case, seen, verdict)
    return kill if kill is not None and bench.sound(case) else None


def _kill(case: Case, seen: Observation, verdict: Verdict) -> Kill | None:
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
