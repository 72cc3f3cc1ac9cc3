"""Elementwise ops."""

from __future__ import annotations

import math

import torch

from helios.export.dim import Size
from helios.export.emitter import Emitter
from helios.export.forms.table import form
from helios.export.wire import Wire

__all__ = ["add", "cast", "gelu", "scale_history_keys", "silu"]

GELU = 20
"""The opset that brought Gelu."""


@form
def add(e: Emitter, x: Wire, y: Wire) -> Wire:
    wider = torch.promote_types(x.dtype, y.dtype)
    return e.op("Add", e.cast(x, wider), e.cast(y, wider))


@form
def cast(e: Emitter, x: Wire, *, dtype: torch.dtype) -> Wire:
    return e.cast(x, dtype)


@form
def silu(e: Emitter, x: Wire) -> Wire:
    wide = e.wide(x)
    return e.cast(e.op("Mul", wide, e.op("Sigmoid", wide)), x.dtype)


@form
def gelu(e: Emitter, x: Wire) -> Wire:
    wide = e.wide(x)
    if e.options.opset >= GELU:
        return e.cast(e.op("Gelu", wide, approximate="tanh"), x.dtype)
    cube = e.op("Mul", e.op("Mul", wide, wide), wide)
    inner = e.op("Add", wide, e.op("Mul", cube, e.number(0.044715, wide)))
    bent = e.op("Tanh", e.op("Mul", inner, e.number(math.sqrt(2.0 / math.pi), wide)))
    half = e.op("Mul", wide, e.number(0.5, wide))
    return e.cast(e.op("Mul", half, e.op("Add", bent, e.number(1.0, wide))), x.dtype)


@form
def scale_history_keys(e: Emitter, k: Wire, logit: Wire, *, split: Size, gain: float) -> Wire:
    if split == 0:
        return k
    head, tail = e.wide(e.slice(k, 1, 0, split)), e.slice(k, 1, split, k.sizes[1])
    gate = e.op("Sigmoid", e.cast(logit, head.dtype))
    factor = e.op("Add", e.op("Mul", gate, e.number(gain - 1.0, head)), e.number(1.0, head))
    scaled = e.cast(e.op("Mul", head, e.reshape(factor, (factor.sizes[0], 1))), k.dtype)
    return scaled if split == k.sizes[1] else e.concat([scaled, tail], 1)
