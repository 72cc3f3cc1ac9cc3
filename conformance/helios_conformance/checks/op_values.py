"""Every op, dtype and sample through a one-node graph, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios.backend import PRECISIONS
from helios.op import Sample
from helios_conformance import budget, selection
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Check, Judged, Observation, Verdict
from helios_conformance.draws import Root, make_sample
from helios_conformance.one_node import OneNode, run_body, types_of, widened
from helios_conformance.references import References
from helios_conformance.session import Session


class OpValues:
    """One op on one sample."""

    name = "op_values"

    def cases(self, precision: str) -> Iterator[Case]:
        for name in op.names():
            for sample in op.get(name).samples():
                if not sample.big:
                    params = {"op": name, "sample": sample.name}
                    yield Case(f"{name}[{precision},{sample.name}]", "ops", self.name, precision, params)

    def observe(self, case: Case, session: Session) -> Observation:
        sample, tensors = self._inputs(case, session.root)
        node = OneNode.of(case.params["op"], types_of(tensors), sample.attrs)
        program = node.load(session, tensors)
        result = node.run(program, tensors)
        kept = {
            name: selection.keep(session.root, case.id, name, session.to_host(tensor), share=len(result))
            for name, tensor in result.items()
        }
        return Observation(kept, {}, program.coverage.rows())

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        sample, tensors = self._inputs(case, root)
        record = op.get(case.params["op"])
        oracle = run_body(record, *widened(tensors, sample.attrs))
        judged, reasons = {}, []
        for name, kept in observation.outputs.items():
            chosen = selection.selection(
                root, case.id, name, kept.shape, kept.values.dtype, kept.digest, share=len(observation.outputs)
            )
            wanted = chosen.take(selection.as_matrix(oracle[name]))
            errors = budget.measure(kept.values, wanted)
            reference = references.get(case.id, name)
            allowed = budget.bounds(record.kind, kept.values.dtype, 1, errors.count, reference)
            judged[name] = Judged(errors, allowed, reference)
            reasons += [f"{name}: {line}" for line in budget.exceeded(errors, allowed)]
        return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        sample, tensors = self._inputs(case, root)
        record = op.get(case.params["op"])
        oracle = run_body(record, *widened(tensors, sample.attrs))
        came = run_body(record, tensors, sample.attrs)
        return {name: budget.measure(came[name], oracle[name]) for name in oracle}

    def _inputs(self, case: Case, root: Root) -> tuple[Sample, list[Any]]:
        sample = next(s for s in op.get(case.params["op"]).samples() if s.name == case.params["sample"])
        # The same draws in every precision: what differs is the rounding.
        return sample, make_sample(sample, PRECISIONS[case.precision], root, case.params["op"], sample.name)


CHECKS: tuple[Check, ...] = (OpValues(),)
