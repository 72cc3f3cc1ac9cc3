"""The convolution of ``kernels.conv`` with its operands fetched by the hardware's copies of boxes (sm_90 and newer).

A tile of positions is a box of rows and columns of one frame. The copy engine fetches a box of x whose corner moves
with the tap, and fills with zeros what lies outside of the video: no addresses, no masks, no registers, so that the
warps only multiply. It wants a stride of 1, addresses that are multiples of 16 bytes, and channels in whole tiles; the
first convolution of the decoder and its last have other sizes, and take the other kernel.

Boxes are 16 columns wide, which divides 640, 320, 160 and 80. Work and bytes are those of ``kernels.conv``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from helios_cuda.kernels.layouts import channels_last, empty_last
from helios_cuda.kernels.numerics import dot, rounded
from helios_cuda.launch import Tile, Tiled, name_of

__all__ = ["conv3d", "fits"]

Triple = tuple[int, int, int]


@triton.jit
def _finish(acc, bias, out, at, inside, output, outputs, BIAS: tl.constexpr):
    """Add the bias, round, write."""
    if BIAS:
        acc += tl.load(bias + output, output < outputs, 0.0).to(tl.float32)[None, :]
    places = out + at[:, None] * outputs + output[None, :]
    tl.store(places, rounded(acc, out.dtype.element_ty), inside[:, None] & (output < outputs)[None, :])


@triton.jit
def _conv3d_boxes(
    x,
    weight,
    more_weight,
    bias,
    out,
    outputs,
    out_t,
    out_h,
    out_w,
    BIAS: tl.constexpr,
    C: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PAD_T: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A box of positions by ``WIDE + NARROW`` outputs."""
    across = tl.cdiv(outputs, WIDE + NARROW)
    first = tl.program_id(0) % across * (WIDE + NARROW)
    box = tl.program_id(0) // across
    columns = tl.cdiv(out_w, COLUMNS)
    left = box % columns * COLUMNS
    box = box // columns
    down = tl.cdiv(out_h, ROWS)
    top = box % down * ROWS
    frame = box // down
    acc = tl.zeros((ROWS * COLUMNS, WIDE), tl.float32)
    if NARROW > 0:
        more = tl.zeros((ROWS * COLUMNS, NARROW), tl.float32)
    BLOCKS: tl.constexpr = C // CHANNELS
    for step in range(KT * KH * KW * BLOCKS):
        tap = step // BLOCKS
        channel = step % BLOCKS * CHANNELS
        early = frame % out_t + tap // (KH * KW) - PAD_T
        row, column = top + tap // KW % KH - PAD_H, left + tap % KW - PAD_W
        part = x.load([frame // out_t, early, row, column, channel]).reshape(ROWS * COLUMNS, CHANNELS)
        acc = dot(part, weight.load([first, tap * C + channel]).T, acc)
        if NARROW > 0:
            more = dot(part, more_weight.load([first + WIDE, tap * C + channel]).T, more)
    row = top + tl.arange(0, ROWS)[:, None]
    column = left + tl.arange(0, COLUMNS)[None, :]
    at = tl.reshape((frame.to(tl.int64) * out_h + row) * out_w + column, (ROWS * COLUMNS,))
    inside = tl.reshape((row < out_h) & (column < out_w), (ROWS * COLUMNS,))
    _finish(acc, bias, out, at, inside, first + tl.arange(0, WIDE), outputs, BIAS)
    if NARROW > 0:
        _finish(more, bias, out, at, inside, first + WIDE + tl.arange(0, NARROW), outputs, BIAS)


def _sizes(rows: int, columns: int, wide: int, narrow: int, channels: int) -> dict[str, int]:
    return {"ROWS": rows, "COLUMNS": columns, "WIDE": wide, "NARROW": narrow, "CHANNELS": channels}


_INTERPRETED = Tile(_sizes(2, 16, 64, 32, 32))
BROAD = Tiled(
    _conv3d_boxes,
    "conv3d_boxes_broad",
    (
        Tile(_sizes(8, 16, 128, 64, 64), warps=8, stages=4, shared=161),
        Tile(_sizes(8, 16, 64, 32, 32), warps=4, stages=4),  # the next one spills on sm_120
        Tile(_sizes(8, 16, 128, 64, 32), warps=8, stages=4),
        Tile(_sizes(8, 16, 128, 64, 64), warps=8, stages=3, shared=121),
        Tile(_sizes(16, 16, 64, 32, 64), warps=8, stages=4, shared=177),
        Tile(_sizes(16, 16, 128, 0, 64), warps=8, stages=3, shared=145),
        Tile(_sizes(8, 16, 128, 0, 64), warps=8, stages=4, shared=129),
    ),
    _INTERPRETED,
)
"""Multiples of 192 outputs."""
THIRDS = Tiled(
    _conv3d_boxes,
    "conv3d_boxes_thirds",
    (
        Tile(_sizes(8, 16, 64, 32, 32), warps=4, stages=4),
        Tile(_sizes(16, 16, 64, 32, 32), warps=8, stages=4),
        Tile(_sizes(16, 16, 64, 32, 32), warps=8, stages=6, shared=133),
    ),
    _INTERPRETED,
)
"""Other multiples of 96."""


def fits(x: Tensor, weight: Tensor, stride: Triple) -> str:
    """Why these operands cannot be fetched by boxes; ``""`` if they can."""
    if x.element_size() != 2 or max(stride) > 1:
        return "not 16 bits, or with a stride"
    if weight.shape[0] % 96 or x.shape[1] % 96:
        return "channels that are no multiples of 96"
    steps = (*(n for size, n in zip(x.shape, x.stride(), strict=True) if size > 1 and n > 1), x.storage_offset())
    if x.stride(1) != 1 or any(n % 8 for n in steps):
        return "addresses that are no multiples of 16 bytes"
    return ""


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Triple) -> Tensor:
    """As ``kernels.conv.conv3d``, where ``fits`` has nothing against it."""
    x = channels_last(x)
    b, channels, *size = x.shape
    outputs, kernel = weight.shape[0], weight.shape[2:]
    shape = [n + 2 * pad - k + 1 for n, pad, k in zip(size, padding, kernel, strict=True)]
    out = empty_last(x, (b, outputs, *shape))
    matrix = weight.permute(0, 2, 3, 4, 1).flatten(1)
    (THIRDS if outputs % 192 else BROAD).launch(
        lambda tile: (
            b
            * shape[0]
            * triton.cdiv(shape[1], tile["ROWS"])
            * triton.cdiv(shape[2], tile["COLUMNS"])
            * triton.cdiv(outputs, tile["WIDE"] + tile["NARROW"]),
        ),
        _boxes(x.permute(0, 2, 3, 4, 1), lambda tile: [1, 1, tile["ROWS"], tile["COLUMNS"], tile["CHANNELS"]]),
        _boxes(matrix, lambda tile: [tile["WIDE"], tile["CHANNELS"]]),
        _boxes(matrix, lambda tile: [tile["NARROW"] or tile["WIDE"], tile["CHANNELS"]]),
        *(bias, out, outputs, *shape),
        key=f"{name_of(x.dtype)} c={channels} o={outputs} k={'x'.join(map(str, kernel))} w={shape[2]}",
        BIAS=bias is not None,
        C=channels,
        **dict(zip(("KT", "KH", "KW"), kernel, strict=True)),
        **dict(zip(("PAD_T", "PAD_H", "PAD_W"), padding, strict=True)),
    )
    return out


def _boxes(x: Tensor, box: Callable[[Mapping[str, int]], list[int]]) -> Callable[[Mapping[str, int]], TensorDescriptor]:
    """What the copy engine has to know, once the tile is chosen. A dimension of size 1 takes a step that it allows."""
    steps = [n if size > 1 else x.shape[-1] for size, n in zip(x.shape[:-1], x.stride(), strict=False)]
    return lambda tile: TensorDescriptor(x, list(x.shape), [*steps, 1], box(tile))
