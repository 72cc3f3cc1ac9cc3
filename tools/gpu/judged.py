"""Whether every op is right on this device: the conformance suite's own cases in this process, and captured steps."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator

import check_execution
from results import Item, Record
from rig import Rig

from helios.backend import Backend, select
from helios_conformance import execute, references, scope, suite
from helios_conformance.case import Case, Suite
from helios_conformance.draws import Root
from helios_conformance.session import Session

__all__ = ["everything", "execution", "first"]

TINY = ("gated_add", "cfg")
"""Ops of a run that only tests the plumbing."""
ROOT = Root(0, "gpu")


def first(rig: Rig, backend: Backend, precision: str) -> Iterator[Item]:
    """Each op's cases of the quick suite, an item an op; of a precision that quantises the quantised ops, since others
    have the cases of its dtype."""
    listed = [case for case in _cases(precision, "quick") if _taken(rig, case)]
    for name, cases in itertools.groupby(sorted(listed, key=_op), _op):
        found = tuple(cases)
        yield _item(backend, f"suite/{precision} quick/{name}", name, f"{precision} quick", found, 10.0)


def everything(rig: Rig, backend: Backend, precision: str) -> Iterator[Item]:
    """What the full suite has beyond, real sizes among it, an item a case."""
    quick = {case.id for case in _cases(precision, "quick")}
    for case in _cases(precision, "full") if not rig.tiny else ():
        if case.id not in quick:
            yield _item(backend, f"suite/{precision} full/{case.id}", case.id, f"{precision} full", (case,), 20.0)


def _cases(precision: str, which: Suite) -> list[Case]:
    own = scope.dtype_scope(precision) == precision
    return [c for c in suite.choose(precision, which, ["ops"]) if own or c.params.get("op") in scope.ops(precision)]


def _op(case: Case) -> str:
    return str(case.params.get("op", case.check))


def _taken(rig: Rig, case: Case) -> bool:
    return not rig.tiny or (_op(case) in TINY and case.check == "op_values")


def _item(backend: Backend, id_: str, row: str, column: str, cases: tuple[Case, ...], seconds: float) -> Item:
    return Item(id_, f"{len(cases)} cases", row, column, functools.partial(_judge, backend, cases), seconds)


def _judge(backend: Backend, cases: Iterable[Case]) -> Record:
    """Raises RuntimeError where the device is lost: a case takes an error of the backend for its answer."""
    session = Session(backend, ROOT)
    verdicts = {case.id: execute.run_here(case, session, references.committed())[1] for case in cases}
    backend.synchronize()
    states = [verdict.state for verdict in verdicts.values()]
    failed = {id_: verdict.reason for id_, verdict in verdicts.items() if verdict.state == "fail"}
    record: Record = {state: states.count(state) for state in ("pass", "fail", "unsupported", "not_run")}
    record |= {"correct": not failed, "failed": {id_: reason[:1000] for id_, reason in failed.items()}}
    for id_, reason in itertools.islice(failed.items(), 1):
        record["why"] = f"{len(failed)} of {len(verdicts)} fail, first {id_}: {reason[:300]}"
    return record


def execution(rig: Rig) -> Iterator[Item]:
    """Captured, fetched and eager steps, bit by bit."""
    yield Item("execution/steps", "captured, fetched, eager", "steps", "bits", lambda: _execution(rig), 40.0)


def _execution(rig: Rig) -> Record:
    if rig.cuda:
        from helios_cuda import CudaBackend

        found = list(check_execution.checks(CudaBackend, "tiny" if rig.tiny else "mini", 128, 128))
    else:  # tries the checks, not the backend
        found = list(check_execution.checks(lambda **_: select("reference"), "tiny", 64, 64))
    wrong = {what: why for what, why in found if why}
    told = "; ".join(f"{what}: {why}" for what, why in wrong.items())
    record: Record = {"checks": [what for what, _ in found], "correct": not wrong}
    return record | ({"why": told[:600]} if wrong else {})
