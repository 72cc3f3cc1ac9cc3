"""Draws for a chunk before it begins: the same bits, as each is keyed by what it is for, not by when it is made."""

from __future__ import annotations

from torch import Tensor

from helios.sampler.noise import CounterNoise

__all__ = ["AheadNoise"]

Key = tuple[int, tuple[int, ...]]
"""Pyramid stage (0 for the chunk's beginning) and shape."""


class AheadNoise(CounterNoise):
    """``CounterNoise`` that can draw all of a chunk at a time when the host has nothing else to do.

    What one chunk asked for is what is drawn for another. It is held until it is asked for, or something else is drawn.
    """

    def __init__(self, seed: int, first_video: int = 0) -> None:
        super().__init__(seed, first_video)
        self._asked: dict[Key, None] = {}
        self._chunk = -1
        self._ready: dict[Key, Tensor] = {}

    def latents(self, chunk: int, shape: tuple[int, ...]) -> Tensor:
        return self._take(chunk, (0, shape))

    def block(self, chunk: int, stage: int, shape: tuple[int, ...]) -> Tensor:
        return self._take(chunk, (stage, shape))

    def draw(self, chunk: int) -> None:
        """Draw for a chunk what was asked for since the last time."""
        self._chunk, self._ready = chunk, {key: self._draw(chunk, key) for key in self._asked}
        self._asked = {}

    def _take(self, chunk: int, key: Key) -> Tensor:
        self._asked[key] = None
        ready = self._ready.pop(key, None) if chunk == self._chunk else None
        return self._draw(chunk, key) if ready is None else ready

    def _draw(self, chunk: int, key: Key) -> Tensor:
        stage, shape = key
        return super().block(chunk, stage, shape) if stage else super().latents(chunk, shape)
