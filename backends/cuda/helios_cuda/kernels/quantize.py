"""Quantising rows and widening them again, in one pass over memory each.

``quantize_rows`` and ``gelu_quantize`` hold rows in registers: read once, their largest element found, written as e4m3
numbers with a float32 scale a row. Rows of 128, as of heads, share a program. ``dequantize_rows`` needs no whole row;
it takes tiles of 1,024 columns, which 5,120 is a multiple of, and 13,824 nearly. Behind a norm the norm's kernel does
what ``quantize_rows`` would.

=============================  ====================  ======================  =================
at 384×640, bfloat16           bytes of an element   MB at stage 0, 1, 2     µs at 4.3 TB/s
=============================  ====================  ======================  =================
``quantize_rows`` 5120         2 read, 1 written     45, 70, 170             11, 16, 39
the same, heads of 128         and 4 a row of 128    46, 71, 171             11, 16, 40
``gelu_quantize`` 13824        2 read, 1 written     122, 189, 458           28, 44, 106
``dequantize_rows`` 5120×5120  1 read, 2 written     79 of one weight        18
the same, 13824×5120           1 read, 2 written     212 of one weight       49
=============================  ====================  ======================  =================

2 FLOP an element, so memory decides; the GELU has 12 more and two operations of the special function units, which at
stage 2 take 82 µs of an H100 (16 a cycle of 1.755 GHz on 132 multiprocessors) beside the 106 of memory. The ops' bodies
widen, measure, scale, clamp and round in passes of their own: by their dtypes 39 bytes an element instead of 3 to
quantise, and 19 instead of 3 to widen.

Rows of more than 32,768 elements fit no program; there the ops' own bodies run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helios import op
from helios.backend import Kernel
from helios_cuda.kernels.numerics import rounded, widened
from helios_cuda.kernels.rows import as_bytes, converts, quantised, quantised_like
from helios_cuda.launch import Tile, name_of, rows_apart, tiled

__all__ = ["KERNELS", "quantize_rows"]

WIDEST = 32768
"""Elements of a row that a program holds: 64 a thread of 16 warps."""
COLUMNS = 1024
"""Of a tile that is widened."""


@triton.jit
def _gelu(x):
    """``x / (1 + exp(−2u))``, which is ``x/2 · (1 + tanh u)`` without the difference of near numbers."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))


@tiled(
    Tile({"ELEMENTS": 8192}, warps=8, stages=1),
    Tile({"ELEMENTS": 8192}, warps=4, stages=1),
    Tile({"ELEMENTS": 8192}, warps=16, stages=1),
    Tile({"ELEMENTS": 16384}, warps=16, stages=1),
    interpreted=Tile({"ELEMENTS": 1 << 18}),
)
@triton.jit
def _quantize(
    x,
    out,
    scales,
    rows,
    inner,
    outer_step,
    inner_step,
    width: tl.constexpr,
    GELU: tl.constexpr,
    CONVERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """A tile of rows, ``inner`` of which follow each other by ``inner_step``."""
    ROWS: tl.constexpr = ELEMENTS // WIDTH if ELEMENTS > WIDTH else 1
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (column < width) & (row < rows)
    begins = (row // inner).to(tl.int64) * outer_step + (row % inner).to(tl.int64) * inner_step
    wide = tl.load(x + begins + column, inside, 0.0).to(tl.float32)
    if GELU:
        wide = _gelu(wide)
    numbers, scale = quantised(wide, CONVERTS)
    tl.store(out + row.to(tl.int64) * width + column, numbers, inside)
    tl.store(scales + row, scale, row < rows)


@tiled(
    Tile({"ELEMENTS": 8192}, warps=8, stages=1),
    Tile({"ELEMENTS": 4096}, warps=4, stages=1),
    Tile({"ELEMENTS": 4096}, warps=8, stages=1),
    Tile({"ELEMENTS": 16384}, warps=8, stages=1),
    interpreted=Tile({"ELEMENTS": 1 << 18}),
)
@triton.jit
def _dequantize(
    x,
    scales,
    out,
    rows,
    inner,
    outer_step,
    inner_step,
    width: tl.constexpr,
    CONVERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """A tile of rows and columns: ``out = x · scale``."""
    ROWS: tl.constexpr = ELEMENTS // WIDTH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (column < width) & (row < rows)
    begins = (row // inner).to(tl.int64) * outer_step + (row % inner).to(tl.int64) * inner_step
    wide = widened(tl.load(x + begins + column, inside, 0), CONVERTS)
    each = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide *= tl.load(scales + each, each < rows, 0.0).to(tl.float32)[:, None]
    tl.store(out + row.to(tl.int64) * width + column, rounded(wide, out.dtype.element_ty), inside)


def _apart(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """x with contiguous rows, and how they lie: their number, how many follow each other, steps of those groups and
    within them. Parts of a fused buffer stay where they are; more than two steps take a copy."""
    x = rows_apart(x)
    levels: list[tuple[int, int]] = []
    for size, step in zip(x.shape[-2::-1], x.stride()[-2::-1], strict=True):
        if levels and step == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        elif size != 1:
            levels.append((size, step))
    if len(levels) > 2:
        return _apart(x.contiguous())
    (many, step), *others = levels or [(1, 0)]
    if not others:
        return x, (many, 1, step, 0)
    return x, (many * others[0][0], many, others[0][1], step)


def _run(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    if width > WIDEST:
        made: Any = op.get(name).fn(x)
        return made[0], made[1]
    x, lie = _apart(x)
    out, scales = quantised_like(x)
    across = triton.next_power_of_2(width)
    _quantize.launch(
        lambda size: (triton.cdiv(lie[0], max(1, size["ELEMENTS"] // across)),),
        *(x, as_bytes(out), scales, *lie),
        key=f"{name_of(x.dtype)} d={width} gelu={name == 'gelu_quantize'}",
        width=width,
        GELU=name == "gelu_quantize",
        CONVERTS=converts(x.device),
        WIDTH=across,
    )
    return out, scales


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The op: ``x`` ``[..., k]`` of 16 or 32 bits as float8_e4m3fn, contiguous, and float32 scales ``[..., 1]``.

    Runs on every architecture, those without instructions for e4m3 numbers included.
    """
    return _run("quantize_rows", x)


def _gelu_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return _run("gelu_quantize", x)


def _dequantize_rows(x: Tensor, scale: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    if scale.shape != (*x.shape[:-1], 1) or x.dtype != torch.float8_e4m3fn:
        made: Tensor = op.get("dequantize_rows").fn(x, scale, dtype=dtype)
        return made
    x, lie = _apart(x)
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=dtype or scale.dtype, device=x.device)
    across = min(COLUMNS, triton.next_power_of_2(width))
    _dequantize.launch(
        lambda size: (triton.cdiv(lie[0], size["ELEMENTS"] // across), triton.cdiv(width, across)),
        *(as_bytes(x), scale.contiguous(), out, *lie),
        key=f"{name_of(out.dtype)} d={width}",
        width=width,
        CONVERTS=converts(x.device),
        WIDTH=across,
    )
    return out


KERNELS = {
    "dequantize_rows": Kernel(_dequantize_rows),
    "gelu_quantize": Kernel(_gelu_quantize),
    "quantize_rows": Kernel(quantize_rows),
}
