"""The window of past latents that a chunk sees, and the anchor frame before it.

With an anchor (``keep_first_frame``, as published) the window holds 19 latent frames, oldest first: 16 seen coarsely
("long"), 2 finer ("mid") and 1 in full. The short group is the anchor and that one frame. Without an anchor the short
group has one more frame of history instead, so the window holds 20. (The published code counts 19 there and fails.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from helios.errors import InputError
from helios.model.transformer import FrameIndices, frame_indices

__all__ = ["CHUNK_LATENTS", "Window"]

CHUNK_LATENTS = 9
"""Latent frames of a chunk, as trained."""


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """Which past frames a chunk sees.

    Args:
        sizes: latent frames of the long, mid and short group, without the anchor.
        keep_first_frame: the short group starts with the anchor.

    >>> Window().length, Window(keep_first_frame=False).length
    (19, 20)
    """

    sizes: tuple[int, int, int] = (16, 2, 1)
    keep_first_frame: bool = True

    @staticmethod
    def of(sizes: Sequence[int], keep_first_frame: bool) -> Window:
        """The window of these sizes in any order, the largest furthest back, as published."""
        if len(sizes) != 3 or min(sizes) < 1:
            raise InputError(f"history_sizes {list(sizes)}: wanted three whole numbers of at least 1", "use 16, 2, 1")
        long, mid, short = sorted(sizes, reverse=True)
        return Window((long, mid, short), keep_first_frame)

    @property
    def length(self) -> int:
        """Latent frames of history that the next chunk needs."""
        return sum(self.sizes) + (not self.keep_first_frame)

    @property
    def indices(self) -> FrameIndices:
        """Time positions for the transformer."""
        return frame_indices(self.sizes, CHUNK_LATENTS, keep_first_frame=self.keep_first_frame)

    def start(self, like: Tensor, batch: int, newest: Tensor | None = None) -> Tensor:
        """History before the first chunk: zeros, and behind them what is given.

        Args:
            like: one or more latent frames ``[·, c, ·, h, w]`` of the run's size.
            batch: videos.
            newest: latents ``[b, c, t, h, w]`` of an image or a video.
        """
        _, channels, _, height, width = like.shape
        empty = like.new_zeros((batch, channels, self.length, height, width))
        return empty if newest is None else self.extend(empty, newest)

    def extend(self, history: Tensor, latents: Tensor) -> Tensor:
        """The window after these latents: ``[b, c, length, h, w]``, a copy that holds on to nothing else."""
        return torch.cat([history, latents], dim=2)[:, :, -self.length :].clone()

    def inputs(self, history: Tensor, anchor: Tensor | None) -> dict[str, Tensor]:
        """The transformer's history inputs, by name.

        Args:
            history: the window ``[b, c, length, h, w]``.
            anchor: ``[b, c, 1, h, w]``; ``None`` is the start of a video from text, where zeros stand for it.
        """
        tail = self.length - self.sizes[0] - self.sizes[1]
        long, mid, short = history.split([self.sizes[0], self.sizes[1], tail], dim=2)
        if self.keep_first_frame:
            first = torch.zeros_like(short[:, :, :1]) if anchor is None else anchor
            short = torch.cat([first, short], dim=2)
        return {"history_long": long, "history_mid": mid, "history_short": short}
