"""Time shift: how noise levels are moved towards the noisy end for longer sequences."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from helios.errors import InputError, unknown_name

__all__ = ["calculate_shift", "dynamic_shift", "static_shift"]

F64 = npt.NDArray[np.float64]


def calculate_shift(
    tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """The shift ``mu`` for a number of noisy tokens: the line through (256, 0.5) and (4096, 1.15), not clamped.

    >>> round(calculate_shift(8640), 7)
    1.9191667
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return tokens * slope + (base_shift - slope * base_tokens)


def static_shift(sigmas: F64, shift: float) -> F64:
    """``shift·σ / (1 + (shift − 1)·σ)``; the identity for ``shift = 1``."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def dynamic_shift(sigmas: F64, mu: float, kind: str) -> F64:
    """``w / (w + 1/σ − 1)`` with ``w = exp(mu)`` (kind ``exponential``) or ``w = mu`` itself (kind ``linear``).

    Linear shift with mu < 1, which is every stage of the published distilled sampler, moves noise levels *down*.

    Args:
        sigmas: noise levels in [0, 1]; 0 stays 0.
        mu: from ``calculate_shift``.
        kind: ``exponential`` or ``linear``.

    Raises:
        InputError: another kind, or a linear shift with mu ≤ 0.
    """
    if kind not in ("exponential", "linear"):
        raise InputError(unknown_name("time shift", kind, ("exponential", "linear")))
    weight = math.exp(mu) if kind == "exponential" else mu
    if weight <= 0:
        raise InputError(f"a linear time shift needs mu > 0, got {mu}", "use more tokens or an exponential shift")
    with np.errstate(divide="ignore"):
        # A reciprocal and a product, not a quotient: torch divides a number by a tensor so, and the tables equal the
        # published ones to the last bit.
        return weight * (1 / (weight + (1 / sigmas - 1)))
