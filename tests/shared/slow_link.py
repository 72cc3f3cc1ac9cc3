"""A device's queues as tests need them: copies that are late, or that come as early as they may."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(eq=False)
class Copy:
    """A queued copy; done when ``run`` was called."""

    target: Tensor
    source: Tensor
    done: bool = False

    def run(self) -> None:
        if not self.done:
            self.target.copy_(self.source)
            self.done = True


class SlowLink:
    """A ``helios_cuda.staging.Link`` of the CPU, where copies happen when somebody waits for them and no earlier.

    What is read without waiting is NaN or old; what is written over while it is on its way arrives wrong. Copies are
    done in their order, as a stream does them.

    Attributes:
        copies: all that were sent.
        free: for each of them whether it was to wait for computations that were queued before, or for none.
        clock: counts marks of the computations.
    """

    def __init__(self, fails_after: int | None = None) -> None:
        self.copies: list[Copy] = []
        self.free: list[int] = []
        self.clock = 0
        self.waits = 0
        self.fails_after = fails_after
        self.taken = 0

    def pinned(self, nbytes: int) -> Tensor:
        self.taken += nbytes
        if self.fails_after is not None and self.taken > self.fails_after:
            raise RuntimeError("CUDA error: out of memory")
        return torch.zeros(nbytes, dtype=torch.uint8)

    def send(self, target: Tensor, source: Tensor, after: int | None = None) -> Copy:
        assert target.shape == source.shape
        assert target.dtype == source.dtype
        self.copies.append(Copy(target, source))
        self.free.append(-1 if after is None else after)
        target.view(torch.uint8).fill_(255)  # NaN in every floating type, until it arrives
        return self.copies[-1]

    def mark(self) -> int:
        self.clock += 1
        return self.clock

    def hold(self, mark: Copy) -> None:
        for copy in self.copies[: self.copies.index(mark) + 1]:
            copy.run()

    def wait(self, mark: Copy) -> None:
        self.waits += 1
        self.hold(mark)
