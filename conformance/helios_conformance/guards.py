"""Memory whose surroundings are known: operands inside buffers with guard bytes, and allocations that are guarded too.

A kernel that writes beyond its tensors changes guard bytes. One that reads beyond them, or reads what it never wrote,
finds NaN of every floating dtype, which shows in its numbers. All of it is made with plain torch calls, for any device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LAYOUTS", "Allocations", "Guarded", "Layout", "Treatment", "dirty", "share_memory"]

GUARD = 512
"""Bytes before and after: the alignment of the strictest allocator in use, so that contents keep theirs."""

Layout = Literal["contiguous", "padded", "permuted"]
"""How an operand lies in its buffer. ``contiguous``: aligned, as a fresh tensor. ``padded``: one element off alignment,
guard bytes between rows. ``permuted``: one element off, dimensions in reverse order in memory, guards between them."""
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

Treatment = Literal["nan", "zero", "plain"]
"""What a run finds in memory that it did not write: NaN, zeros, or whatever the system left."""

_PAD = 3
_LARGEST_DIRTY = 1 << 26


@functools.cache
def _cycle() -> npt.NDArray[np.uint8]:
    place = np.arange(13 << 11)
    return np.where(place % 2, 0xFF, 0xF1 + place // 2 % 13).astype(np.uint8)


def _pattern(size: int) -> Tensor:
    """Bytes that read as NaN in every floating dtype, and differ from place to place."""
    return torch.from_numpy(np.tile(_cycle(), -(-size // len(_cycle())))[:size])


@functools.cache
def _pattern_on(device: torch.device) -> Tensor:
    return _pattern(GUARD).to(device)


def _strides(shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """In elements."""
    order = range(len(shape)) if layout == "permuted" else reversed(range(len(shape)))
    strides, step = [0] * len(shape), 2 if layout == "permuted" and len(shape) == 1 else 1
    for i, dim in enumerate(order):
        strides[dim] = step
        step *= shape[dim]
        if layout != "contiguous" and i == 0:
            step += _PAD
    return tuple(strides)


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if math.prod(shape) else 0


@dataclasses.dataclass(eq=False)
class Guarded:
    """One operand in a buffer of its own.

    Attributes:
        tensor: what the backend gets: on the device, of the operand's shape and dtype.
        buffer: uint8 on the device, the tensor inside.
        image: what the buffer must hold, on the host.
    """

    tensor: Tensor
    buffer: Tensor
    image: Tensor

    @staticmethod
    def of(host: Tensor, device: torch.device, layout: Layout = "contiguous") -> Guarded:
        """A copy of a host tensor on the device."""
        strides, size = _strides(host.shape, layout), host.element_size()
        start = GUARD // size + (layout != "contiguous")
        image = _pattern((start + _reach(host.shape, strides)) * size + GUARD)
        _inside(image, host, strides, start).copy_(host)
        buffer = image.to(device, copy=True)
        return Guarded(_inside(buffer, host, strides, start), buffer, image)

    def _inside(self, buffer: Tensor) -> Tensor:
        return _inside(buffer, self.tensor, self.tensor.stride(), int(self.tensor.storage_offset()))

    def write(self, host: Tensor) -> None:
        """Other contents at the same address."""
        self._inside(self.image).copy_(host)
        self.buffer.copy_(self.image)

    def broken(self) -> tuple[bool, bool]:
        """Whether the contents were changed, and whether the guard bytes were. The device must be synchronised."""
        now = self.buffer.to("cpu", copy=True)
        if torch.equal(now, self.image):
            return False, False
        kept = now.clone()
        self._inside(kept).copy_(self._inside(self.image))
        return not torch.equal(kept, now), not torch.equal(kept, self.image)


def _inside(buffer: Tensor, like: Tensor, strides: Sequence[int], start: int) -> Tensor:
    # Not a view in torch's sense: a kernel gets what an allocation would give it.
    empty = torch.empty(0, dtype=like.dtype, device=buffer.device)
    return empty.set_(buffer.untyped_storage(), start, tuple(like.shape), tuple(strides))


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the allocations behind two tensors overlap; False where the device gives no addresses."""
    if a.device != b.device:
        return False
    (start, size), (other, length) = ((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in (a, b))
    return bool(start and other) and start < other + length and other < start + size


def dirty(device: torch.device, sizes: Sequence[int], treatment: Treatment) -> None:
    """Leave NaN or zeros in memory that the device's allocator is about to hand out: it reaches allocations that
    no mode sees, those of compiled kernels.

    Args:
        device: whose memory.
        sizes: of the blocks, in bytes; larger ones than 64 MiB go back to the system, so they are left out.
        treatment: what to leave; nothing is done for ``plain``.
    """
    if treatment != "plain" and device.type != "meta":
        byte = 0xFF if treatment == "nan" else 0
        some = [size for size in sizes if size <= _LARGEST_DIRTY]
        blocks = [torch.empty(size, dtype=torch.uint8, device=device).fill_(byte) for size in some]
        del blocks


_aten = torch.ops.aten
_CLEARED: Mapping[Any, bool] = {
    _aten.empty.memory_format: False,
    _aten.empty_strided.default: False,
    _aten.empty_like.default: False,
    _aten.new_empty.default: False,
    _aten.new_empty_strided.default: False,
    _aten.zeros.default: True,
    _aten.zeros_like.default: True,
    _aten.new_zeros.default: True,
}
"""The allocations that are served here, and whether they promise zeros."""


class Allocations(TorchDispatchMode):
    """Within, allocations that Python code asks torch for come from larger buffers with guard bytes, poisoned inside.

    What compiled kernels allocate for themselves is not seen: ``count`` says how many were served.

    Args:
        treatment: ``nan`` or ``zero``, for the inside.
        device: where kernels allocate. The guard bytes are put there beforehand: while a stream is captured into a
            graph, nothing may be copied from the host.
    """

    def __init__(self, treatment: Treatment, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.treatment = treatment
        _pattern_on(device)
        self.buffers: list[tuple[Tensor, int]] = []  # and bytes between the guards

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions stay compiled: run eagerly under the mode they would give other bits."""
        return True

    @property
    def count(self) -> int:
        return len(self.buffers)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = _device_of(args, kwargs)
        if func not in _CLEARED or kwargs.get("pin_memory") or device.type == "meta":
            return func(*args, **kwargs)
        like = func(*args, **{**kwargs, "device": torch.device("meta")})
        if like.layout != torch.strided:
            return func(*args, **kwargs)
        return self._serve(like, device, _CLEARED[func])

    def _serve(self, like: Tensor, device: torch.device, cleared: bool) -> Tensor:
        size = like.element_size()
        inside = _reach(like.shape, like.stride()) * size
        buffer = torch.empty(inside + 2 * GUARD, dtype=torch.uint8, device=device)
        guard = _pattern_on(device)
        buffer[:GUARD].copy_(guard)
        buffer[GUARD + inside :].copy_(guard)
        buffer[GUARD : GUARD + inside].fill_(0xFF if self.treatment == "nan" and not cleared else 0)
        self.buffers.append((buffer, inside))
        return _inside(buffer, like, like.stride(), GUARD // size)

    def broken(self) -> int:
        """How many buffers have other guard bytes than they began with. The device must be synchronised."""
        return sum(not _intact(buffer, inside) for buffer, inside in self.buffers)


def _device_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    tensors = [x for x in args if isinstance(x, Tensor)]
    return tensors[0].device if tensors else torch.get_default_device()


def _intact(buffer: Tensor, inside: int) -> bool:
    guard = _pattern(GUARD)
    ends = (buffer[:GUARD], buffer[GUARD + inside :])
    return all(torch.equal(end.to("cpu"), guard) for end in ends)
