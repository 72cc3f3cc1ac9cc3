"""UniPC (arXiv 2302.04867) for flow models: B(h) = expm1(h), at most second order, data prediction.

With α = 1 − σ and λ = ln α − ln σ, both predictor and corrector are linear in the samples and the predicted end points;
what remains on the host is one row of nine coefficients a step. The history is an explicit state that starts from
zeros at every pyramid stage and chunk.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from helios.errors import InputError
from helios.ops.sampler import unipc_step

__all__ = ["UniPCState", "coefficients"]

F64 = npt.NDArray[np.float64]
SIGMA_MIN = 1e-8  # stands for σ = 0 in logarithms and quotients, as published


@dataclasses.dataclass(frozen=True, slots=True)
class UniPCState:
    """What UniPC remembers: the last corrected sample and the two newest predicted end points.

    Never mutated: each step returns the next state. While a step is being recorded into a graph, graph values stand in
    for the tensors.
    """

    last: Tensor
    newer: Tensor
    older: Tensor

    @staticmethod
    def initial(sample: Tensor) -> UniPCState:
        """The empty history at the start of a stage: zeros like ``sample``, which the first steps' zeros ignore."""
        zeros = torch.zeros_like(sample)
        return UniPCState(zeros, zeros, zeros)

    def step(self, sample: Tensor, velocity: Tensor, coeffs: Tensor) -> tuple[Tensor, UniPCState]:
        """The sample at the next noise level, and the state for it; ``coeffs`` is a row of ``coefficients``."""
        following, corrected, x0 = unipc_step(sample, velocity, self.last, self.newer, self.older, coeffs)
        return following, UniPCState(corrected, x0, self.newer)


def coefficients(sigmas: F64, order: int = 2) -> F64:
    """Nine numbers a step for ``helios.ops.sampler.unipc_step``: ``[σ, keep, a, b, c, d, a', b', c']``, shape [n, 9].

    Corrector: ``keep·sample + a·last + b·newer + c·(older − newer) + d·(x0 − newer)``;
    predictor: ``a'·corrected + b'·x0 + c'·(newer − x0)``. The first step has nothing to correct (keep = 1) and is of
    first order, the last is of first order too, for stability at σ = 0.

    Args:
        sigmas: noise levels of n steps and a final 0, falling, the first below 1: shape [n + 1].
        order: highest order, 1 or 2.

    Raises:
        InputError: a noise level of 1 or more, where λ is infinite, or levels that do not fall.
    """
    if not (sigmas[0] < 1.0 and np.all(np.diff(sigmas) < 0) and sigmas[-1] >= 0):
        raise InputError(
            f"UniPC needs noise levels that fall from below 1 to 0, got {sigmas[0]:.6g} … {sigmas[-1]:.6g}",
            "start at 0.999, as the published sampler does",
        )
    n = len(sigmas) - 1
    orders = [min(order, n - i, i + 1) for i in range(n)]
    table = np.zeros((n, 9))
    for i in range(n):
        table[i, 0] = sigmas[i]
        table[i, 1:6] = _corrector(sigmas, i, orders[i - 1]) if i else (1.0, 0.0, 0.0, 0.0, 0.0)
        table[i, 6:9] = _predictor(sigmas, i, orders[i])
    return table


def _levels(sigmas: F64) -> tuple[F64, F64, F64]:
    alpha, sigma = 1.0 - sigmas, np.maximum(sigmas, SIGMA_MIN)
    return alpha, sigma, np.log(alpha) - np.log(sigma)


def _predictor(sigmas: F64, i: int, order: int) -> tuple[float, float, float]:
    """``a', b', c'`` of the step from level i to i + 1."""
    alpha, sigma, lam = _levels(sigmas)
    h = lam[i + 1] - lam[i]
    grown = alpha[i + 1] * np.expm1(-h)
    second = -0.5 * grown * h / (lam[i - 1] - lam[i]) if order == 2 else 0.0
    return sigma[i + 1] / sigma[i], -grown, second


def _corrector(sigmas: F64, i: int, order: int) -> tuple[float, float, float, float, float]:
    """``keep, a, b, c, d`` that redo the step from level i − 1 to i, which was of the given order."""
    alpha, sigma, lam = _levels(sigmas)
    h = lam[i] - lam[i - 1]
    grown = alpha[i] * np.expm1(-h)
    older, newest, r = 0.0, 0.5, 1.0
    if order == 2:
        r = (lam[i - 2] - lam[i - 1]) / h
        older, newest = _weights(h, r)
    return 0.0, sigma[i] / sigma[i - 1], -grown, -grown * older / r, -grown * newest


def _weights(h: float, r: float) -> tuple[float, float]:
    """Solve ``ρ₁ + ρ₂ = b₁, r·ρ₁ + ρ₂ = b₂`` for the weights of the older and the newest difference.

    b₁ and b₂ are φ₂ and 2φ₃ of −h over B(h) = expm1(−h).
    """
    base = np.expm1(-h)
    phi2 = base / -h - 1.0
    phi3 = phi2 / -h - 0.5
    b1, b2 = phi2 / base, 2.0 * phi3 / base
    older = (b1 - b2) / (1.0 - r)
    return older, b1 - older
