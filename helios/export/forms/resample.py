"""Between the stages of the pyramid."""

from __future__ import annotations

import torch

from helios.export.emitter import Emitter
from helios.export.forms.table import form
from helios.export.wire import Wire
from helios.ops.resample import block_factor

__all__ = ["block_noise", "downsample_noise", "upsample_nearest2"]


@form
def downsample_noise(e: Emitter, x: Wire) -> Wire:
    b, c, t, h, w = x.sizes
    patches = e.reshape(e.wide(x), (b, c, t, h // 2, 2, w // 2, 2))
    total = e.reduce("ReduceSum", patches, [4, 6], keep=False)
    return e.cast(e.op("Mul", total, e.number(0.5, total)), x.dtype)


@form
def upsample_nearest2(e: Emitter, x: Wire) -> Wire:
    b, c, t, h, w = x.sizes
    twice = e.expand(e.reshape(x, (b, c, t, h, 1, w, 1)), (b, c, t, h, 2, w, 2))
    return e.reshape(twice, e.expected[0])


@form
def block_noise(e: Emitter, z: Wire, *, gamma: float) -> Wire:
    wide = e.wide(z)
    b, c, t, h, w, _ = z.sizes
    factor = torch.tensor(block_factor(gamma), dtype=wide.dtype).T
    mixed = e.op("MatMul", wide, e.constant(factor), sizes=z.sizes)
    patches = e.transpose(e.reshape(mixed, (b, c, t, h, w, 2, 2)), (0, 1, 2, 3, 5, 4, 6))
    return e.cast(e.reshape(patches, e.expected[0]), z.dtype)
