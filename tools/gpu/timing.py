"""How long a call takes on the device: warmed up, between events, the median of many, the inputs rotated.

Times are milliseconds of the device's own clock on CUDA, of the host's elsewhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

__all__ = ["Call", "Timing", "measure", "rotations"]

Call: TypeAlias = Callable[[], Any]

WARM_UP = 3
LEAST_REGION_MS = 0.2
"""Between two events lies at least this much work: events are half a microsecond coarse, and their gaps count."""
MOST_REPEATS, FEWEST_REPEATS = 100, 5
SLOW_MS = 400.0
"""A call as long as this is timed three times in all: it is no candidate, and the budget is for those that are."""
MOST_CALLS = 400
"""In one round, so that all of them fit into the device's queue of about a thousand launches."""
HOST_MS_A_CALL = 0.06
"""What the host is allowed for issuing a call. A busy-wait of that much keeps the queue full, so gaps are not timed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one call: median, extremes, and how many regions were timed."""

    median: float
    least: float
    most: float
    n: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """The summary of single times."""
        return cls(statistics.median(times), min(times), max(times), len(times))

    def record(self) -> dict[str, float | int]:
        """The fields of a result."""
        return {"ms_median": self.median, "ms_min": self.least, "ms_max": self.most, "n": self.n}


def rotations(nbytes: int, cache: int, most: int = 8) -> int:
    """How many input sets of ``nbytes`` each it takes so that a set has left a cache of ``cache`` bytes when its turn
    comes again: at least three times the cache in all, at most ``most`` sets.

    >>> rotations(30, 50), rotations(1000, 50), rotations(1, 50)
    (5, 1, 8)
    """
    if nbytes >= 3 * cache:
        return 1
    return min(most, math.ceil(3 * cache / max(nbytes, 1)))


def measure(calls: Sequence[Call], device: torch.device, seconds: float = 0.25) -> Timing:
    """Time ``calls``, which do the same work on different inputs, in turns, for about ``seconds``."""
    turns = itertools.cycle(calls)
    regions = _on_cuda if device.type == "cuda" else _on_host
    next(turns)()  # libraries load, compile and choose in a first call
    if regions(turns, 1, 1)[0] > SLOW_MS:
        return Timing.of(regions(turns, 3, 1))
    for _ in range(max(WARM_UP, len(calls))):
        next(turns)()
    estimate = statistics.median(regions(turns, 3, 1))
    inner = max(1, math.ceil(LEAST_REGION_MS / max(estimate, 1e-4)))
    wanted = int(1e3 * seconds / max(estimate * inner, 1e-3))
    most = max(min(MOST_REPEATS, MOST_CALLS // inner), FEWEST_REPEATS)
    return Timing.of(regions(turns, min(max(wanted, FEWEST_REPEATS), most), inner))


def _on_host(turns: itertools.cycle[Call], repeats: int, inner: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            next(turns)()
        times.append(1e3 * (time.perf_counter() - start) / inner)
    return times


def _on_cuda(turns: itertools.cycle[Call], repeats: int, inner: int) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    _occupy(min(repeats * inner * HOST_MS_A_CALL, 30.0))
    for start, end in pairs:
        start.record()
        for _ in range(inner):
            next(turns)()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / inner for start, end in pairs]


def _occupy(milliseconds: float) -> None:
    """Keep the device waiting meanwhile, where torch can: its clock is near two cycles a nanosecond."""
    sleep = getattr(torch.cuda, "_sleep", None)
    if sleep is not None:
        sleep(int(2e6 * milliseconds))
