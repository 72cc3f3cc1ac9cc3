"""Residuals and adaptive layer norm, one pass over memory: a row is read once, stays in registers, and is written once.

Modulation is compact: one or two float32 rows a batch, which the cache holds. Statistics in float32, in two passes over
the registers (mean, then squared deviations), each result rounded to nearest once. A row per program: 10 KB of bfloat16
at the published width, so eight warps have 40 bytes a thread in flight for each operand.

Bytes: ``adaln`` reads x and writes the result; ``gated_add`` reads x and y and writes one; ``gated_add_adaln`` reads
two and writes two. ``adaln_quantize`` and ``gated_add_adaln_quantize`` write their norm as e4m3 numbers and
a float32 scale a row: 15,364 and 35,844 bytes a token at width 5120, so 45, 70, 170 MB and 105, 163, 396 MB at 2,940,
4,560 and 11,040 tokens; at 4.3 TB/s 11, 16, 39 µs and 25, 38, 92 µs. About 12 FLOP an element: memory alone decides.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from helios.backend import Kernel
from helios_cuda.kernels.numerics import rounded
from helios_cuda.kernels.rows import as_bytes, converts, quantised_like, store_rows
from helios_cuda.launch import Tile, Tiled, name_of, rows_apart

__all__ = ["KERNELS"]


@triton.jit
def _row_of(token, split, ROWS: tl.constexpr):
    """Which modulation row a token takes."""
    return tl.where(token >= split, 1, 0) if ROWS == 2 else token * 0


@triton.jit
def _residual_norm(
    x,
    y,
    gate,
    scale,
    shift,
    total,
    out,
    scales,
    rows,
    tokens,
    branch,
    split,
    gate_split,
    x_batch,
    x_row,
    y_batch,
    y_row,
    eps,
    width: tl.constexpr,
    ADD: tl.constexpr,
    GATE_ROWS: tl.constexpr,
    NORM: tl.constexpr,
    MOD_ROWS: tl.constexpr,
    CONVERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A tile of tokens: ``total = x + gate · y``, ``out = layer_norm(total) · (1 + scale) + shift``."""
    at = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    batch, token = at // tokens, at % tokens
    column = tl.arange(0, WIDTH)[None, :]
    inside = (column < width) & (at < rows)
    value = tl.load(x + batch * x_batch + token * x_row + column, inside, 0.0)
    kind = value.dtype
    if ADD:
        late = token - (tokens - branch)
        adds = inside & (late >= 0)
        wide = tl.load(y + batch * y_batch + late * y_row + column, adds, 0.0).to(tl.float32)
        if GATE_ROWS > 0:
            row = batch * GATE_ROWS + _row_of(late, gate_split, GATE_ROWS)
            wide *= tl.load(gate + row * width + column, adds, 0.0).to(tl.float32)
        value = rounded(value.to(tl.float32) + wide, kind)
        tl.store(total + at * width + column, value, inside)
    if NORM:
        wide = value.to(tl.float32)
        mean = tl.sum(wide, 1, keep_dims=True) / width
        away = tl.where(inside, wide - mean, 0.0)
        inverse = 1.0 / tl.sqrt_rn(tl.sum(away * away, 1, keep_dims=True) / width + eps)
        row = batch * MOD_ROWS + _row_of(token, split, MOD_ROWS)
        gain = 1.0 + tl.load(scale + row * width + column, inside, 0.0).to(tl.float32)
        bias = tl.load(shift + row * width + column, inside, 0.0).to(tl.float32)
        store_rows(out, scales, at, rows, column, away * inverse * gain + bias, width, CONVERTS)


_RESIDUAL = Tiled(
    _residual_norm,
    "residual_norm",
    (
        Tile({"TOKENS": 1}, warps=8, stages=1),
        Tile({"TOKENS": 1}, warps=4, stages=1),
        Tile({"TOKENS": 1}, warps=16, stages=1),
        Tile({"TOKENS": 2}, warps=8, stages=1),
    ),
    Tile({"TOKENS": 256}),
)
_QUANTIZE = Tiled(
    _residual_norm,
    "residual_norm_quantize",
    (
        # A row's results wait in registers for the largest, about 100 a thread with 4 warps and with 8: with 4 there
        # are twice as many rows in flight.
        Tile({"TOKENS": 1}, warps=4, stages=1),
        Tile({"TOKENS": 1}, warps=8, stages=1),
        Tile({"TOKENS": 1}, warps=16, stages=1),
        Tile({"TOKENS": 2}, warps=8, stages=1),
    ),
    Tile({"TOKENS": 256}),
)


def _run(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    modulation: tuple[Tensor, Tensor] | None,
    *,
    split: int = 0,
    gate_split: int = 0,
    eps: float = 0.0,
    quantise: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sum (x itself without y), its adaptive norm (the sum itself without modulation), and the scale of each row of
    that where it is quantised."""
    adds = y is not None
    x = rows_apart(x)
    y = x if y is None else rows_apart(y)
    gate = None if gate is None else gate.contiguous()
    scale, shift = (None, None) if modulation is None else (m.contiguous() for m in modulation)
    b, s, width = x.shape
    total = x.new_empty(x.shape) if adds else x
    out, scales = quantised_like(x) if quantise else (total if modulation is None else x.new_empty(x.shape), None)
    (_QUANTIZE if quantise else _RESIDUAL).launch(
        lambda size: (triton.cdiv(b * s, size["TOKENS"]),),
        *(x, y, gate, scale, shift, total, as_bytes(out), scales),
        *(b * s, s, y.shape[1], split, gate_split, *x.stride()[:2], *y.stride()[:2], eps),
        key=f"{name_of(x.dtype)} d={width} add={adds} norm={modulation is not None}",
        width=width,
        ADD=adds,
        GATE_ROWS=0 if gate is None else gate.shape[1],
        NORM=modulation is not None,
        MOD_ROWS=1 if scale is None else scale.shape[1],
        CONVERTS=quantise and converts(x.device),
        WIDTH=triton.next_power_of_2(width),
    )
    return total, out, scales


def _adaln(x: Tensor, scale: Tensor, shift: Tensor, *, split: int, eps: float) -> Tensor:
    return _run(x, None, None, (scale, shift), split=split, eps=eps)[1]


def _gated_add(x: Tensor, y: Tensor, gate: Tensor | None = None, *, gate_split: int) -> Tensor:
    return _run(x, y, gate, None, gate_split=gate_split)[0]


def _gated_add_adaln(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, *, split: int, gate_split: int, eps: float
) -> tuple[Tensor, Tensor]:
    return _run(x, y, gate, (scale, shift), split=split, gate_split=gate_split, eps=eps)[:2]


def _adaln_quantize(x: Tensor, scale: Tensor, shift: Tensor, *, split: int, eps: float) -> tuple[Tensor, Tensor | None]:
    return _run(x, None, None, (scale, shift), split=split, eps=eps, quantise=True)[1:]


def _gated_add_adaln_quantize(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, *, split: int, gate_split: int, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    return _run(x, y, gate, (scale, shift), split=split, gate_split=gate_split, eps=eps, quantise=True)


KERNELS = {
    "adaln": Kernel(_adaln),
    "adaln_quantize": Kernel(_adaln_quantize),
    "gated_add": Kernel(_gated_add),
    "gated_add_adaln": Kernel(_gated_add_adaln),
    "gated_add_adaln_quantize": Kernel(_gated_add_adaln_quantize),
}
