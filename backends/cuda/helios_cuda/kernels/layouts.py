"""How videos ``[b, c, t, h, w]`` lie in memory; and rooms, for causal padding without a copy.

Channels last (those of a position side by side) is what convolutions want, so it flows through the whole VAE: every
kernel here gives its result in the layout of its input, and a convolution always gives channels last.

A kernel whose result a causal convolution will want with frames before it allocates these as well and leaves them
unwritten: a *room*. Whoever puts frames in front takes the room, once, and writes them there instead of copying the
whole video. The room is the result's own memory and nobody else's, so no operand is written to.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["channels_last", "empty_as", "empty_last", "is_last", "rows", "take_room", "video", "with_room"]

_ROOM = "helios_room"


def is_last(x: Tensor) -> bool:
    """Whether the channels of a position lie side by side."""
    return x.ndim == 5 and x.shape[1] > 1 and x.stride(1) == 1


def rows(x: Tensor) -> Tensor:
    """The view ``[b, t, h, w, c]``."""
    return x.permute(0, 2, 3, 4, 1)


def video(x: Tensor) -> Tensor:
    """The view ``[b, c, t, h, w]`` of ``[b, t, h, w, c]``."""
    return x.permute(0, 4, 1, 2, 3)


def channels_last(x: Tensor) -> Tensor:
    """x with channels last; other strides are free, so that part of a video needs no copy."""
    return x if x.shape[1] < 2 or is_last(x) else video(rows(x).contiguous())


def empty_last(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory for a video with channels last, of the dtype and on the device of x.

    Made by hand, since torch's own name for the layout says nothing where several sizes are 1.
    """
    b, c, *rest = shape
    return video(x.new_empty(b, *rest, c))


def empty_as(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory for a video in the layout of x: dense, channels last or first."""
    return empty_last(x, shape) if is_last(x) else x.new_empty(shape)


def with_room(x: Tensor, frames: int) -> Tensor:
    """Memory like x's, in its layout, with room for so many frames before it."""
    b, c, t, h, w = x.shape
    whole = empty_as(x, (b, c, frames + t, h, w))
    part = whole[:, :, frames:]
    vars(part)[_ROOM] = whole
    return part


def take_room(x: Tensor, frames: int) -> Tensor | None:
    """x with so many unwritten frames before it, in memory that x is part of already; ``None`` where there is no room
    or somebody took it."""
    whole: Tensor | None = vars(x).get(_ROOM)
    if whole is None or whole.shape[2] - x.shape[2] < frames:
        return None
    del vars(x)[_ROOM]
    return whole.narrow(2, whole.shape[2] - x.shape[2] - frames, x.shape[2] + frames)


def by_words(x: Tensor) -> Tensor:
    """x in words of 8 bytes along its last dimension, where it lies so; copies then move four numbers at a time."""
    n = 8 // x.element_size()
    steps = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    if n == 1 or x.stride(-1) != 1 or any(step % n for step in steps) or (x.data_ptr() % 8 if not x.is_meta else 0):
        return x
    return x.view(torch.int64)
