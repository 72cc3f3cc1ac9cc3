"""K of the error budget: how many terms the longest sum of an op has, or as many as its condition counts for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from helios import op
from helios.graph import Node
from helios_conformance.one_node import OneNode, types_of

__all__ = ["LONGEST", "factors", "narrow_sums", "of_tensors", "terms"]

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
    "scaled_attention": lambda x: max(x[2][1], x[0][3]),
    "scaled_linear": lambda x: x[2][1],
}
"""Every op of kind ``reduce``. A fused op has the largest of its composition."""


def terms(record: op.Op[Any, Any], types: Sequence[Any], attrs: Mapping[str, Any]) -> int:
    """K of an op on operands of these types, as ``OneNode.of`` takes them; 1 where nothing is summed."""
    if record.kind in ("move", "round"):
        return 1
    (node,) = OneNode.of(record.name, types, attrs).graph.nodes
    return _of_node(node)


def of_tensors(record: op.Op[Any, Any], tensors: Sequence[Any], attrs: Mapping[str, Any]) -> int:
    """The same for operands, of which those of attention and of the timestep count by their values too.

    An absolute error of a score is a relative error of its probability. A score is a sum of d terms; where an early one
    is large, each of the d roundings is of that size: √d/2 times the sum of the sizes of its terms is the root of K.
    """
    k = terms(record, types_of(tensors), attrs)
    if record.name == "timestep_embedding":  # an angle errs by its size times the error of its frequency
        return max(k, math.ceil(float(tensors[0].abs().max()) ** 2))
    if record.name == "attention":
        score = _largest_score(tensors[0], tensors[1], attrs.get("scale"))
        return max(k, math.ceil(int(tensors[0].shape[3]) * score**2 / 4))
    return max(k, _CHAINED.get(record.name, 1))


def factors(record: op.Op[Any, Any], tensors: Sequence[Any]) -> int | None:
    """How many numbers are computed first and then multiply many elements, whose errors they share; None: no such."""
    at = _FACTORS.get(record.name)
    return None if at is None else int(tensors[at].numel())


_FACTORS: Mapping[str, int] = {
    "adaln": 1,
    "gated_add_adaln": 3,
    "modulate": 1,
    "scale_history_keys": 1,
}
"""Operand of which each element becomes a factor: ``1 + scale``, or a function of the logit."""

_CHAINED: Mapping[str, int] = {"scale_history_keys": 9}
"""K where roundings follow one another in one number: a sigmoid, a product and a sum, at most u each."""


def narrow_sums(record: op.Op[Any, Any]) -> bool:
    """Whether a right kernel may sum with fewer bits than float32 has: tensor cores add products of e4m3 numbers with
    about 14 bits, and promote such sums to float32 every 128 terms. Then some elements round to the other neighbour."""
    return record.name in _NARROW


_NARROW = frozenset(
    {"quantized_attention", "quantized_linear", "quantized_qkv_linear", "scaled_attention", "scaled_linear"}
)

_ROWS, _HEADS = 64, 4


def _largest_score(q: Tensor, k: Tensor, scale: float | None) -> float:
    """Σ|q·k|·scale, the largest over some queries of some heads and all their keys."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    step = max(1, q.shape[1] // _ROWS)
    some = q[:, ::step, :_HEADS].double().abs().transpose(1, 2)
    keys = k[:, :, :_HEADS].double().abs().transpose(1, 2)
    return float((some @ keys.transpose(-1, -2)).max()) * abs(float(factor))


def _of_node(node: Node) -> int:
    record = op.get(node.op)
    if record.kind == "fused":
        return max(_of_node(inner) for inner in op.expand(node).nodes)
    if record.kind != "reduce":
        return 1
    return max(1, LONGEST[node.op]([None if x is None else x.shape for x in node.inputs]))  # type: ignore[union-attr]
