"""Weights that do not fit: kept in pinned host memory, and fetched ahead of their use while others are multiplied.

The published weights are 28.6 GB in bf16 and 14.3 GB in fp8. What is not resident crosses the bus once a forward, and
a forward takes at least as long as that. Were all of it fetched, and nothing else took time (predictions, not
measurements):

====================  ===============  =====================  =====================
bus                   s a forward      FPS at most, [1,1,1]   FPS at most, [2,2,2]
====================  ===============  =====================  =====================
PCIe 5, 55 GB/s       0.52 (fp8 0.26)  21 (42)                10.6 (21)
PCIe 4, 25 GB/s       1.14 (fp8 0.57)  9.6 (19)               4.8 (9.6)
====================  ===============  =====================  =====================

So as much stays resident as there is room for, spread evenly over the blocks, that the bus is busy all the time and not
only in some of them; what the prompt's phase alone reads (4.2 GB of text keys' and values' weights) is the first to go.
A card of 24 GB keeps some 16.6 GB (``RESERVE`` is for the slots, activations, contexts and the VAE) and fetches the
other 7.8 GB a forward: 0.14 or 0.31 s.

A handle, as a kernel's ``prepare`` made it on the device, is laid into one piece of pinned memory and fetched by one
copy into the next of a few slots on the device. The order of use is known, so the copies run up to ``SLOTS`` − 1
handles ahead (two blocks' worth, that the copies go on during attention, which reads no weights). Steps are not
captured then: at these times the host is never what is waited for.

A new prompt may need the device for its text encoder, with which even the resident weights have no room. Then they step
``aside``: the host gets a copy of them as well, the first time, and they return before the next run. On a card of 24 GB
that is 16.6 GB there and back, 0.3 s each way on PCIe 5 and 0.7 s on PCIe 4 (predicted), and as much more host memory.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Collection, Hashable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as trees

from helios.errors import BackendError
from helios_cuda.failures import sized
from helios_cuda.staging import Link, Mark

__all__ = ["RESERVE", "Streamed"]

SLOTS = 8
"""Handles on the device at a time, of those that are fetched: of 157 MB at most, so 1.3 GB."""
RESERVE = 8 << 30
"""Bytes that resident weights leave free."""
ARENA = 1 << 30
"""Bytes of pinned memory taken at a time: torch rounds each request up to a power of two."""
ALIGNED = 256
"""Bytes; as torch aligns what it allocates, since kernels load 16 bytes at a time."""


class Streamed(MutableMapping[Hashable, Any]):
    """Handles by key, as ``KernelProgram`` keeps them; those that are not resident are fetched when they are read.

    Args:
        link: to the device.
        device: where handles are used.
        resident: the part of each byte that stays on the device, 0 to 1.
        seldom: keys that never stay there.
        slots: handles that may be on the device at a time beside those that stay.
    """

    def __init__(
        self, link: Link, device: torch.device, resident: float, seldom: Collection[Hashable] = (), slots: int = SLOTS
    ) -> None:
        self._link, self._device, self._resident, self._seldom = link, device, resident, seldom
        self._arena = _Arena(link)
        self._kept: dict[Hashable, Any] = {}
        self._away: dict[Hashable, _Packed] = {}
        self._bytes = [0, 0]  # seen, sent away
        self._count = slots
        self._slots: collections.deque[_Slot] = collections.deque()
        self._run: _Ahead | None = None
        self._copies: dict[Hashable, _Packed] = {}  # on the host, of what is kept: made by the first step aside
        self._aside: list[Hashable] = []

    # What a load does.

    def __setitem__(self, key: Hashable, handle: Any) -> None:
        leaves = [x for x in trees.tree_leaves(handle) if isinstance(x, Tensor)]
        size = sum(x.nbytes for x in leaves)
        self._bytes[0] += size
        seldom = key in self._seldom
        behind = self._bytes[1] < (1 - self._resident) * self._bytes[0]
        if size and (seldom or behind) and _is_plain(handle):
            self._bytes[1] += 0 if seldom else size
            self._away[key] = _Packed.pack(handle, self._arena)
        else:
            self._kept[key] = handle
        if seldom:
            self._bytes[0] -= size

    def __delitem__(self, key: Hashable) -> None:
        self._return()
        self._copies.pop(key, None)
        del (self._away if key in self._away else self._kept)[key]

    def clear(self) -> None:
        self.end()
        for held in (self._kept, self._away, self._copies, self._aside, self._slots):
            held.clear()
        self._bytes, self._arena = [0, 0], _Arena(self._link)

    # What a run does.

    def begin(self, keys: Sequence[Hashable]) -> None:
        """A run begins that reads these keys in this order; the first are fetched at once."""
        self._return()
        away = [key for key in keys if key in self._away]
        if away and not self._slots:
            size, free = max(packed.nbytes for packed in self._away.values()), self._link.mark()
            memory = (torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(self._count))
            self._slots.extend(_Slot(piece, free) for piece in memory)
        self._run = _Ahead(self._link, self._slots, [(key, self._away[key]) for key in away]) if away else None

    def end(self) -> None:
        """The run has been launched, or broken off."""
        if self._run is not None:
            self._run.end()
        self._run = None

    def aside(self) -> bool:
        """Give back all memory of the device until the next run; False, and nothing is done, where the host has none.

        What is no plain piece of memory stays.
        """
        self.end()
        plain = {key: handle for key, handle in self._kept.items() if _is_plain(handle)}
        try:
            for key, handle in plain.items():
                if key not in self._copies:
                    self._copies[key] = _Packed.pack(handle, self._arena)
        except BackendError:
            return False
        for key in plain:
            del self._kept[key]
        self._aside += plain
        self._slots.clear()
        return True

    def _return(self) -> None:
        for key in self._aside:
            self._kept[key] = self._copies[key].at_once(self._device)
        self._aside = []

    def __getitem__(self, key: Hashable) -> Any:
        self._return()
        if key in self._kept:
            return self._kept[key]
        if self._run is None:
            return self._away[key].at_once(self._device)
        return self._run.take(key)

    def __contains__(self, key: object) -> bool:
        return key in self._kept or key in self._away or key in self._aside

    def __iter__(self) -> Iterator[Hashable]:
        yield from self._kept
        yield from self._aside
        yield from self._away

    def __len__(self) -> int:
        return len(self._kept) + len(self._aside) + len(self._away)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes that stay on the device, and that are fetched."""
        kept = (x for x in trees.tree_leaves(list(self._kept.values())) if isinstance(x, Tensor))
        return sum(x.nbytes for x in kept), sum(packed.nbytes for packed in self._away.values())


def _is_plain(handle: Any) -> bool:
    """Whether it has tensors, and each of them is a plain piece of memory."""
    leaves = [x for x in trees.tree_leaves(handle) if isinstance(x, Tensor)]
    return bool(leaves) and all(_dense(x) for x in leaves)


def _dense(x: Tensor) -> bool:
    """Whether its elements fill a piece of memory, in whatever order: a plain copy of that piece is a copy of it."""
    sides = sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    step = 1
    for stride, size in sides:
        if stride != step:
            return False
        step *= size
    return x.numel() > 0


class _Arena:
    """Pinned memory in few large pieces."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free: Tensor | None = None
        self._taken = 0

    def take(self, nbytes: int) -> Tensor:
        if self._free is None or self._free.numel() < nbytes:
            size = max(nbytes, ARENA)
            try:
                self._free = self._link.pinned(size)
            except RuntimeError as error:
                raise BackendError(
                    f"the host has no {sized(size)} to pin for weights, after {sized(self._taken)}",
                    "free host memory, or raise the limit of the container; `helios fit` says what fits",
                ) from error
        taken, self._free = self._free[:nbytes], self._free[nbytes:]
        self._taken += nbytes
        return taken


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Packed:
    """A handle in one piece of host memory; ``places`` tells offset, dtype, shape and strides of each of its tensors,
    and has anything else as it is."""

    data: Tensor
    places: list[Any]
    spec: Any

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @staticmethod
    def pack(handle: Any, arena: _Arena) -> _Packed:
        leaves, spec = trees.tree_flatten(handle)
        places: list[Any] = []
        end = 0
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                places.append(_Place(end, leaf.dtype, tuple(leaf.shape), leaf.stride()))
                end += math.ceil(leaf.nbytes / ALIGNED) * ALIGNED
            else:
                places.append(leaf)
        data = arena.take(end)
        for leaf, place in zip(leaves, places, strict=True):
            if isinstance(place, _Place):
                place.of(data).copy_(leaf)
        return _Packed(data, places, spec)

    def on(self, data: Tensor) -> Any:
        """The handle, its tensors lying in this memory."""
        leaves = [place.of(data) if isinstance(place, _Place) else place for place in self.places]
        return trees.tree_unflatten(leaves, self.spec)

    def at_once(self, device: torch.device) -> Any:
        """The handle in memory of its own, outside of a run: as a load does, which runs the weights' phase."""
        return self.on(self.data.to(device, copy=True))


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, data: Tensor) -> Tensor:
        count = math.prod(self.shape)
        flat = data[self.offset : self.offset + count * self.dtype.itemsize].view(self.dtype)
        return flat.as_strided(self.shape, self.strides)


@dataclasses.dataclass(slots=True, eq=False)
class _Slot:
    """Memory of the device; what computes with it is done at the mark ``free``."""

    memory: Tensor
    free: Mark


class _Ahead:
    """One run's copies, up to as many ahead as there are slots.

    A kernel is launched between two handles taken; so when one is taken, the kernels of all taken before are in the
    queue of computations, and the slot of the one before is free behind them. Slots go back into ``idle`` in the order
    in which they become free, each with its mark: so the copies of a run begin while the one before it computes.
    """

    def __init__(self, link: Link, idle: collections.deque[_Slot], order: list[tuple[Hashable, _Packed]]) -> None:
        self._link, self._idle = link, idle
        self._left = collections.deque(order)
        self._coming: collections.deque[tuple[Hashable, _Packed, _Slot, Mark]] = collections.deque()
        self._in_use: _Slot | None = None
        self._send()

    def take(self, key: Hashable) -> Any:
        self._leave()
        self._send()
        expected, packed, slot, mark = self._coming.popleft()
        if expected != key:
            raise AssertionError(f"weights were fetched for {expected}, and {key} is used")
        self._link.hold(mark)
        self._in_use = slot
        return packed.on(slot.memory)

    def end(self) -> None:
        """Give all slots back. Computations wait for copies that nobody took: a slot may be the next one's memory."""
        self._leave()
        while self._coming:
            _, _, slot, mark = self._coming.popleft()
            self._link.hold(mark)
            self._idle.append(slot)

    def _leave(self) -> None:
        if self._in_use is not None:
            self._in_use.free = self._link.mark()
            self._idle.append(self._in_use)
            self._in_use = None

    def _send(self) -> None:
        while self._left and self._idle:
            (key, packed), slot = self._left.popleft(), self._idle.popleft()
            mark = self._link.send(slot.memory[: packed.nbytes], packed.data, slot.free)
            self._coming.append((key, packed, slot, mark))
