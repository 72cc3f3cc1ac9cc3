"""Coefficients of the distilled sampler (distribution matching distillation)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["coefficients"]

F64 = npt.NDArray[np.float64]


def coefficients(timesteps: F64, sigmas: F64) -> F64:
    """``[σ, 1 − σ', σ']`` for each step, for ``helios.ops.sampler.dmd_step``: shape [n, 3].

    Args:
        timesteps: of the n steps, falling.
        sigmas: their noise levels and a final 0: shape [n + 1].
    """
    current = _lookup(timesteps, sigmas)
    following = np.append(current[1:], 0.0)
    return np.stack((current, 1.0 - following, following), axis=1)


def _lookup(timesteps: F64, sigmas: F64) -> F64:
    """Each step's noise level as the published sampler finds it: at the timestep nearest to the truncated own one.

    That is the step's own level as long as timesteps lie more than 1 apart; with hundreds of steps a stage it can be a
    neighbour's, and then that is what the published sampler computes with.
    """
    distance = np.abs(timesteps[None, :] - np.trunc(timesteps)[:, None])
    found: F64 = sigmas[np.argmin(distance, axis=1)]
    return found
