"""Cases that can leave this program: inputs and expected outputs as tensors, judged by numbers alone.

Of an op's case these are its two draws of operands; of a scene its weights and the inputs of each call. What surrounds
the numbers (guards, poison, repeats, strides) needs the device at hand and stays behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from helios.graph import Graph, TensorType, dtype_name
from helios_conformance import checks, graph_runs, probes, rows, selection
from helios_conformance.case import Case, Judged, Kept, Observation, Verdict
from helios_conformance.checks import op_values, plan_nodes
from helios_conformance.draws import Root
from helios_conformance.golden import Call, calls_of, golden, working
from helios_conformance.graph_runs import SceneCheck
from helios_conformance.node_values import NodeValues
from helios_conformance.one_node import OneNode, by_name, run_body, types_of, widened
from helios_conformance.references import References

__all__ = ["IMPORTED", "Portable", "judge", "of"]

IMPORTED = "imported"
"""The fact that marks an observation whose outputs came as files."""


class Portable(Protocol):
    """A case as files."""

    def size(self) -> int:
        """Bytes of all inputs, told without drawing any."""
        ...

    def inputs(self) -> dict[str, Tensor]:
        """By name."""
        ...

    def wanted(self) -> dict[str, TensorType]:
        """Types of the outputs that must come back, by name."""
        ...

    def expected(self) -> dict[str, Tensor]:
        """The oracle's outputs in float64, by name."""
        ...

    def about(self) -> dict[str, Any]:
        """What is to be computed, as JSON values."""
        ...

    def graph(self) -> Graph | None:
        """The one graph that computes it, with inputs and outputs under their names; None of more than one node."""
        ...

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, Kept]:
        """Of whole outputs of the right types, the elements that are judged."""
        ...

    def judge(self, observation: Observation, references: References) -> tuple[dict[str, Judged], list[str]]:
        """The numbers, and what is beyond its bound."""
        ...


def of(case: Case, root: Root) -> Portable | None:
    """The portable part of a case; None where it has none."""
    if case.check == op_values.OpValues.name:
        subject = op_values.subject(case, root)
        brief = subject.second is subject.first
        return _Node(case, root, {run: subject.values(run, brief) for run in ("", *([] if brief else ["other"]))})
    if case.check == plan_nodes.PlanNodes.name:
        return _Node(case, root, {"": plan_nodes.inputs(case, root)})
    check = checks.get(case.check)
    return _Scene(case, root, check) if isinstance(check, SceneCheck) else None


def judge(case: Case, observation: Observation, root: Root, references: References) -> Verdict:
    """Judge outputs that came as files."""
    portable = of(case, root)
    if portable is None:
        return Verdict("fail", "no result of this case can be imported")
    if wrong := observation.facts.get("wrong"):
        return Verdict("fail", str(wrong))
    judged, reasons = portable.judge(observation, references)
    return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Node:
    case: Case
    root: Root
    runs: Mapping[str, NodeValues]

    def size(self) -> int:
        return sum(t.nbytes for t in self.inputs().values())

    def inputs(self) -> dict[str, Tensor]:
        return {
            _label(name, run): tensor
            for run, values in self.runs.items()
            for name, tensor in by_name(values.tensors).items()
        }

    def wanted(self) -> dict[str, TensorType]:
        return {_label(name, run): t for run, values in self.runs.items() for name, t in values.outputs.items()}

    def expected(self) -> dict[str, Tensor]:
        return {
            _label(name, run): tensor
            for run, values in self.runs.items()
            for name, tensor in run_body(values.record, *widened(values.tensors, values.attrs)).items()
        }

    def about(self) -> dict[str, Any]:
        values = self.runs[""]
        attrs = {**values.record.attrs, **values.attrs}
        return {
            "op": values.record.name,
            "signature": values.record.dims,
            "operands": [o.name for o in values.record.operands],
            "attributes": {name: _plain(value) for name, value in sorted(attrs.items())},
            "runs": [*self.runs],
        }

    def graph(self) -> Graph | None:
        values = self.runs[""]
        return OneNode.of(values.record.name, types_of(values.tensors), values.attrs, packed=False).graph

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, Kept]:
        found = {}
        for run, values in self.runs.items():
            for name in values.outputs:
                layout = rows.layout(values.record.name, values.tensors, values.attrs, name)
                share = len(values.outputs) * values.share
                tensor = tensors[_label(name, run)]
                found[_label(name, run)] = selection.keep(self.root, self.case.id, name, tensor, layout, share=share)
        return found

    def judge(self, observation: Observation, references: References) -> tuple[dict[str, Judged], list[str]]:
        reasons, judged = probes.judge_values(self.case, observation, self.root, references, self.runs)
        return judged, reasons


def _label(name: str, run: str) -> str:
    return f"{name}@{run}" if run else name


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


class _Scene:
    def __init__(self, case: Case, root: Root, check: SceneCheck) -> None:
        self.case, self.root = case, root
        self.scene, self.dtype = check.scene(case), check.scene(case).dtype(case.precision)
        self.graphs = working(self.scene, case.precision)

    @property
    def calls(self) -> tuple[Call, ...]:
        return calls_of(self.scene, self.root, self.dtype)

    def size(self) -> int:
        return sum({v.name: v.type.nbytes for graph in self.graphs.values() for v in graph.inputs}.values())

    def inputs(self) -> dict[str, Tensor]:
        weights = {v.name: v for graph in self.graphs.values() for v in graph.inputs if not v.rate}
        reader = self.scene.weights(self.dtype)
        found = {f"weights/{name}": reader.read(name).to(value.dtype) for name, value in sorted(weights.items())}
        for call in self.calls:
            found |= {f"{call.name}/{name}": tensor for name, tensor in call.inputs.items()}
            for context, tensors in call.bound.items():
                found |= {f"{context}/{name}": tensor for name, tensor in tensors.items()}
        return found

    def wanted(self) -> dict[str, TensorType]:
        return {name: w.type for name, w in graph_runs.wanted_of(self.scene, self.calls, self.dtype).items()}

    def expected(self) -> dict[str, Tensor]:
        return dict(golden(self.scene, self.root, self.dtype).outputs)

    def about(self) -> dict[str, Any]:
        calls = [
            {
                "name": call.name,
                "graph": call.entry,
                "inputs": {name: f"{call.name}/{name}" for name in call.inputs}
                | {name: f"{context}/{name}" for context, tensors in call.bound.items() for name in tensors},
                "outputs": {name: f"{call.name}.{name}" for name, _ in self.graphs[call.entry].outputs},
            }
            for call in self.calls
        ]
        return {"graphs": {name: str(graph) for name, graph in self.graphs.items()}, "calls": calls}

    def graph(self) -> Graph | None:
        return None

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, Kept]:
        wanted = self.wanted()
        return {name: graph_runs.keep(self.root, self.case, name, tensors[name], len(wanted)) for name in wanted}

    def judge(self, observation: Observation, references: References) -> tuple[dict[str, Judged], list[str]]:
        wanted = graph_runs.wanted_of(self.scene, self.calls, self.dtype)
        oracle = golden(self.scene, self.root, self.dtype).outputs
        return graph_runs.judge_kept(self.case, observation, self.root, references, oracle, wanted)
