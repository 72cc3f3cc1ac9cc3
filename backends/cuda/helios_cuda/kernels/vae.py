"""The VAE beside its convolutions: norms over channels, and movements that keep the layout.

``channel_norm`` and ``channel_norm_silu`` read x once and write the result once; a position's channels stay in
registers between the sum of their squares and the quotient. With channels last a program has a tile of positions, whose
channels lie side by side; with channels first (what a latent comes as) the positions lie side by side, and a tile of
more of them fills whole lines of memory. Triton vectorises along whichever has stride 1.

Bytes of one chunk's decode at 384 × 640 in bf16, one pass: the 29 fused norms 33.9 GB of the 144.4 GB that all its ops
read and write (7.9 ms at 4.3 TB/s); apart, norm and SiLU would be 67.8 GB. The padding in front of the causal
convolutions is 35.5 GB as an op and next to nothing as a room (``layouts``). ``upsample_nearest`` 6.1 GB and
``interleave_frames`` 0.8 GB are torch's own strided copies, by words of 8 bytes: no kernel of ours would move less.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from helios import op
from helios.backend import Kernel
from helios_cuda.kernels.layouts import by_words, empty_as, is_last, rows, take_room, video, with_room
from helios_cuda.kernels.numerics import rounded
from helios_cuda.launch import Tile, Tiled, name_of

__all__ = ["KERNELS"]

CAUSAL = 2
"""Frames before a causal convolution of three."""


@triton.jit
def _channel_norm(
    x,
    gamma,
    out,
    positions,
    channels,
    x_batch,
    x_channel,
    x_position,
    out_batch,
    out_channel,
    out_position,
    root,
    eps,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """A tile of positions of one video, all their channels."""
    POSITIONS: tl.constexpr = ELEMENTS // CHANNELS if ELEMENTS > CHANNELS else 1
    batch = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (at < positions) & (channel < channels)
    value = tl.load(x + batch * x_batch + at * x_position + channel.to(tl.int64) * x_channel, inside, 0.0)
    wide = value.to(tl.float32)
    length = tl.sqrt_rn(tl.sum(wide * wide, 1, keep_dims=True))
    length = tl.where(length < eps, eps, length)  # and NaN stays NaN
    gain = tl.load(gamma + channel, channel < channels, 0.0).to(tl.float32) * root
    wide = wide / length * gain
    if SILU:
        wide = wide / (1.0 + tl.exp(-wide))
    places = out + batch * out_batch + at * out_position + channel.to(tl.int64) * out_channel
    tl.store(places, rounded(wide, value.dtype), inside)


_LAST = Tiled(
    _channel_norm,
    "channel_norm_last",
    (
        Tile({"ELEMENTS": 4096}, warps=4, stages=1),
        Tile({"ELEMENTS": 8192}, warps=8, stages=1),
        Tile({"ELEMENTS": 2048}, warps=4, stages=1),
        Tile({"ELEMENTS": 8192}, warps=4, stages=1),
    ),
    Tile({"ELEMENTS": 65536}),
)
_FIRST = Tiled(
    _channel_norm,
    "channel_norm_first",
    (
        Tile({"ELEMENTS": 8192}, warps=4, stages=1),
        Tile({"ELEMENTS": 16384}, warps=8, stages=1),
    ),
    Tile({"ELEMENTS": 65536}),
)


def _step(x: Tensor) -> int | None:
    """How far apart in memory positions of a video are that follow each other; ``None`` where that varies."""
    _, _, t, h, w = x.shape
    frame, row, column = x.stride()[2:]
    step = column if w > 1 else row if h > 1 else frame
    even = (t == 1 or frame == h * w * step) and (h == 1 or row == w * step) and (w == 1 or column == step)
    return step if even else None


def _normed(x: Tensor, gamma: Tensor, eps: float, *, silu: bool) -> Tensor:
    if _step(x) is None:
        x = video(rows(x).contiguous())
    b, c, t, h, w = x.shape
    out = with_room(x, CAUSAL) if silu else empty_as(x, tuple(x.shape))
    (_LAST if is_last(x) else _FIRST).launch(
        lambda size: (triton.cdiv(t * h * w, max(1, size["ELEMENTS"] // triton.next_power_of_2(c))), b),
        *(x, gamma.contiguous(), out, t * h * w, c),
        *(n for y in (x, out) for n in (y.stride(0), y.stride(1), _step(y))),
        *(math.sqrt(c), eps),
        key=f"{name_of(x.dtype)} c={c} silu={silu}",
        SILU=silu,
        CHANNELS=triton.next_power_of_2(c),
    )
    return out


def _channel_norm_of(x: Tensor, gamma: Tensor, *, eps: float) -> Tensor:
    return _normed(x, gamma, eps, silu=False)


def _channel_norm_silu(x: Tensor, gamma: Tensor, *, eps: float) -> Tensor:
    """In the VAE a causal convolution follows, so there is room before the result."""
    return _normed(x, gamma, eps, silu=True)


def _upsample_nearest(x: Tensor) -> Tensor:
    if not is_last(x):
        y: Tensor = op.get("upsample_nearest").fn(x)
        return y
    b, c, t, h, w = x.shape
    words = by_words(rows(x))
    out = words[:, :, :, None, :, None].expand(b, t, h, 2, w, 2, words.shape[-1]).contiguous()
    return video(out.view(x.dtype).view(b, t, 2 * h, 2 * w, c))


def _interleave_frames(x: Tensor) -> Tensor:
    if not is_last(x):
        y: Tensor = op.get("interleave_frames").fn(x)
        return y
    b, c, t, h, w = x.shape
    words = by_words(rows(x).unflatten(-1, (2, c // 2)))
    out = words.permute(0, 1, 4, 2, 3, 5).contiguous()
    return video(out.view(x.dtype).view(b, 2 * t, h, w, c // 2))


def _last_frames(x: Tensor, *, count: int) -> Tensor:
    part = x[:, :, x.shape[2] - count :]
    whole = torch.contiguous_format
    return video(rows(part).clone(memory_format=whole)) if is_last(x) else part.clone(memory_format=whole)


def _pad_zero(x: Tensor, *, before: tuple[int, int, int], after: tuple[int, int, int]) -> Tensor:
    if min(*before, *after) < 0:  # cut, not padded
        return F.pad(x, [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair])
    if not any((*before[1:], *after)):
        whole = take_room(x, before[0])
        if whole is not None:
            whole[:, :, : before[0]].zero_()
            return whole
    sizes = (n + sum(edge) for n, edge in zip(x.shape[2:], zip(before, after, strict=True), strict=True))
    out = inner = empty_as(x, (*x.shape[:2], *sizes))
    for dim, (front, back) in enumerate(zip(before, after, strict=True), start=2):
        size = inner.shape[dim]
        inner.narrow(dim, 0, front).zero_()
        inner.narrow(dim, size - back, back).zero_()
        inner = inner.narrow(dim, front, size - front - back)
    inner.copy_(x)
    return out


def _concat(xs: list[Tensor], *, dim: int) -> Tensor:
    dim %= xs[0].ndim
    if len(xs) == 2 and xs[1].ndim == 5 and dim == 2:
        frames = xs[0].shape[2]
        whole = take_room(xs[1], frames)
        if whole is not None:
            whole[:, :, :frames].copy_(xs[0])
            return whole
    if all(is_last(x) for x in xs):
        return video(torch.cat([rows(x) for x in xs], dim=(0, 4, 1, 2, 3)[dim]))
    return torch.cat(xs, dim=dim)


KERNELS = {
    "channel_norm": Kernel(_channel_norm_of),
    "channel_norm_silu": Kernel(_channel_norm_silu),
    "concat": Kernel(_concat),
    "interleave_frames": Kernel(_interleave_frames),
    "last_frames": Kernel(_last_frames),
    "pad_zero": Kernel(_pad_zero),
    "upsample_nearest": Kernel(_upsample_nearest),
}
