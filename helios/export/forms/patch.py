"""Between latents and tokens, and the sinusoid of the timestep."""

from __future__ import annotations

import math

import torch

from helios.export.emitter import Emitter, fixed
from helios.export.forms.table import form
from helios.export.wire import Sizes, Wire

__all__ = ["patch_embed", "timestep_embedding", "unpatchify"]


@form
def patch_embed(e: Emitter, x: Wire, weight: Wire, bias: Wire) -> Wire:
    kernel = [fixed(size) for size in weight.sizes[2:]]
    b, tokens, width = e.expected[0]
    grid = tuple(size // k for size, k in zip(x.sizes[2:], kernel, strict=True))
    made = e.conv(x, weight, bias, sizes=(b, width, *grid), strides=kernel)
    return e.transpose(e.reshape(made, (b, width, tokens)), (0, 2, 1))


@form
def unpatchify(e: Emitter, x: Wire, *, grid: Sizes, patch: tuple[int, int, int]) -> Wire:
    b, channels = e.expected[0][:2]
    cells = e.reshape(x, (b, *grid, *patch, channels))
    return e.reshape(e.transpose(cells, (0, 7, 1, 4, 2, 5, 3, 6)), e.expected[0])


@form
def timestep_embedding(e: Emitter, t: Wire, *, dim: int, period: float) -> Wire:
    wide = e.wide(t)
    half = dim // 2
    # In the accumulator's dtype step by step, as the op has it: an angle of 999 shows each rounding.
    exponent = -math.log(period) * torch.arange(half, dtype=wide.dtype) / half
    column = e.reshape(wide, (*wide.sizes, 1))
    angle = e.op("Mul", column, e.constant(torch.exp(exponent)))
    return e.cast(e.concat([e.op("Cos", angle), e.op("Sin", angle)], 1), t.dtype)
