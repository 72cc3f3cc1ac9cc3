"""Every op, dtype and sample through a one-node graph, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios.backend import PRECISIONS
from helios.op import Sample
from helios_conformance import probes, scope
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Check, Observation, Suite, Verdict
from helios_conformance.draws import Root, make_sample
from helios_conformance.node_values import NodeValues
from helios_conformance.probes import Subject
from helios_conformance.references import References
from helios_conformance.session import Session


class OpValues:
    """One op on one sample."""

    name = "op_values"

    def cases(self, precision: str) -> Iterator[Case]:
        for name in scope.ops(precision):
            for sample in op.get(name).samples():
                if precision == "fp16" and sample.name == "huge":
                    continue  # its numbers are beyond 65504
                params = {"op": name, "sample": sample.name}
                suite: Suite = "full" if sample.big else "quick"
                label, timeout = f"{name}[{precision},{sample.name}]", 600.0 if sample.big else 120.0
                yield Case(label, "ops", self.name, precision, params, suite, timeout=timeout)

    def observe(self, case: Case, session: Session) -> Observation:
        return probes.observe(case, session, subject(case, session.root), brief=_brief(case))

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        return probes.judge(case, observation, root, references, subject(case, root), brief=_brief(case))

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        return inputs(case, root).reference(case, root)


def inputs(case: Case, root: Root, *labels: str) -> NodeValues:
    """The node of a case and its operands; labels are for other draws of them."""
    record = op.get(case.params["op"])
    sample = _sample(case)
    # The same draws in every precision: what differs is the rounding.
    tensors = make_sample(sample, PRECISIONS[case.precision], root, record.name, sample.name, *labels)
    return NodeValues(record, tensors, sample.attrs)


def subject(case: Case, root: Root) -> Subject:
    """The same with a second draw of the operands."""
    given = inputs(case, root)
    second = given.tensors if _brief(case) else inputs(case, root, "other").tensors
    return Subject(given.record.name, given.attrs, given.tensors, second)


def _brief(case: Case) -> bool:
    """Large operands are run once."""
    return _sample(case).big


def _sample(case: Case) -> Sample:
    return next(s for s in op.get(case.params["op"]).samples() if s.name == case.params["sample"])


CHECKS: tuple[Check, ...] = (OpValues(),)
