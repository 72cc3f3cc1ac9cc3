"""An op as a graph of one node, and its oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from helios import op
from helios.graph import Builder, Graph, Rate, TensorType, Value
from helios.program import EMPTY, Program
from helios_conformance.session import Session

__all__ = ["WEIGHTS", "OneNode", "by_name", "outputs_of", "run_body", "types_of", "widened"]

WEIGHTS = frozenset({"weight", "bias", "gamma", "wq", "wk", "wv", "bq", "bk", "bv", "q_weight", "k_weight"})
"""Operands that are weights in every Helios graph: given at that rate, so that kernels that pack them do so."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class OneNode:
    """A graph of one node of an op, and where each operand enters.

    Attributes:
        graph: with inputs ``i0``, ``i1`` … (``i2.0``, ``i2.1`` of a list) and outputs ``o0``, ``o1`` …
        record: the op.
        attrs: of the node.
    """

    graph: Graph
    record: op.Op[Any, Any]
    attrs: Mapping[str, Any]

    @staticmethod
    def of(name: str, types: Sequence[Any], attrs: Mapping[str, Any], *, packed: bool = True) -> OneNode:
        """Build it.

        Args:
            name: of the op.
            types: of the operands: TensorType, a list of them, or None.
            attrs: of the node.
            packed: weights enter at rate weights; otherwise everything changes with each step.
        """
        record = op.get(name)
        with Builder(name) as build:

            def enter(label: str, type_: TensorType, rate: Rate) -> Value:
                return build.input(label, type_.shape, type_.dtype, rate)

            operands: list[Any] = []
            for i, (operand, type_) in enumerate(zip(record.operands, types, strict=True)):
                rate = Rate.WEIGHTS if packed and operand.name in WEIGHTS else Rate.STEP
                if isinstance(type_, list):
                    operands.append([enter(f"i{i}.{j}", t, rate) for j, t in enumerate(type_)])
                else:
                    operands.append(None if type_ is None else enter(f"i{i}", type_, rate))
            results = record(*operands, **attrs)
            for i, value in enumerate(results if isinstance(results, tuple) else (results,)):
                build.output(f"o{i}", value)
        return OneNode(build.graph(), record, dict(attrs))

    def load(self, session: Session, tensors: Sequence[Any]) -> Program:
        """Lowered on the device, with the weights among these operands loaded."""
        program = session.lower({"main": self.graph})
        program.load(_Given(by_name(tensors)))
        return program

    def run(self, program: Program, tensors: Sequence[Any]) -> dict[str, Tensor]:
        """One step; the outputs on the device. Operands that are on the device already are not copied."""
        return program.run("main", self.feeds(tensors), EMPTY)

    def feeds(self, tensors: Sequence[Any]) -> dict[str, Tensor]:
        """The operands that change with each step, by the names of the graph's inputs."""
        steps = {v.name for v in self.graph.inputs_at(Rate.STEP)}
        return {n: t for n, t in by_name(tensors).items() if n in steps}


@dataclasses.dataclass(frozen=True, slots=True)
class _Given:
    tensors: Mapping[str, Tensor]

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def by_name(tensors: Sequence[Any]) -> dict[str, Tensor]:
    """Operands that are there: ``i0``, ``i1`` …, of a list ``i0.0``, ``i0.1`` …"""
    named: dict[str, Tensor] = {}
    for i, x in enumerate(tensors):
        if isinstance(x, list | tuple):
            named |= {f"i{i}.{j}": t for j, t in enumerate(x)}
        elif x is not None:
            named[f"i{i}"] = x
    return named


def types_of(tensors: Sequence[Any]) -> list[Any]:
    """Types of operands, as ``OneNode.of`` takes them."""
    return [
        types_of(x) if isinstance(x, list | tuple) else None if x is None else TensorType(tuple(x.shape), x.dtype)
        for x in tensors
    ]


def run_body(record: op.Op[Any, Any], tensors: Sequence[Any], attrs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The body on host tensors: in float64 the oracle, in the working dtype the reference."""
    with torch.no_grad():
        return outputs_of(record.fn(*tensors, **attrs))


def outputs_of(result: Any) -> dict[str, Tensor]:
    """What an op returned, by name: ``o0``, ``o1`` …"""
    return {f"o{i}": t for i, t in enumerate(result if isinstance(result, tuple | list) else (result,))}


def widened(tensors: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Operands and attributes of the oracle: every floating tensor and every floating dtype becomes float64."""

    def tensor(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return [tensor(t) for t in x]
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    def attr(value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    return [tensor(x) for x in tensors], {name: attr(value) for name, value in attrs.items()}
