"""Convolutions over video, and the other ops of the VAE."""

from __future__ import annotations

import math

import torch

from helios.export.emitter import Emitter, fixed
from helios.export.forms.table import form
from helios.export.wire import Wire
from helios.op import accumulator

__all__ = [
    "channel_norm",
    "clamp",
    "conv3d",
    "denormalize_latents",
    "interleave_frames",
    "last_frames",
    "pad_zero",
    "sample_posterior",
    "upsample_nearest",
]

Three = tuple[int, int, int]


@form
def conv3d(e: Emitter, x: Wire, weight: Wire, bias: Wire | None = None, *, stride: Three, padding: Three) -> Wire:
    return e.conv(x, weight, bias, sizes=e.expected[0], strides=list(stride), pads=[*padding, *padding])


@form
def channel_norm(e: Emitter, x: Wire, gamma: Wire, *, eps: float) -> Wire:
    wide = e.wide(x)
    channels = fixed(x.sizes[1])
    length = e.op("Max", e.reduce("ReduceL2", wide, [1]), e.number(eps, wide))
    gain = e.op("Mul", e.cast(gamma, wide.dtype), e.number(math.sqrt(channels), wide))
    made = e.op("Mul", e.op("Div", wide, length), e.reshape(gain, (channels, 1, 1, 1)))
    return e.cast(made, x.dtype)


@form
def upsample_nearest(e: Emitter, x: Wire) -> Wire:
    b, c, t, h, w = x.sizes
    twice = e.expand(e.reshape(x, (b, c, t, h, 1, w, 1)), (b, c, t, h, 2, w, 2))
    return e.reshape(twice, e.expected[0])


@form
def interleave_frames(e: Emitter, x: Wire) -> Wire:
    b, c, t, h, w = x.sizes
    halves = e.transpose(e.reshape(x, (b, 2, c // 2, t, h, w)), (0, 2, 3, 1, 4, 5))
    return e.reshape(halves, e.expected[0])


@form
def pad_zero(e: Emitter, x: Wire, *, before: Three, after: Three) -> Wire:
    if not any((*before, *after)):
        return x
    return e.op("Pad", x, e.ints([0, 0, *before, 0, 0, *after]), sizes=e.expected[0])


@form
def last_frames(e: Emitter, x: Wire, *, count: int) -> Wire:
    return e.slice(x, 2, x.sizes[2] - count, x.sizes[2])


@form
def clamp(e: Emitter, x: Wire, *, low: float, high: float) -> Wire:
    return e.op("Clip", x, e.number(low, x), e.number(high, x), sizes=x.sizes)


@form
def denormalize_latents(
    e: Emitter, x: Wire, *, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype | None
) -> Wire:
    wide = e.wide(x)
    scaled = e.op("Mul", wide, _per_channel(e, wide, std))
    return e.cast(e.op("Add", scaled, _per_channel(e, wide, mean)), dtype or x.dtype)


def _per_channel(e: Emitter, x: Wire, numbers: tuple[float, ...]) -> Wire:
    return e.constant(torch.tensor(numbers, dtype=x.dtype).view(-1, 1, 1, 1))


@form
def sample_posterior(
    e: Emitter, moments: Wire, noise: Wire | None = None, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Wire:
    z = len(mean)
    wide = e.cast(moments, accumulator(moments.dtype))
    centre = e.slice(wide, 1, 0, z)
    if noise is not None:
        variance = e.slice(wide, 1, z, 2 * z)
        held = e.op("Clip", variance, e.number(-30.0, wide), e.number(20.0, wide), sizes=variance.sizes)
        spread = e.op("Exp", e.op("Mul", held, e.number(0.5, wide)))
        centre = e.op("Add", centre, e.op("Mul", spread, e.cast(noise, wide.dtype)))
    normal = e.op("Div", e.op("Sub", centre, _per_channel(e, wide, mean)), _per_channel(e, wide, std))
    return e.cast(normal, moments.dtype)
