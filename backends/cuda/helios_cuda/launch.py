"""Launching Triton functions: which tile, on which device; and what would be launched, without a device.

A kernel's wrapper allocates its outputs with torch, on the device of its operands, and calls ``Tiled.launch``. On a
GPU that launches. On the CPU Triton's interpreter runs it, where that was asked for (``helios_cuda.interpreter``).
Inside ``recording()`` it only notes the launch, and operands may be on ``meta``: so the very code that launches tells
the offline compiler which signatures, constants and grids there are, at the real sizes and without memory for them.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from helios_cuda import tables
from helios_cuda.architectures import block_shared
from helios_cuda.interpreter import as_a_gpu_would, interpreting
from helios_cuda.tables import Tile

__all__ = ["Launch", "Tile", "Tiled", "forced", "name_of", "recording", "rows_apart", "tiled"]

Grid = Callable[[Mapping[str, int]], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch that was noted: what the offline compiler needs to make the same binary.

    Args:
        kernel: the Triton function with its tiles.
        arguments: in the order of its signature, constants left out: tensors (maybe on ``meta``), numbers, ``None``.
        constants: compile-time constants by name, the tile's sizes included.
        tile: what was chosen.
        grid: programs along each axis.
        key: what the tables have it by.
        given: the arguments before any was made of the tile's sizes.
    """

    kernel: Tiled
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]
    tile: Tile
    grid: tuple[int, ...]
    key: str = ""
    given: tuple[Any, ...] = ()

    def retiled(self, tile: Tile) -> Launch:
        """The same with another tile, for the compiler: the grid is left as it was."""
        constants = {**self.constants, **tile.sizes}
        arguments = _made(self.given, constants)
        return dataclasses.replace(self, arguments=arguments, constants=constants, tile=tile)


_recorder: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("recorder", default=None)
_forced: contextvars.ContextVar[Tile | None] = contextvars.ContextVar("forced", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within, launches are noted and nothing runs; outputs are as they were allocated."""
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)


@contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Within, every launch takes this tile: for tuning, which does one kernel at a time."""
    token = _forced.set(tile)
    try:
        yield
    finally:
        _forced.reset(token)


def _made(arguments: tuple[Any, ...], sizes: Mapping[str, int]) -> tuple[Any, ...]:
    """Each function among the arguments makes one of the tile's sizes."""
    return tuple(x(sizes) if callable(x) else x for x in arguments)


class Tiled:
    """A Triton function and the tiles it may run with; see ``tiled``."""

    def __init__(self, function: Any, name: str, candidates: Sequence[Tile], interpreted: Tile | None) -> None:
        self.function, self.name, self.candidates = function, name, tuple(candidates)
        self.interpreted = interpreted if interpreting() else None

    def fitting(self, architecture: str) -> tuple[Tile, ...]:
        """The candidates that an architecture has the shared memory for: what may be chosen there, and tuned among."""
        room = block_shared(architecture)
        return tuple(tile for tile in self.candidates if tile.shared << 10 <= room)

    def chosen(self, key: str, device: torch.device) -> Tile:
        """What runs on a device: what was tuned there, else the first that fits."""
        return (
            self.interpreted or tables.look_up(self.name, key, device) or self.fitting(tables.architecture(device))[0]
        )

    def launch(self, grid: Grid, *arguments: Any, key: str = "", **constants: Any) -> None:
        """Launch on the device of the first tensor.

        Args:
            grid: programs along each axis, from the tile's sizes.
            arguments: of the Triton function, in order; a function makes one of the tile's sizes.
            key: what the choice of a tile depends on, such as ``bf16 d=5120``; the tables have it by this name.
            constants: compile-time constants beside the tile's sizes.
        """
        first = next(x for x in arguments if isinstance(x, Tensor))
        tile = _forced.get() or self.chosen(key, first.device)
        values = {**constants, **tile.sizes}
        size = grid(values)
        given, arguments = arguments, _made(arguments, values)
        noted = _recorder.get()
        if noted is not None:
            noted.append(Launch(self, arguments, values, tile, size, key, given))
        elif all(size):  # a launch of no programs is an error to CUDA, and means nothing to do
            with as_a_gpu_would():
                self.function[size](*arguments, **values, num_warps=tile.warps, num_stages=tile.stages)


def tiled(*candidates: Tile, interpreted: Tile | None = None) -> Callable[[Any], Tiled]:
    """Decorates a ``triton.jit`` function with its candidate tiles; the first one serves where nothing was tuned.

    Args:
        candidates: to tune among.
        interpreted: for the interpreter, which takes the same time for a program whatever its size.
    """

    def decorate(function: Any) -> Tiled:
        return Tiled(function, function.__name__.strip("_"), candidates, interpreted)

    return decorate


def rows_apart(x: Tensor) -> Tensor:
    """x with its last dimension contiguous; other strides are free, so that parts of a fused buffer need no copy."""
    return x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()


def name_of(dtype: torch.dtype) -> str:
    """How the tables call a dtype."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "e4m3"}
    return short.get(dtype, str(dtype)[6:])
