"""Ops that only move data."""

from __future__ import annotations

import torch

from helios.errors import GraphError
from helios.export.dim import Size
from helios.export.emitter import Emitter, fixed
from helios.export.forms.table import form
from helios.export.wire import Sizes, Wire

__all__ = ["concat", "expand", "full", "narrow", "pad_replicate", "permute", "reshape", "split_heads", "unbind"]


@form
def reshape(e: Emitter, x: Wire, *, shape: Sizes) -> Wire:
    return e.reshape(x, e.expected[0])


@form
def split_heads(e: Emitter, x: Wire, *, heads: int) -> Wire:
    return e.reshape(x, e.expected[0])


@form
def permute(e: Emitter, x: Wire, *, dims: tuple[int, ...]) -> Wire:
    return e.transpose(x, dims)


@form
def narrow(e: Emitter, x: Wire, *, dim: int, start: Size, length: Size) -> Wire:
    return e.slice(x, dim % x.rank, start, start + length)


@form
def concat(e: Emitter, xs: tuple[Wire, ...], *, dim: int) -> Wire:
    return e.concat(xs, dim % xs[0].rank)


@form
def unbind(e: Emitter, x: Wire, *, dim: int) -> tuple[Wire, ...]:
    axis = dim % x.rank
    count = fixed(x.sizes[axis])
    one = (*x.sizes[:axis], 1, *x.sizes[axis + 1 :])
    parts = e.ops("Split", x, e.ints([1] * count), outputs=[(x.dtype, one)] * count, axis=axis)
    rest = (*x.sizes[:axis], *x.sizes[axis + 1 :])
    return tuple(e.op("Squeeze", part, e.ints([axis]), sizes=rest) for part in parts)


@form
def expand(e: Emitter, x: Wire, *, shape: Sizes) -> Wire:
    return e.expand(x, e.expected[0])


@form
def full(e: Emitter, *, shape: Sizes, value: float, dtype: torch.dtype) -> Wire:
    return e.expand(e.constant(torch.full((1,) * len(shape), value, dtype=dtype)), shape)


@form
def pad_replicate(e: Emitter, x: Wire, *, multiple: tuple[int, ...]) -> Wire:
    if x.sizes == e.expected[0]:
        return x
    missing = [after - before for after, before in zip(e.expected[0], x.sizes, strict=True)]
    if not all(isinstance(size, int) for size in missing):
        raise GraphError(
            f"pad_replicate of {list(map(str, x.sizes))}: how much is missing depends on the size in no regular way",
            fix="choose sizes that need no padding: multiples of 64 pixels",
        )
    return e.op("Pad", x, e.ints([0] * x.rank + missing), sizes=e.expected[0], mode="edge")
