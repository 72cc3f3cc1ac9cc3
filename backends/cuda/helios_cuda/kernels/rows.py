"""Writing rows that a program has in its registers: as they are, or as e4m3 numbers with a float32 scale each.

A row's largest element is known where the row is, so quantising it costs no pass over memory of its own: behind a norm
a byte an element is written instead of two, and 4 bytes a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helios_cuda import tables
from helios_cuda.kernels.numerics import LARGEST, e4m3, rounded

__all__ = ["as_bytes", "converts", "quantised", "quantised_like", "store_rows"]

CONVERTS_FROM = 90
"""Compute capability from which Triton converts e4m3 numbers by one instruction, and rounds once. On sm_89 it goes by
way of float16 and so rounds twice; integer arithmetic is no slower than the memory of such a device."""
SMALLEST: tl.constexpr = tl.constexpr(0x2B8CBCCC)
"""The bits of 1e-12, which the largest element of a row counts at least for."""


def converts(device: torch.device) -> bool:
    """Whether a device's own instructions convert e4m3 numbers, and not integer arithmetic; see ``numerics.e4m3``."""
    return int(tables.architecture(device).removeprefix("sm_") or 0) >= CONVERTS_FROM


def quantised_like(x: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous memory for the numbers of quantised rows, and for their scales ``[..., 1]``."""
    numbers = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return numbers, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def as_bytes(x: Tensor) -> Tensor:
    """As kernels take e4m3 numbers, which not every device has a type for; others as they are."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


@triton.jit
def quantised(wide, CONVERTS: tl.constexpr):
    """Bytes of e4m3 and the scale of each row of a tile, in which what is no part of the row is 0."""
    # As whole numbers the sizes have the same order, and NaN is above all.
    sizes = wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    most = tl.maximum(tl.max(sizes, 1, keep_dims=True), SMALLEST).to(tl.float32, bitcast=True)
    # torch divides a number by a tensor so, and the op's body gives the same bits.
    factor = tl.div_rn(1.0, most) * LARGEST
    return e4m3(wide * factor, CONVERTS), tl.div_rn(most, LARGEST)


@triton.jit
def store_rows(out, scales, row, rows, column, wide, width: tl.constexpr, CONVERTS: tl.constexpr):
    """Write a tile of float32 rows, each result rounded once; quantised where there is a place for scales.

    Args:
        out: contiguous rows; bytes of e4m3 where they are quantised.
        scales: one float32 a row, or None.
        row, column: int64 ``[n, 1]`` and ``[1, m]``; written are those below ``rows`` and ``width``.
    """
    inside = (column < width) & (row < rows)
    if scales is None:
        tl.store(out + row * width + column, rounded(wide, out.dtype.element_ty), inside)
    else:
        # A norm leaves 0 there anyway; with it in sight of the compiler, ``adaln_quantize`` has 96 registers, not 141.
        numbers, scale = quantised(tl.where(inside, wide, 0.0), CONVERTS)
        tl.store(out + row * width + column, numbers, inside)
        tl.store(scales + row, scale, row < rows)
