"""A quick look at what this host's matrix product gives, where no data sheet says it."""

from __future__ import annotations

import math
import time

import torch

__all__ = ["matrix_rate"]

SMALL, LARGE = (512, 1024, 1024), (2048, 2048, 4096)
"""Rows, inner and outer width. The small one shows whether the large one, beyond every cache, is affordable: on some
hosts a 16-bit product is a hundred times slower than one in float32."""


def matrix_rate(dtype: torch.dtype, *, budget: float = 0.5) -> float:
    """FLOP a second of a linear layer without bias: the best run that a budget in seconds allows, one at least."""
    rate = _best(SMALL, dtype, budget / 5)
    return _best(LARGE, dtype, budget) if 2 * math.prod(LARGE) / rate < budget else rate


def _best(shape: tuple[int, int, int], dtype: torch.dtype, budget: float) -> float:
    rows, inner, outer = shape
    x, weight = torch.ones(rows, inner, dtype=dtype), torch.ones(outer, inner, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + budget
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return 2 * math.prod(shape) / best
