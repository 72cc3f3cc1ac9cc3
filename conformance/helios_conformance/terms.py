"""K of the error budget: how many terms the longest sum of an op has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from helios import op
from helios.graph import Node
from helios_conformance.one_node import OneNode, types_of

__all__ = ["LONGEST", "terms"]

Count = Callable[[Sequence[Any]], int]
"""From the shapes of the operands (``None`` for an absent one) to the number of terms."""

LONGEST: Mapping[str, Count] = {
    "attention": lambda x: max(x[1][1], x[0][3]),  # keys for the softmax and its product, head size for the scores
    "block_noise": lambda x: x[0][5],
    "cfg_zero_star": lambda x: math.prod(x[0][1:]),
    "channel_norm": lambda x: x[0][1],
    "conv3d": lambda x: math.prod(x[1][1:]),
    "downsample_noise": lambda x: 4,
    "layer_norm": lambda x: x[0][2],
    "linear": lambda x: x[1][1],
    "patch_embed": lambda x: math.prod(x[1][1:]),
    "rms_norm": lambda x: x[0][2],
}
"""Every op of kind ``reduce``. A fused op has the largest of its composition."""


def terms(record: op.Op[Any, Any], types: Sequence[Any], attrs: Mapping[str, Any]) -> int:
    """K of an op on operands of these types, as ``OneNode.of`` takes them; 1 where nothing is summed."""
    if record.kind in ("move", "round"):
        return 1
    (node,) = OneNode.of(record.name, types, attrs).graph.nodes
    return _of_node(node)


def of_tensors(record: op.Op[Any, Any], tensors: Sequence[Any], attrs: Mapping[str, Any]) -> int:
    """The same for operands."""
    return terms(record, types_of(tensors), attrs)


def _of_node(node: Node) -> int:
    record = op.get(node.op)
    if record.kind == "fused":
        return max(_of_node(inner) for inner in op.expand(node).nodes)
    if record.kind != "reduce":
        return 1
    return max(1, LONGEST[node.op]([None if x is None else x.shape for x in node.inputs]))  # type: ignore[union-attr]
