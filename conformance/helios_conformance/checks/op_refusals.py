"""What must be refused: inputs that an op has no meaning for, and operands that a program did not ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios.backend import PRECISIONS
from helios.errors import HeliosError, OpError
from helios.graph import TensorType
from helios.op import Arg, ErrorCase
from helios.program import EMPTY, Program
from helios_conformance import probes, scope
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Check, Observation, Verdict
from helios_conformance.checks import op_values
from helios_conformance.draws import Root, make_sample
from helios_conformance.one_node import OneNode, types_of
from helios_conformance.op_samples import smallest, values_case
from helios_conformance.references import References
from helios_conformance.session import Session

Raised = dict[str, Any]
"""What a call raised: ``raised`` (name of the class, empty for nothing), ``on_purpose``, ``says``."""


class OpRefuses:
    """Every error case of an op's record is refused with the words that the record promises, in a graph and eagerly."""

    name = "op_refuses"

    def cases(self, precision: str) -> Iterator[Case]:
        for name in scope.ops(precision):
            for error in op.get(name).error_cases():
                params = {"op": name, "error": error.name}
                yield Case(f"{name}[{precision},refuses,{error.name}]", "ops", self.name, precision, params)

    def observe(self, case: Case, session: Session) -> Observation:
        record, error = self._error(case)
        dtype = PRECISIONS[case.precision]
        tensors = make_sample(op.Sample(error.name, error.inputs), dtype, session.root, record.name, error.name)
        types = [_type(arg, dtype) for arg in error.inputs]
        asked = {
            "in_graph": lambda: OneNode.of(record.name, types, error.attrs),
            "on_tensors": lambda: record(*tensors, **error.attrs),
        }
        return Observation(facts={name: _raised(call) for name, call in asked.items()})

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        _, error = self._error(case)
        reasons = []
        for name in ("in_graph", "on_tensors"):
            came = observation.facts.get(name)
            came = came if isinstance(came, Mapping) else {}
            if came.get("raised") != OpError.__name__:
                reasons.append(f"{name}: raised {came.get('raised') or 'nothing'}, wanted an OpError")
            elif error.match not in str(came.get("says")):
                reasons.append(f"{name}: said {came.get('says')!r}, wanted {error.match!r} in it")
        return Verdict("fail" if reasons else "pass", "; ".join(reasons))

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        return {}

    def _error(self, case: Case) -> tuple[op.Op[Any, Any], ErrorCase]:
        record = op.get(case.params["op"])
        return record, next(e for e in record.error_cases() if e.name == case.params["error"])


class OpMisfed:
    """A program that is fed wrongly says so, does not crash, and works as before when it is fed rightly."""

    name = "op_misfed"

    def cases(self, precision: str) -> Iterator[Case]:
        for name in scope.ops(precision):
            sample = smallest(op.get(name))
            if sample is not None:
                params = {"op": name, "sample": sample.name}
                yield Case(f"{name}[{precision},{sample.name},misfed]", "ops", self.name, precision, params)

    def observe(self, case: Case, session: Session) -> Observation:
        values = op_values.inputs(case, session.root)
        node = OneNode.of(values.record.name, types_of(values.tensors), values.attrs)
        program = node.load(session, values.tensors)
        before = probes.on_host(node.run(program, values.tensors))
        mistakes = {name: _raised(call) for name, call in _mistakes(node, program, values.tensors).items()}
        after = probes.on_host(node.run(program, values.tensors))
        facts = {
            "mistakes": mistakes,
            "repeats_equal": all(probes.same_bits(after[name], before[name]) for name in before),
        }
        kept = probes.keep(values_case(case), session, {"": values}, {"": after})
        return Observation(kept, facts, program.coverage.rows())

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        values = op_values.inputs(case, root)
        reasons, judged = probes.judge_values(values_case(case), observation, root, references, {"": values})
        mistakes = observation.facts.get("mistakes")
        for name, words in MISTAKES.items():
            came = mistakes.get(name) if isinstance(mistakes, Mapping) else None
            if not isinstance(came, Mapping):
                reasons.append(f"{words}: it is not said what happened")
            elif came.get("on_purpose") is not True or not came.get("says"):
                reasons.append(f"{words}: raised {came.get('raised') or 'nothing'}, wanted a HeliosError that says why")
        if observation.facts.get("repeats_equal") is not True:
            reasons.append("after it refused, the right operands gave other bits than before")
        return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        return {}  # those of the values


MISTAKES = {
    "shape": "an operand of another shape",
    "missing": "a missing operand",
    "unknown": "an operand that the graph does not have",
    "entry": "an entry that the program does not have",
}
"""What a program is fed, and the words for it."""


def _mistakes(node: OneNode, program: Program, tensors: Any) -> dict[str, Callable[[], Any]]:
    feeds = node.feeds(tensors)
    name = next(iter(feeds))
    longer = torch.cat((feeds[name].reshape(-1), feeds[name].reshape(-1)))
    wrong: dict[str, tuple[str, dict[str, Tensor]]] = {
        "shape": ("main", {**feeds, name: longer}),
        "missing": ("main", {key: tensor for key, tensor in feeds.items() if key != name}),
        "unknown": ("main", {**feeds, "nonsense": feeds[name]}),
        "entry": ("nonsense", feeds),
    }
    return {what: _run(program, *given) for what, given in wrong.items()}


def _run(program: Program, entry: str, feeds: Mapping[str, Tensor]) -> Callable[[], Any]:
    return lambda: program.run(entry, feeds, EMPTY)


def _raised(call: Callable[[], Any]) -> Raised:
    try:
        call()
    except Exception as error:
        says = error.why if isinstance(error, HeliosError) else str(error)
        return {"raised": type(error).__name__, "on_purpose": isinstance(error, HeliosError), "says": says[:500]}
    return {"raised": "", "on_purpose": False, "says": ""}


def _type(arg: Any, dtype: torch.dtype) -> Any:
    if isinstance(arg, tuple):
        return [_type(a, dtype) for a in arg]
    return TensorType(arg.shape, arg.dtype or dtype) if isinstance(arg, Arg) else None


CHECKS: tuple[Check, ...] = (OpRefuses(), OpMisfed())
