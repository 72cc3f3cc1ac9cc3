"""Normalisation, modulation and gated residuals; statistics in at least float32."""

from __future__ import annotations

from collections.abc import Callable

import torch

from helios.export.dim import Size
from helios.export.emitter import Emitter, fixed
from helios.export.forms.table import form
from helios.export.wire import Wire
from helios.op import accumulator

__all__ = ["gated_add", "layer_norm", "modulate", "rms_norm"]

RMS_NORM = 23
"""The opset that brought RMSNormalization."""


@form
def rms_norm(e: Emitter, x: Wire, weight: Wire | None = None, *, eps: float) -> Wire:
    wide = e.wide(x)
    gain = _ones(e, wide) if weight is None else e.cast(weight, wide.dtype)
    if e.options.opset >= RMS_NORM:
        return e.cast(e.op("RMSNormalization", wide, gain, sizes=x.sizes, axis=-1, epsilon=eps), x.dtype)
    mean = e.reduce("ReduceMean", e.op("Mul", wide, wide), [x.rank - 1])
    length = e.op("Sqrt", e.op("Add", mean, e.number(eps, wide)))
    return e.cast(e.op("Mul", e.op("Div", wide, length), gain), x.dtype)


@form
def layer_norm(
    e: Emitter,
    x: Wire,
    weight: Wire | None = None,
    bias: Wire | None = None,
    *,
    eps: float,
    dtype: torch.dtype | None,
) -> Wire:
    wide = e.wide(x)
    gain = _ones(e, wide) if weight is None else e.cast(weight, wide.dtype)
    shift = None if bias is None else e.cast(bias, wide.dtype)
    made = e.op("LayerNormalization", wide, gain, shift, sizes=x.sizes, axis=-1, epsilon=eps)
    return e.cast(made, dtype or x.dtype)


def _ones(e: Emitter, x: Wire) -> Wire:
    return e.constant(torch.ones(fixed(x.sizes[-1]), dtype=x.dtype))


def _by_rows(e: Emitter, x: Wire, rows: Size, split: Size, do: Callable[[Wire, Callable[[Wire], Wire]], Wire]) -> Wire:
    """``do`` on the tokens that take row 0, and on those that take row 1, with a reader of that row."""
    if rows == 1:
        return do(x, lambda row: row)
    total = x.sizes[1]
    parts = [(0, split, 0), (split, total, 1)]
    made = [
        do(e.slice(x, 1, start, stop), lambda row, i=index: e.slice(row, 1, i, i + 1))  # type: ignore[misc]
        for start, stop, index in parts
        if start != stop
    ]
    return e.concat(made, 1)


@form
def modulate(e: Emitter, x: Wire, scale: Wire, shift: Wire, *, split: Size, dtype: torch.dtype | None) -> Wire:
    acc = accumulator(x.dtype)

    def one(part: Wire, row: Callable[[Wire], Wire]) -> Wire:
        gain = e.op("Add", e.cast(row(scale), acc), e.constant(torch.tensor(1.0, dtype=acc)))
        moved = e.op("Add", e.op("Mul", e.cast(part, acc), gain), e.cast(row(shift), acc))
        return e.cast(moved, dtype or x.dtype)

    return _by_rows(e, x, scale.sizes[1], split, one)


@form
def gated_add(e: Emitter, x: Wire, y: Wire, gate: Wire | None = None, *, gate_split: Size) -> Wire:
    acc = accumulator(x.dtype)
    branch = e.cast(y, acc)
    if gate is not None:
        given = gate

        def one(part: Wire, row: Callable[[Wire], Wire]) -> Wire:
            return e.op("Mul", part, e.cast(row(given), acc))

        branch = _by_rows(e, branch, gate.sizes[1], gate_split, one)
    first = x.sizes[1] - y.sizes[1]
    tail = e.slice(x, 1, first, x.sizes[1])
    made = e.cast(e.op("Add", e.cast(tail, acc), branch), x.dtype)
    return made if first == 0 else e.concat([e.slice(x, 1, 0, first), made], 1)
