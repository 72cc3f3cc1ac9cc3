"""Which sample of an op stands for it where one is enough."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from helios import op
from helios.op import Arg, Sample
from helios_conformance.case import Case
from helios_conformance.one_node import OneNode, types_of

__all__ = ["largest", "smallest", "values_case"]

_FLOPS = 100_000_000


def smallest(record: op.Op[Any, Any]) -> Sample | None:
    """The first sample, which is small and plain; None for an op without operands, which is computed once, at load."""
    samples = _ordinary(record)
    return samples[0] if samples else None


def largest(record: op.Op[Any, Any]) -> Sample | None:
    """The one with the most elements among those that can be run a hundred times."""
    return max((s for s in _ordinary(record) if _flops(record, s) <= _FLOPS), key=_elements, default=None)


def values_case(case: Case) -> Case:
    """The case that judges the numbers of the same op, sample and draws: the reference errors are its own."""
    name, sample = case.params["op"], case.params["sample"]
    return dataclasses.replace(case, id=f"{name}[{case.precision},{sample}]")


def _ordinary(record: op.Op[Any, Any]) -> list[Sample]:
    return [sample for sample in record.samples() if not sample.big and sample.inputs]


def _flops(record: op.Op[Any, Any], sample: Sample) -> int:
    types = types_of([_meta(arg) for arg in sample.inputs])
    (node,) = OneNode.of(record.name, types, sample.attrs).graph.nodes
    return op.cost(node).flops


def _meta(arg: Any) -> Any:
    if isinstance(arg, tuple):
        return [_meta(a) for a in arg]
    return None if arg is None else torch.empty(arg.shape, dtype=arg.dtype or torch.float32, device="meta")


def _elements(sample: Sample) -> int:
    args = [a for arg in sample.inputs for a in (arg if isinstance(arg, tuple) else (arg,))]
    return sum(math.prod(arg.shape) for arg in args if isinstance(arg, Arg))
