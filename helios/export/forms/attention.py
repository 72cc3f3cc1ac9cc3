"""Softmax attention."""

from __future__ import annotations

import math

import torch

from helios.export.emitter import Emitter, fixed
from helios.export.forms.table import form
from helios.export.wire import Wire
from helios.op import accumulator

__all__ = ["attention"]

ATTENTION = 23
"""The opset that brought Attention."""


@form
def attention(e: Emitter, q: Wire, k: Wire, v: Wire, *, scale: float | None) -> Wire:
    """In float32 throughout unless the engine is trusted to accumulate so by itself (``Options.wide_attention``)."""
    wide = accumulator(q.dtype) if e.options.wide_attention else q.dtype
    operands = [e.cast(x, wide) for x in (q, k, v)]
    factor = fixed(q.sizes[3]) ** -0.5 if scale is None else scale
    whole = e.options.opset >= ATTENTION
    made = _whole(e, *operands, scale=factor) if whole else _in_parts(e, *operands, scale=factor)
    return e.cast(made, q.dtype)


def _whole(e: Emitter, q: Wire, k: Wire, v: Wire, *, scale: float) -> Wire:
    """Heads beside each other in the last dimension, as they come: nothing is transposed outside the op."""
    b, s, h, d = q.sizes
    flat = [e.reshape(x, (*x.sizes[:2], h * d)) for x in (q, k, v)]
    # 1: the softmax in float32, whatever the dtype.
    precision = None if q.dtype in (torch.float32, torch.float64) else 1
    made = e.op(
        "Attention", *flat, sizes=(b, s, h * d), q_num_heads=h, kv_num_heads=h, scale=scale, softmax_precision=precision
    )
    return e.reshape(made, (b, s, h, d))


def _in_parts(e: Emitter, q: Wire, k: Wire, v: Wire, *, scale: float) -> Wire:
    b, s, h, d = q.sizes
    t = k.sizes[1]
    # Half of the scale on each side: a product of unscaled numbers may overflow where theirs does not.
    root = e.number(math.sqrt(scale), q)
    queries = e.op("Mul", e.transpose(q, (0, 2, 1, 3)), root)
    keys = e.op("Mul", e.transpose(k, (0, 2, 3, 1)), root)
    scores = e.wide(e.op("MatMul", queries, keys, sizes=(b, h, s, t)))
    shares = e.cast(e.op("Softmax", scores, axis=-1), v.dtype)
    made = e.op("MatMul", shares, e.transpose(v, (0, 2, 1, 3)), sizes=(b, h, s, d))
    return e.transpose(made, (0, 2, 1, 3))
