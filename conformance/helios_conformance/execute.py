"""One case from beginning to end: run on the device, judge on the host. The runner does the first half in a worker."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Mapping

from helios import op
from helios.backend import PRECISIONS
from helios.errors import UnsupportedNode
from helios_conformance import budget, causes, checks, portable
from helios_conformance.case import Case, Observation, State, Verdict
from helios_conformance.draws import Root
from helios_conformance.references import References
from helios_conformance.session import Session

__all__ = ["ENDINGS", "judge", "observe", "run_here"]

ENDINGS: Mapping[str, State] = {"lost": "fail", "not_run": "not_run"}
"""Facts that the runner writes where nothing came back, with their reason: the worker was lost, or was not asked."""


def observe(case: Case, session: Session) -> Observation:
    """Run a case. A node that the backend declared not to support is an observation; anything else that it raises is
    the ``error`` fact: a failure."""
    try:
        return _placed(checks.get(case.check).observe(case, session), session)
    except UnsupportedNode as error:
        return Observation(unsupported=error.why)
    except Exception as error:
        where = "".join(traceback.format_exception(error)[-3:])
        return Observation(facts={"error": f"{type(error).__name__}: {error}"[:2000], "traceback": where[-4000:]})


def _placed(seen: Observation, session: Session) -> Observation:
    """With the type of the torch device, ``device``, where that is not the host."""
    device = session.backend.device.type
    return seen if device == "cpu" else dataclasses.replace(seen, facts={**seen.facts, "device": device})


def judge(case: Case, observation: Observation, root: Root, references: References) -> Verdict:
    """The verdict on what came back; the same on every host."""
    if observation.unsupported:
        return Verdict("unsupported", observation.unsupported)
    for fact, state in ENDINGS.items():
        if fact in observation.facts:
            return Verdict(state, observation.facts[fact])
    if "error" in observation.facts:
        return Verdict("fail", f"the backend raised {observation.facts['error']}")
    if portable.IMPORTED in observation.facts:
        return portable.judge(case, observation, root, references)
    verdict = checks.get(case.check).judge(case, observation, root, references)
    kernels = observation.facts.get("engine") is False and observation.outputs and not _of_constants(case)
    # A program of kernels knows how each of its nodes runs. An engine's has no coverage, and claims less.
    if verdict.state == "pass" and kernels and not any(sum(row[1:4]) for row in observation.coverage):
        return Verdict("fail", "kernels ran, and no coverage says how: a fallback could not be seen", verdict.judged)
    return _explained(verdict, case, observation)


def _explained(verdict: Verdict, case: Case, observation: Observation) -> Verdict:
    """With the likely cause where an op's numbers are beyond their bounds."""
    where = str(observation.facts.get("device", ""))
    cause = causes.likely(str(case.params.get("op", "")), PRECISIONS[case.precision], where)
    if not cause or not any(budget.exceeded(one.errors, one.bounds) for one in verdict.judged.values()):
        return verdict
    return dataclasses.replace(verdict, reason=f"{verdict.reason}; {cause}")


def _of_constants(case: Case) -> bool:
    """Whether the case's op has no operands: the host computes such nodes, so there is no kernel to account for."""
    name = case.params.get("op")
    return name in op.names() and not op.get(name).operands


def run_here(case: Case, session: Session, references: References) -> tuple[Observation, Verdict]:
    """Both halves in this process: for tests and mutants."""
    seen = observe(case, session)
    return seen, judge(case, seen, session.root, references)
