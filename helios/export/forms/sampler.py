"""Steps of the samplers and guidance, in the widest dtype among their inputs, rounded once."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from helios.export.emitter import Emitter
from helios.export.forms.table import form
from helios.export.wire import Wire
from helios.op import widest

__all__ = [
    "blend",
    "cfg",
    "cfg_zero_star",
    "dmd_step",
    "euler_step",
    "unipc_correct",
    "unipc_predict",
    "velocity_to_x0",
]


def _widened(e: Emitter, *tensors: Wire) -> list[Wire]:
    acc = widest(*(t.dtype for t in tensors))
    return [e.cast(t, acc) for t in tensors]


def _numbers(e: Emitter, coeffs: Wire, indices: Sequence[int]) -> list[Wire]:
    return [e.entry(coeffs, index) for index in indices]


def _sum(e: Emitter, *terms: tuple[Wire, Wire]) -> Wire:
    """The sum of products, from left to right."""
    products = [e.op("Mul", factor, x) for factor, x in terms]
    return functools.reduce(lambda a, b: e.op("Add", a, b), products)


@form
def velocity_to_x0(e: Emitter, sample: Wire, velocity: Wire, coeffs: Wire) -> Wire:
    x, v, c = _widened(e, sample, velocity, coeffs)
    return e.cast(e.op("Sub", x, e.op("Mul", e.entry(c, 0), v)), sample.dtype)


@form
def blend(e: Emitter, x: Wire, y: Wire, coeffs: Wire) -> Wire:
    first, second, c = _widened(e, x, y, coeffs)
    a, b = _numbers(e, c, (0, 1))
    return e.cast(_sum(e, (a, first), (b, second)), x.dtype)


@form
def dmd_step(e: Emitter, sample: Wire, velocity: Wire, start: Wire, coeffs: Wire) -> Wire:
    x, v, origin, c = _widened(e, sample, velocity, start, coeffs)
    sigma, signal, noise = _numbers(e, c, (0, 1, 2))
    x0 = e.op("Sub", x, e.op("Mul", sigma, v))
    return e.cast(_sum(e, (signal, x0), (noise, origin)), start.dtype)


@form
def euler_step(e: Emitter, sample: Wire, velocity: Wire, coeffs: Wire) -> Wire:
    x, v, c = _widened(e, sample, velocity, coeffs)
    return e.cast(e.op("Add", x, e.op("Mul", e.entry(c, 0), v)), sample.dtype)


@form
def unipc_correct(e: Emitter, sample: Wire, last: Wire, newer: Wire, older: Wire, x0: Wire, coeffs: Wire) -> Wire:
    x, before, m0, m1, now, numbers = _widened(e, sample, last, newer, older, x0, coeffs)
    keep, a, b, c, d = _numbers(e, numbers, range(1, 6))
    back, ahead = e.op("Sub", m1, m0), e.op("Sub", now, m0)
    moved = _sum(e, (a, before), (b, m0), (c, back), (d, ahead))
    return e.cast(e.op("Add", e.op("Mul", keep, x), moved), sample.dtype)


@form
def unipc_predict(e: Emitter, sample: Wire, x0: Wire, newer: Wire, coeffs: Wire) -> Wire:
    x, now, before, numbers = _widened(e, sample, x0, newer, coeffs)
    a, b, c = _numbers(e, numbers, range(6, 9))
    return e.cast(_sum(e, (a, x), (b, now), (c, e.op("Sub", before, now))), sample.dtype)


@form
def cfg(e: Emitter, cond: Wire, uncond: Wire, coeffs: Wire) -> Wire:
    return _guided(e, *_widened(e, cond, uncond, coeffs), dtype=cond.dtype)


@form
def cfg_zero_star(e: Emitter, cond: Wire, uncond: Wire, coeffs: Wire, *, eps: float) -> Wire:
    c, u, numbers = _widened(e, cond, uncond, coeffs)
    video = [1, 2, 3, 4]
    both = e.reduce("ReduceSum", e.op("Mul", c, u), video)
    alone = e.reduce("ReduceSum", e.op("Mul", u, u), video)
    share = e.op("Div", both, e.op("Add", alone, e.number(eps, alone)))
    return _guided(e, c, e.op("Mul", share, u), numbers, dtype=cond.dtype)


def _guided(e: Emitter, cond: Wire, base: Wire, coeffs: Wire, *, dtype: torch.dtype) -> Wire:
    """``gain·(base + scale·(cond − base))``."""
    scale, gain = _numbers(e, coeffs, (0, 1))
    ahead = e.op("Add", base, e.op("Mul", scale, e.op("Sub", cond, base)))
    return e.cast(e.op("Mul", gain, ahead), dtype)
