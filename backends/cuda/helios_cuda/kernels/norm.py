"""RMS norm and layer norm: a row is read once, stays in registers, and is written once.

Statistics in float32; the layer norm's in two passes over the registers (mean, then squared deviations). Each result is
rounded once, to the input's dtype or to float32. Weights are read with each tile of rows, from the first-level cache;
larger tiles read them less often.

Bytes at 384×640 in bfloat16: 20,480 a token, read and written, so 60, 93 and 226 MB at 2,940, 4,560 and 11,040 tokens
of width 5120; the 8,640 noisy tokens that see the text are 177 MB. About 5 FLOP an element: memory alone decides. A
layer norm into float32 writes 20,480 bytes a token and reads half of that.

Why not torch: the bodies widen, norm and round in passes of their own, which by their dtypes move 20 bytes an element
(layer norm) and 40 (RMS norm) against 4 here; and torch's norms in bfloat16 take no float32 weights and give no float32
result. A forward of 14b at the last stage has 40 layer norms of the residual stream and 40 RMS norms of the text's
queries that nothing else absorbs (``helios graph --pyramid-stage 2 --flops --backend cuda:interpret``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helios.backend import Kernel
from helios_cuda.kernels.numerics import inverse_root, rounded
from helios_cuda.launch import Tile, name_of, rows_apart, tiled

__all__ = ["KERNELS"]


@tiled(
    Tile({"ROWS": 1}, warps=8, stages=1),
    Tile({"ROWS": 2}, warps=8, stages=1),
    Tile({"ROWS": 2}, warps=16, stages=1),
    Tile({"ROWS": 4}, warps=16, stages=1),
    interpreted=Tile({"ROWS": 128}),
)
@triton.jit
def _norm(
    x,
    weight,
    bias,
    out,
    rows,
    tokens,
    x_batch,
    x_row,
    eps,
    width: tl.constexpr,
    CENTRE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile of rows: ``out = (x − mean) / sqrt(mean square + eps) · weight + bias``, mean 0 unless ``CENTRE``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (column < width) & (row < rows)
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    wide = tl.load(x + batch * x_batch + token * x_row + column, inside, 0.0).to(tl.float32)
    # Before the sums, which all threads wait for.
    gain = None if weight is None else tl.load(weight + column, column < width, 0.0)
    if CENTRE:
        wide = tl.where(inside, wide - tl.sum(wide, 1, keep_dims=True) / width, 0.0)
    wide *= inverse_root(tl.sum(wide * wide, 1, keep_dims=True) / width + eps)
    if gain is not None:
        wide *= gain.to(tl.float32)
    if bias is not None:
        wide += tl.load(bias + column, column < width, 0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * width + column, rounded(wide, out.dtype.element_ty), inside)


def _run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype, *, centre: bool, eps: float
) -> Tensor:
    x = rows_apart(x)
    weight, bias = (None if w is None else w.contiguous() for w in (weight, bias))
    b, s, width = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _norm.launch(
        lambda size: (triton.cdiv(b * s, size["ROWS"]),),
        *(x, weight, bias, out, b * s, s, *x.stride()[:2], eps),
        key=f"{name_of(x.dtype)}-{name_of(dtype)} d={width} centre={centre}",
        width=width,
        CENTRE=centre,
        WIDTH=triton.next_power_of_2(width),
    )
    return out


def _rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float) -> Tensor:
    return _run(x, weight, None, x.dtype, centre=False, eps=eps)


def _layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float, dtype: torch.dtype | None
) -> Tensor:
    return _run(x, weight, bias, dtype or x.dtype, centre=True, eps=eps)


KERNELS = {"layer_norm": Kernel(_layer_norm), "rms_norm": Kernel(_rms_norm)}
