"""Products of e4m3 numbers with a scale for each row of both sides: what stands where the library has none.

``out = (x @ weightᵀ) · x_scale · weight_scale + bias``; the inner dimension is contiguous in both operands, as all
tensor cores for 8 bits want it. Scales and bias are applied to the float32 sum in registers, rounded once.

**Sums.** A product of two e4m3 numbers has 8 bits and is exact. Hopper's and Ada's tensor cores align 32 products by
the largest and keep some 14 bits of each, and of the sum that they carry on; so after at most 128 of the inner
dimension that sum is added to one in float32 registers, as CUTLASS and cuBLASLt do where fast accumulation is off.
Blackwell's carry on in float32 (cuBLASLt's switch has no effect there), and nothing is added by hand.

**Order.** Programs go down ``GROUP`` tiles of rows before they go to the next tile of outputs, so that those at work
together share x and a few tiles of the weight in the second-level cache. A tile of 128 × 128 reads 256 bytes for each
32768 FLOP: 128 FLOP a byte, so that a cache of 5.5 TB/s would allow 700 TFLOP/s (a prediction). A tile of 128 × 256
would allow 940, but with a sum beside the sum its registers spill.

At the published sizes (384 × 640; 2940, 4560 and 11040 tokens; width 5120, hidden 13824), bytes read once:

===============  =====================  ====================================
product          FLOP at stage 0, 1, 2  MB of x, weight, result at stage 2
===============  =====================  ====================================
5120 to 15360    0.46, 0.72, 1.74 T     57, 79, 339
5120 to 5120     0.15, 0.24, 0.58 T     57, 26, 113
5120 to 13824    0.42, 0.65, 1.56 T     57, 71, 305
13824 to 5120    0.42, 0.65, 1.56 T     153, 71, 113
===============  =====================  ====================================

All are bound by arithmetic: 339 MB take 79 µs at 4.3 TB/s, 1.74 TFLOP 1.1 ms at 1.58 PFLOP/s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helios_cuda import tables
from helios_cuda.kernels.numerics import INTERPRETED, rounded, widened
from helios_cuda.launch import Tile, name_of, tiled

__all__ = ["scaled_linear"]

SHORT_SUMS = ("sm_89", "sm_90")
"""Architectures whose tensor cores keep less of a sum than float32 does."""


@triton.jit
def _dot(a, b, acc, PROMOTE: tl.constexpr):
    """``acc + a @ b`` of e4m3 tiles; with ``PROMOTE`` the sum within the tiles ends before float32 takes over."""
    if INTERPRETED:
        a, b = widened(a.to(tl.uint8, bitcast=True), False), widened(b.to(tl.uint8, bitcast=True), False)
        return tl.dot(a, b, acc, input_precision="ieee")
    if PROMOTE:
        # A limit of the tile's own size keeps the compiler from making one sum of the two. Given ``acc``, it would add
        # as well, but for Hopper before it waits for the asynchronous products (Triton 3.7).
        return acc + tl.dot(a, b, max_num_imprecise_acc=a.shape[1])
    return tl.dot(a, b, acc)


@tiled(
    Tile({"ROWS": 128, "OUTPUTS": 128, "INNER": 128, "GROUP": 8}, warps=8, stages=4, shared=129),
    Tile({"ROWS": 128, "OUTPUTS": 128, "INNER": 128, "GROUP": 8}, warps=8, stages=3),
    Tile({"ROWS": 128, "OUTPUTS": 128, "INNER": 64, "GROUP": 8}, warps=8, stages=4),
    Tile({"ROWS": 64, "OUTPUTS": 128, "INNER": 128, "GROUP": 8}, warps=4, stages=4),
    Tile({"ROWS": 64, "OUTPUTS": 256, "INNER": 128, "GROUP": 8}, warps=8, stages=4, shared=161),
    interpreted=Tile({"ROWS": 256, "OUTPUTS": 256, "INNER": 256, "GROUP": 1}),
)
@triton.jit
def _scaled_linear(
    x,
    x_scale,
    weight,
    weight_scale,
    bias,
    out,
    rows,
    outputs,
    x_row,
    weight_row,
    BIAS: tl.constexpr,
    K: tl.constexpr,
    PROMOTE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of rows by outputs."""
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(outputs, OUTPUTS)
    group = tl.program_id(0) // (GROUP * across)
    tall = tl.minimum(down - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    row = (group * GROUP + within % tall) * ROWS + tl.arange(0, ROWS)
    output = within // tall * OUTPUTS + tl.arange(0, OUTPUTS)
    inner = tl.arange(0, INNER)
    # Rows beyond the last are others again: they need no mask, and are not written.
    left = x + (row % rows).to(tl.int64)[:, None] * x_row + inner[None, :]
    right = weight + (output % outputs).to(tl.int64)[None, :] * weight_row + inner[:, None]
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, K, INNER):
        if K % INNER == 0:
            a, b = tl.load(left + start), tl.load(right + start)
        else:
            inside = inner < K - start
            a = tl.load(left + start, inside[None, :], 0.0)
            b = tl.load(right + start, inside[:, None], 0.0)
        acc = _dot(a, b, acc, PROMOTE)
    acc *= tl.load(x_scale + row, row < rows, 0.0)[:, None]
    acc *= tl.load(weight_scale + output, output < outputs, 0.0)[None, :]
    if BIAS:
        acc += tl.load(bias + output, output < outputs, 0.0).to(tl.float32)[None, :]
    places = out + row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(places, rounded(acc, out.dtype.element_ty), (row < rows)[:, None] & (output < outputs)[None, :])


def scaled_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product of matrices.

    Args:
        x: ``[m, k]`` float8_e4m3fn, each row contiguous.
        x_scale: ``[m]`` float32, contiguous.
        weight: ``[n, k]`` float8_e4m3fn, each row contiguous.
        weight_scale: ``[n]`` float32, contiguous.
        bias: ``[n]``, contiguous, of any floating dtype.
        dtype: of the result.

    Returns:
        ``[m, n]``, contiguous.
    """
    (rows, inner), outputs = x.shape, weight.shape[0]
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    _scaled_linear.launch(
        lambda tile: (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(outputs, tile["OUTPUTS"]),),
        *(x, x_scale, weight, weight_scale, bias, out, rows, outputs, x.stride(0), weight.stride(0)),
        key=f"{name_of(dtype)} k={inner} n={outputs} m={rows}",
        BIAS=bias is not None,
        K=inner,
        PROMOTE=tables.architecture(x.device) in SHORT_SUMS,
    )
    return out
