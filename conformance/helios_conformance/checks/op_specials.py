"""NaN and infinities in one element of an operand, and indices beyond 2³¹."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios.op import Sample
from helios_conformance import budget, probes, rows, scope, selection, terms
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Check, Judged, Kept, Observation, Verdict
from helios_conformance.checks import op_values
from helios_conformance.checks.op_large import OpLarge
from helios_conformance.draws import Root
from helios_conformance.node_values import NodeValues
from helios_conformance.one_node import OneNode, run_body, types_of, widened
from helios_conformance.op_samples import smallest, values_case
from helios_conformance.references import References
from helios_conformance.session import Session

PLANTED = {"nan": float("nan"), "inf": float("inf")}
_TRIES = 16


class OpSpecials:
    """A NaN or +∞ in one element of each floating operand in turn; run ``i0`` has it in operand ``i0``.

    Attention takes its odd sample: with fewer keys than a vector has lanes, torch's own on the CPU loses a NaN
    of a query, and so would an oracle made of it. An infinity is planted in its values only: an infinite score makes
    softmax ∞ − ∞, where right kernels differ (torch's gives numbers in bfloat16 and NaN in float32).

    Where the oracle is NaN the result must be, where it is infinite the result must not be finite, where it is finite
    the result must be, and within budget. Of an engine this is a report: its level ops is diagnostic, nothing more.
    """

    name = "op_specials"

    def cases(self, precision: str) -> Iterator[Case]:
        if precision != scope.dtype_scope(precision):
            return  # e4m3 has no infinity, and a NaN may spoil the row that is quantised with it
        for name in scope.ops(precision):
            sample = _sample(op.get(name))
            for value in PLANTED if sample is not None else ():
                params = {"op": name, "sample": sample.name, "value": value}  # type: ignore[union-attr]
                label = f"{name}[{precision},{params['sample']},{value}]"
                yield Case(label, "ops", self.name, precision, params)

    def observe(self, case: Case, session: Session) -> Observation:
        kept: dict[str, Kept] = {}
        plants = planted(case, session.root)
        for run, values in plants.items():
            node = OneNode.of(values.record.name, types_of(values.tensors), values.attrs)
            program = node.load(session, values.tensors)
            outputs = probes.on_host(node.run(program, values.tensors))
            kept |= probes.keep(values_case(case), session, {run: values}, {run: outputs})
        return Observation(kept, {"engine": session.is_engine(program)}, program.coverage.rows())

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        clean = op_values.inputs(case, root)
        reasons: list[str] = []
        judged: dict[str, Judged] = {}
        plants = planted(case, root)
        wanted = {f"{name}@{run}" for run in plants for name in clean.outputs}
        if wanted != set(observation.outputs):
            reasons.append(f"outputs are {sorted(observation.outputs)}, wanted {sorted(wanted)}")
        for run, values in plants.items():
            for name in clean.outputs:
                if (kept := observation.outputs.get(f"{name}@{run}")) is not None:
                    wrong, numbers = _judge(case, name, kept, clean, values, root, references)
                    reasons += [f"{name}, {case.params['value']} in {run}: {line}" for line in wrong]
                    judged |= {f"{name}@{run}": numbers} if numbers is not None else {}
        return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        return {}  # those of the values


def _sample(record: op.Op[Any, Any]) -> Sample | None:
    if record.name == "attention":
        return next(sample for sample in record.samples() if sample.name == "odd")
    return smallest(record)


def planted(case: Case, root: Root) -> dict[str, NodeValues]:
    """The operands with the plant, by the name of the operand that has it."""
    clean = op_values.inputs(case, root)
    values_only = case.params["op"] == "attention" and case.params["value"] == "inf"
    places = [
        (i, j)
        for i, x in enumerate(clean.tensors)
        for j, t in enumerate(x if isinstance(x, list) else [x])
        if isinstance(t, Tensor) and t.is_floating_point() and t.numel() and (i == 2 or not values_only)
    ]
    return {_name(clean, i, j): _plant(case, root, clean, i, j, len(places)) for i, j in places}


def _name(values: NodeValues, i: int, j: int) -> str:
    return f"i{i}.{j}" if isinstance(values.tensors[i], list) else f"i{i}"


def _plant(case: Case, root: Root, clean: NodeValues, i: int, j: int, share: int) -> NodeValues:
    """One operand changed in one place: the first that is drawn from which something reaches an output, if any does."""
    made = clean
    for attempt in range(_TRIES):
        key = root.key("plant", case.params["op"], case.params["sample"], case.params["value"], i, j, attempt)
        tensors: list[Any] = [list(x) if isinstance(x, list) else x for x in clean.tensors]
        holder, at = (tensors[i], j) if isinstance(tensors[i], list) else (tensors, i)
        changed: Tensor = holder[at].clone()
        _set(_places(case.params["op"], i, changed), key, PLANTED[case.params["value"]])
        holder[at] = changed
        made = NodeValues(clean.record, tensors, clean.attrs, share)
        if any(not t.isfinite().all() for t in _oracle(made).values()):
            break
    return made


def _places(name: str, operand: int, tensor: Tensor) -> Tensor:
    """Where to plant: a view of the operand. Of a filter only the middle, which meets no padding on either side: a
    kernel may multiply by padding or skip it."""
    if name == "conv3d" and operand == 1:
        t, h, w = (size // 2 for size in tensor.shape[2:])
        return tensor[:, :, t, h, w]
    return tensor


def _set(places: Tensor, key: int, number: float) -> None:
    places[np.unravel_index(key % places.numel(), tuple(places.shape))] = number


def _oracle(values: NodeValues) -> dict[str, Tensor]:
    return run_body(values.record, *widened(values.tensors, values.attrs))


def _judge(
    case: Case, name: str, kept: Kept, clean: NodeValues, values: NodeValues, root: Root, references: References
) -> tuple[list[str], Judged | None]:
    """One output of one plant."""
    wrong, take = _taker(case, name, kept, values, root)
    if wrong:
        return wrong, None
    oracle = take(_oracle(values))
    wrong = _propagation(kept.values, oracle)
    if values.record.kind == "move":
        right = take(run_body(values.record, values.tensors, values.attrs))
        return wrong or ([] if budget.exact(kept.values, right) else ["data movement must be exact"]), None
    # What the plant reached counts as right, so that the rest is judged on the scale of a whole output.
    ordinary = take(_oracle(clean))
    reached = ~oracle.isfinite()
    y = torch.where(reached, ordinary.to(kept.values.dtype), kept.values)
    o = torch.where(reached, ordinary, oracle)
    errors, reference = budget.measure(y, o), references.get(values_case(case).id, name)
    longest = terms.of_tensors(clean.record, clean.tensors, clean.attrs)
    shared = terms.factors(clean.record, clean.tensors)
    allowed = budget.allowed(clean.record.kind, y.dtype, longest, o, reference, shared)
    return wrong or budget.exceeded(errors, allowed), Judged(errors, allowed, reference)


def _taker(
    case: Case, name: str, kept: Kept, values: NodeValues, root: Root
) -> tuple[list[str], Callable[[Mapping[str, Tensor]], Tensor]]:
    """What is wrong with the output's type, and how the kept elements are taken from a whole one."""
    types = values.outputs
    shape, dtype = types[name].shape, types[name].dtype
    layout = rows.layout(values.record.name, values.tensors, values.attrs, name)
    share = len(types) * values.share
    label = values_case(case).id
    chosen = selection.selection(root, label, name, shape, dtype, kept.digest, layout, share=share)

    def take(outputs: Mapping[str, Tensor]) -> Tensor:
        return chosen.take(selection.as_matrix(outputs[name], layout))

    if misfit := kept.misfit(shape, dtype):
        return [f"it is {misfit}"], take
    count, wanted = kept.values.numel(), chosen.count(math.prod(shape))
    return [f"{count} elements were kept, the selection takes {wanted}"] if count != wanted else [], take


def _propagation(result: Tensor, oracle: Tensor) -> list[str]:
    """What became of the plant otherwise than in the oracle."""
    lines = []
    for words, where, bad in (
        ("is NaN", oracle.isnan(), ~result.isnan()),
        ("is infinite", oracle.isinf(), result.isfinite()),
        ("is finite", oracle.isfinite(), ~result.isfinite()),
    ):
        if count := int((where & bad).sum()):
            came = "is not finite" if words == "is finite" else "is a number" if words == "is NaN" else "is finite"
            lines.append(f"where the oracle {words}, the result {came} at {count} of {int(where.sum())} kept elements")
    return lines


CHECKS: tuple[Check, ...] = (OpSpecials(), OpLarge())
