"""A quick look at what this host's matrix product gives, where no data sheet says it."""

from __future__ import annotations

import time

import torch

__all__ = ["matrix_rate"]


def matrix_rate(dtype: torch.dtype, *, budget: float = 0.4) -> float:
    """FLOP a second of ``[512, 1024] × [1024, 1024]``: the best run of a budget in seconds, after one to warm up."""
    x, weight = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    torch.nn.functional.linear(x, weight)
    best, end = float("inf"), time.perf_counter() + budget
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return 2 * 512 * 1024 * 1024 / best
