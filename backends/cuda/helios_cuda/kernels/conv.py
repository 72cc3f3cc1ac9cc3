"""Convolution over video as one product, without ever writing the patches: channels last, any kernel and stride.

Rows of the product are positions of the result, ``[b, t, h, w]`` in order; its inner dimension runs over the taps of
the kernel and, within a tap, over the channels, which lie side by side in memory. So a tile of the left operand is a
set of rows of x, each ``CHANNELS`` numbers long, whose addresses move by a constant from tap to tap; where a tap falls
outside of the picture the row is zero, and no padded copy of x exists. The weight is ``[o, kt, kh, kw, c]``, which is
also what cuDNN calls channels last. Sums and the bias are in float32, rounded once.

The VAE's widths are 96, 192 and 384, and a tile of the tensor cores is a power of two: 96 outputs in a tile of 128
would be a quarter for nothing. So a program has two tiles of outputs side by side, ``WIDE`` and half of that, over the
same left operand.

One chunk's decode (33 frames at 384 × 640) is 69.0 TFLOP in 37 convolutions, and 42.1 GB in bf16 if each reads its
input and writes its result once. But every row of x is fetched once a tap, out of the second-level cache: with 96
outputs that is 96 FLOP a byte, so that a cache of 5.5 TB/s would allow 530 TFLOP/s at full resolution (27 of the 69
TFLOP; a prediction). Programs follow each other along rows, so that those at work together share their neighbourhood.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from helios_cuda.kernels.layouts import channels_last, empty_last
from helios_cuda.kernels.numerics import dot, rounded
from helios_cuda.launch import Tile, Tiled, name_of

__all__ = ["conv3d"]

Triple = tuple[int, int, int]


@triton.jit
def _weights(weight, output, channel, outputs, C: tl.constexpr, TAPS: tl.constexpr, CHANNELS: tl.constexpr):
    """A tile ``[channels, outputs]`` of one tap."""
    places = weight + output.to(tl.int64)[:, None] * (TAPS * C) + channel[None, :]
    inside = (output < outputs)[:, None]
    if C % CHANNELS > 0:
        inside = inside & (channel < C)[None, :]
    return tl.trans(tl.load(places, inside, 0.0))


@triton.jit
def _finish(acc, bias, place, inside, output, outputs, apart, BIAS: tl.constexpr):
    """Add the bias, round, write."""
    if BIAS:
        acc += tl.load(bias + output, output < outputs, 0.0).to(tl.float32)[None, :]
    places = place[:, None] + output.to(tl.int64)[None, :] * apart
    inside = inside[:, None] & (output < outputs)[None, :]
    tl.store(places, rounded(acc, place.dtype.element_ty), inside)


@triton.jit
def _origin(at, shape, STEP: tl.constexpr, PAD: tl.constexpr):
    """Of positions of the result: the video, and the frame, row and column of x where their kernel begins."""
    left = (at % shape[2]).to(tl.int32) * STEP[2] - PAD[2]
    top = (at // shape[2] % shape[1]).to(tl.int32) * STEP[1] - PAD[1]
    frame = at // shape[2] // shape[1]
    early = (frame % shape[0]).to(tl.int32) * STEP[0] - PAD[0]
    return frame // shape[0], early, top, left


@triton.jit
def _within(early, top, left, size, PAD: tl.constexpr):
    """Which of these places of a tap are in the picture."""
    inside = left == left
    if PAD[0] > 0:
        inside = inside & (early >= 0) & (early < size[0])
    if PAD[1] > 0:
        inside = inside & (top >= 0) & (top < size[1])
    if PAD[2] > 0:
        inside = inside & (left >= 0) & (left < size[2])
    return inside


@triton.jit
def _conv3d(
    x,
    weight,
    bias,
    out,
    positions,
    outputs,
    out_t,
    out_h,
    out_w,
    t,
    h,
    w,
    x_batch,
    x_frame,
    x_row,
    x_column,
    out_batch,
    out_output,
    out_position,
    BIAS: tl.constexpr,
    C: tl.constexpr,
    KERNEL: tl.constexpr,
    STEP: tl.constexpr,
    PAD: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A tile of positions by ``WIDE + NARROW`` outputs."""
    across = tl.cdiv(outputs, WIDE + NARROW)  # neighbours share their rows of x
    at = (tl.program_id(0) // across).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    first = (tl.program_id(0) % across) * (WIDE + NARROW)
    batch, early, top, left = _origin(at, (out_t, out_h, out_w), STEP, PAD)
    corner = batch * x_batch + early.to(tl.int64) * x_frame + top.to(tl.int64) * x_row + left.to(tl.int64) * x_column
    wide = first + tl.arange(0, WIDE)
    acc = tl.zeros((POSITIONS, WIDE), tl.float32)
    if NARROW > 0:
        narrow = first + WIDE + tl.arange(0, NARROW)
        more = tl.zeros((POSITIONS, NARROW), tl.float32)
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    for step in range(TAPS * BLOCKS):  # one loop, so that loads run ahead over the edges of taps
        tap = step // BLOCKS
        channel = step % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
        kt, kh, kw = tap // (KERNEL[1] * KERNEL[2]), tap // KERNEL[2] % KERNEL[1], tap % KERNEL[2]
        inside = ((at < positions) & _within(early + kt, top + kh, left + kw, (t, h, w), PAD))[:, None]
        if C % CHANNELS > 0:
            inside = inside & (channel < C)[None, :]
        shift = kt.to(tl.int64) * x_frame + kh.to(tl.int64) * x_row + kw * x_column
        rows = tl.load(x + (corner + shift)[:, None] + channel[None, :], inside, 0.0)
        there = weight + tap * C
        acc = dot(rows, _weights(there, wide, channel, outputs, C, TAPS, CHANNELS), acc)
        if NARROW > 0:
            more = dot(rows, _weights(there, narrow, channel, outputs, C, TAPS, CHANNELS), more)
    place = out + at // (out_t * out_h * out_w) * out_batch + at % (out_t * out_h * out_w) * out_position
    _finish(acc, bias, place, at < positions, wide, outputs, out_output, BIAS)
    if NARROW > 0:
        _finish(more, bias, place, at < positions, narrow, outputs, out_output, BIAS)


def _sizes(positions: int, wide: int, narrow: int, channels: int) -> dict[str, int]:
    return {"POSITIONS": positions, "WIDE": wide, "NARROW": narrow, "CHANNELS": channels}


def _kernel(name: str, *candidates: Tile) -> Tiled:
    # Few programs for the interpreter, which takes the same time for one whatever its size.
    return Tiled(_conv3d, name, candidates, Tile(_sizes(512, 16, 8, 16)))


BROAD = _kernel(
    "conv3d_broad",
    Tile(_sizes(128, 128, 64, 64), warps=8, stages=4, shared=161),
    Tile(_sizes(128, 128, 64, 32), warps=8, stages=4),
    Tile(_sizes(128, 128, 64, 64), warps=8, stages=3, shared=121),
    Tile(_sizes(256, 64, 32, 32), warps=8, stages=4),
    Tile(_sizes(256, 64, 32, 64), warps=8, stages=4, shared=177),
    Tile(_sizes(256, 128, 0, 64), warps=8, stages=3, shared=145),
)
"""Multiples of 192 outputs: the inner levels."""
THIRDS = _kernel(
    "conv3d_thirds",
    Tile(_sizes(128, 64, 32, 32), warps=4, stages=4),
    Tile(_sizes(256, 64, 32, 32), warps=8, stages=4),
    Tile(_sizes(128, 64, 32, 64), warps=4, stages=3),
    Tile(_sizes(256, 64, 32, 64), warps=8, stages=4, shared=177),
)
"""Other multiples of 96: full resolution."""
OTHERS = _kernel(
    "conv3d",
    Tile(_sizes(128, 128, 0, 32), warps=8, stages=4),
    Tile(_sizes(128, 64, 0, 32), warps=4, stages=4),
)
FEW = _kernel(
    "conv3d_few",
    Tile(_sizes(128, 16, 0, 32), warps=4, stages=4),
    Tile(_sizes(256, 16, 0, 32), warps=4, stages=4),
    Tile(_sizes(256, 16, 0, 32), warps=8, stages=4),
)
"""At most 16 outputs: red, green and blue."""
SHALLOW = _kernel(
    "conv3d_shallow",
    Tile(_sizes(128, 64, 32, 16), warps=8, stages=4),
    Tile(_sizes(128, 128, 64, 16), warps=8, stages=4),
)
"""At most 16 channels: latents, or pixels."""
FLOAT32 = _kernel(
    "conv3d_fp32",
    Tile(_sizes(64, 32, 0, 16), warps=4, stages=3),
    Tile(_sizes(64, 64, 0, 16), warps=8, stages=3),
)
"""Products of float32 as such, on the ordinary cores."""


def _chosen(dtype: torch.dtype, channels: int, outputs: int) -> Tiled:
    if dtype == torch.float32:
        return FLOAT32
    if channels <= 16:
        return SHALLOW
    if outputs % 96 == 0:
        return THIRDS if outputs % 192 else BROAD
    return FEW if outputs <= 16 else OTHERS


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple, padding: Triple) -> Tensor:
    """As the op.

    Args:
        x: ``[b, c, t, h, w]``; best with channels last.
        weight: ``[o, c, kt, kh, kw]``, dense with channels last.
        bias: ``[o]``, contiguous.

    Returns:
        ``[b, o, …]``, dense with channels last; with channels first if ``o`` is no multiple of 8, as it is for pixels.
    """
    x = channels_last(x)
    b, channels, *size = x.shape
    outputs, kernel = weight.shape[0], weight.shape[2:]
    room = zip(size, padding, kernel, stride, strict=True)
    shape = [(n + 2 * pad - k) // step + 1 for n, pad, k, step in room]
    # A few odd outputs would be written two bytes at a time; planes of them are whole lines.
    out = x.new_empty(b, outputs, *shape) if outputs % 8 else empty_last(x, (b, outputs, *shape))
    positions = b * math.prod(shape)
    function = _chosen(x.dtype, channels, outputs)
    function.launch(
        lambda tile: (triton.cdiv(positions, tile["POSITIONS"]) * triton.cdiv(outputs, tile["WIDE"] + tile["NARROW"]),),
        *(x, weight, bias, out, positions, outputs, *shape, *size),
        *(x.stride(i) for i in (0, 2, 3, 4)),
        *(math.prod(shape) * outputs, *((math.prod(shape), 1) if outputs % 8 else (1, outputs))),
        key=f"{name_of(x.dtype)} c={channels} o={outputs} k={'x'.join(map(str, kernel))} w={shape[2]}",
        BIAS=bias is not None,
        C=channels,
        KERNEL=tuple(kernel),
        STEP=tuple(stride),
        PAD=tuple(padding),
    )
    return out
