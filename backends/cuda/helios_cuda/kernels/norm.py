"""RMS norm and layer norm: a row is read once, stays in registers, and is written once.

Statistics in float32; the layer norm's in two passes over the registers (mean, then squared deviations). Each result is
rounded once, to the input's dtype, to float32, or by rows to e4m3 numbers (``layer_norm_quantize``). Weights are read
with each tile of rows, from the first-level cache; larger tiles read them less often.

Bytes at 384×640 in bfloat16: 20,480 a token, read and written, so 60, 93 and 226 MB at 2,940, 4,560 and 11,040 tokens
of width 5120; the 8,640 noisy tokens that see the text are 177 MB. About 5 FLOP an element: memory alone decides. A
layer norm into float32 writes 20,480 bytes a token and reads half of that. A quantised one reads 10,240 and writes
5,124: 133 MB at 8,640 tokens, 31 µs at 4.3 TB/s, where the norm and then a pass that quantises are 310 MB.

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
from helios_cuda.kernels.numerics import inverse_root
from helios_cuda.kernels.rows import as_bytes, converts, quantised_like, store_rows
from helios_cuda.launch import Tile, Tiled, name_of, rows_apart

__all__ = ["KERNELS"]


@triton.jit
def _norm(
    x,
    weight,
    bias,
    out,
    scales,
    rows,
    tokens,
    x_batch,
    x_row,
    eps,
    width: tl.constexpr,
    CENTRE: tl.constexpr,
    CONVERTS: tl.constexpr,
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
    store_rows(out, scales, row.to(tl.int64), rows, column, wide, width, CONVERTS)


_NORM = Tiled(
    _norm,
    "norm",
    (
        Tile({"ROWS": 1}, warps=8, stages=1),
        Tile({"ROWS": 2}, warps=8, stages=1),
        Tile({"ROWS": 2}, warps=16, stages=1),
        Tile({"ROWS": 4}, warps=16, stages=1),
    ),
    Tile({"ROWS": 128}),
)
_QUANTIZE = Tiled(
    _norm,
    "norm_quantize",
    (
        Tile({"ROWS": 1}, warps=4, stages=1),  # see residual._QUANTIZE
        Tile({"ROWS": 1}, warps=8, stages=1),
        Tile({"ROWS": 1}, warps=16, stages=1),
        Tile({"ROWS": 2}, warps=8, stages=1),
    ),
    Tile({"ROWS": 128}),
)


def _run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype | None, *, centre: bool, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Rows of a dtype; without one e4m3 numbers and the scale of each row."""
    x = rows_apart(x)
    weight, bias = (None if w is None else w.contiguous() for w in (weight, bias))
    b, s, width = x.shape
    out, scales = quantised_like(x) if dtype is None else (x.new_empty(x.shape, dtype=dtype), None)
    (_NORM if scales is None else _QUANTIZE).launch(
        lambda size: (triton.cdiv(b * s, size["ROWS"]),),
        *(x, weight, bias, as_bytes(out), scales, b * s, s, *x.stride()[:2], eps),
        key=f"{name_of(x.dtype)}-{name_of(out.dtype)} d={width} centre={centre}",
        width=width,
        CENTRE=centre,
        CONVERTS=dtype is None and converts(x.device),
        WIDTH=triton.next_power_of_2(width),
    )
    return out, scales


def _rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float) -> Tensor:
    return _run(x, weight, None, x.dtype, centre=False, eps=eps)[0]


def _layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float, dtype: torch.dtype | None
) -> Tensor:
    return _run(x, weight, bias, dtype or x.dtype, centre=True, eps=eps)[0]


def _layer_norm_quantize(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor | None]:
    return _run(x, weight, bias, None, centre=True, eps=eps)


KERNELS = {
    "layer_norm": Kernel(_layer_norm),
    "layer_norm_quantize": Kernel(_layer_norm_quantize),
    "rms_norm": Kernel(_rms_norm),
}
