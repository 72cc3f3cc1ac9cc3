"""Between host and device: copies that nobody waits for, and weights on their way to the device.

The driver copies from ordinary host memory through buffers of its own and the host waits; from pinned memory the
device fetches by itself. Pinned memory is dear, so a load goes through two slices of it in turn: while one is on its
way the host fills the other, changing the dtype in the same pass.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from helios_cuda import streams

__all__ = ["CudaLink", "Landing", "Link", "Mark", "Staging"]

SLICE = 32 << 20
"""Bytes of a slice: 0.6 ms on a bus of 55 GB/s, and so long that nothing but the copying counts."""

LANDING = 4 << 20
"""Bytes of a slice on the way back: frames of a chunk, 24 MB at 384 × 640, are emptied while they arrive."""

Mark = Any
"""A point in a queue of the device's work: all that was put there before it."""


class Link(Protocol):
    """A device's queue of computations, its queue of copies, and the host that fills both without waiting."""

    def pinned(self, nbytes: int) -> Tensor:
        """Host memory that the device reads by itself: uint8 ``[nbytes]``."""
        ...

    def send(self, target: Tensor, source: Tensor, after: Mark | None = None) -> Mark:
        """Queue a copy between pinned host memory and the device, to begin after a mark; returns its own mark."""
        ...

    def mark(self) -> Mark:
        """Where the computations are now."""
        ...

    def hold(self, mark: Mark) -> None:
        """Computations queued from now on begin after the mark."""
        ...

    def wait(self, mark: Mark) -> None:
        """The host waits for the mark."""
        ...


class CudaLink:
    """The current stream computes; two others copy, one each way: bytes on their way in wait for none on their way out,
    which wait for results."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def send(self, target: Tensor, source: Tensor, after: Mark | None = None) -> Mark:
        purpose = streams.LANDINGS if target.device.type == "cpu" else streams.SENDS
        copies = streams.of_device(self._device, purpose)
        if after is not None:
            copies.wait_event(after)
        with torch.cuda.stream(copies):
            target.copy_(source, non_blocking=True)
            return copies.record_event()

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self._device).record_event()

    def hold(self, mark: Mark) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def wait(self, mark: Mark) -> None:
        mark.synchronize()


class Staging:
    """Uploads tensors through two pinned slices, as long as a load takes.

    Args:
        link: to the device.
        device: where tensors go.
        nbytes: of a slice.
    """

    def __init__(self, link: Link, device: torch.device, nbytes: int = SLICE) -> None:
        self._link, self._device = link, device
        self._slices = [link.pinned(nbytes) for _ in range(2)]
        self._marks: list[Mark | None] = [None, None]
        self._turn = 0

    def upload(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A host tensor of any strides on the device, contiguous, in a dtype."""
        target = torch.empty(tensor.shape, dtype=dtype, device=self._device)
        # New memory may still be read by computations that were queued when it belonged to another tensor.
        free = self._link.mark()
        flat, source = target.view(-1), tensor.reshape(-1)
        count = self._slices[0].numel() // dtype.itemsize
        last: Mark | None = None
        for start in range(0, flat.numel(), count):
            piece = source[start : start + count]
            at = self._next()
            staged = self._slices[at][: piece.numel() * dtype.itemsize].view(dtype)
            staged.copy_(piece)
            last = self._marks[at] = self._link.send(flat[start : start + count], staged, free)
        if last is not None:
            self._link.hold(last)
        return target

    def _next(self) -> int:
        """The slice whose turn it is, when the device has read what was in it."""
        at, self._turn = self._turn, 1 - self._turn
        if self._marks[at] is not None:
            self._link.wait(self._marks[at])
        return at

    def finish(self) -> None:
        """Wait until the device has read all."""
        for mark in self._marks:
            if mark is not None:
                self._link.wait(mark)


class Landing:
    """Brings tensors to the host through two pinned slices, which it keeps.

    To copy into pinned memory of the result's own would save the host's copy; but results are kept, chunk by chunk, and
    pinned memory is dear to take and to hold.

    Args:
        link: to the device.
        nbytes: of a slice.
    """

    def __init__(self, link: Link, nbytes: int = LANDING) -> None:
        self._link = link
        self._slices = [link.pinned(nbytes) for _ in range(2)]

    def fetch(self, tensor: Tensor) -> Tensor:
        """A tensor of the device in ordinary host memory, contiguous, when what computes it is done."""
        landed = torch.empty(tensor.shape, dtype=tensor.dtype)
        if not tensor.numel():
            return landed
        source, ready = tensor.detach().contiguous().view(-1), self._link.mark()
        count = self._slices[0].numel() // tensor.element_size()
        waiting: tuple[Tensor, Tensor, Mark] | None = None
        for turn, (piece, target) in enumerate(zip(source.split(count), landed.view(-1).split(count), strict=True)):
            staged = self._slices[turn % 2][: piece.numel() * piece.element_size()].view(piece.dtype)
            mark = self._link.send(staged, piece, ready)
            self._empty(waiting)  # while this one is on its way
            waiting = target, staged, mark
        self._empty(waiting)
        return landed

    def _empty(self, waiting: tuple[Tensor, Tensor, Mark] | None) -> None:
        if waiting is not None:
            target, staged, mark = waiting
            self._link.wait(mark)
            target.copy_(staged)
