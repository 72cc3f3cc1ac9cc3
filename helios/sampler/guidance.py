"""Coefficients of classifier-free guidance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["guidance_coeffs"]


def guidance_coeffs(
    scale: float, *, stage: int = 0, step: int = 0, zero_init: bool = False, zero_steps: int = 1
) -> npt.NDArray[np.float64]:
    """``[scale, gain]`` for ``cfg`` and ``cfg_zero_star``.

    Zero-init sets the velocity to zero (gain 0) at the steps 0 … ``zero_steps`` of the first stage: that is one step
    more than the name says, as published. The model is still evaluated there. The published pipelines zero-init only
    together with CFG-Zero*; leave ``zero_init`` off for plain guidance.
    """
    silent = zero_init and stage == 0 and step <= zero_steps
    return np.array([scale, 0.0 if silent else 1.0])
