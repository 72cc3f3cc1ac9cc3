"""The nodes of the lowered plans of the published size: the very shapes, dtypes and attributes of a run at 384 × 640.

Listed by ``plan_list``, without those that a sample of their op covers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios.graph import TensorType
from helios.op import Arg
from helios_conformance import plan_list, probes
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Check, Observation, Verdict
from helios_conformance.draws import Root, make_arg
from helios_conformance.node_values import NodeValues
from helios_conformance.probes import Subject
from helios_conformance.references import References
from helios_conformance.session import Session


class PlanNodes:
    """One node of the lowered plans."""

    name = "plan_nodes"

    def cases(self, precision: str) -> Iterator[Case]:
        for label in plan_list.committed()[precision]:
            params = {"node": label}
            yield Case(f"plan[{precision},{label}]", "ops", self.name, precision, params, "full", timeout=600.0)

    def observe(self, case: Case, session: Session) -> Observation:
        return probes.observe(case, session, _subject(case, session.root), brief=True)

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        return probes.judge(case, observation, root, references, _subject(case, root), brief=True)

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        return inputs(case, root).reference(case, root)


def _subject(case: Case, root: Root) -> Subject:
    given = inputs(case, root)
    return Subject(given.record.name, given.attrs, given.tensors, given.tensors)


def inputs(case: Case, root: Root) -> NodeValues:
    """The node of a case and its operands."""
    label = str(case.params["node"])
    shape = plan_list.shape(case.precision, label)
    record = op.get(shape.op)

    def make(operand: str, type_: Any, *where: int) -> Any:
        if isinstance(type_, tuple):
            return [make(operand, t, *where, i) for i, t in enumerate(type_)]
        if type_ is None:
            return None
        return make_arg(describe(operand, type_), type_.dtype, root.key("plan", label, *where))

    tensors = [make(o.name, t, i) for i, (o, t) in enumerate(zip(record.operands, shape.types, strict=True))]
    return NodeValues(record, tensors, dict(shape.attrs))


_MATRICES = frozenset({"weight", "wq", "wk", "wv"})
_GAINS = frozenset({"weight", "q_weight", "k_weight", "gamma"})
_BIASES = frozenset({"bias", "bq", "bk", "bv"})
_ROWS = frozenset({"scale", "shift", "gate"})


def describe(operand: str, type_: TensorType) -> Arg:
    """How an operand of that name is drawn: of the size that it has in the network."""
    shape, dtype = type_.shape, type_.dtype
    if operand == "table":
        return Arg(shape, "table", dtype)
    if operand in ("coeffs", "t"):
        return Arg(shape, "uniform", dtype, scale=999.0 if operand == "t" else 1.0)
    if operand.endswith("_scale"):
        return Arg(shape, "uniform", dtype, scale=0.02, offset=0.005)
    if dtype == torch.float8_e4m3fn:
        return Arg(shape, dtype=dtype, scale=80.0)
    if operand in _MATRICES and len(shape) > 1:
        return Arg(shape, dtype=dtype, scale=math.prod(shape[1:]) ** -0.5)
    if operand in _GAINS:
        return Arg(shape, dtype=dtype, scale=0.1, offset=1.0)
    if operand in _BIASES:
        return Arg(shape, dtype=dtype, scale=0.1)
    if operand in _ROWS:
        return Arg(shape, dtype=dtype, scale=0.3)
    return Arg(shape, "outliers" if len(shape) == 3 else "normal", dtype)  # tokens have outlier channels


CHECKS: tuple[Check, ...] = (PlanNodes(),)
