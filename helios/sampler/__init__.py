"""Schedules, solvers, guidance and randomness: float64 arithmetic on the host that ends in small coefficient vectors.

What a step computes on tensors stands in ``helios.ops.sampler`` and ``helios.ops.resample``; here stands with which
numbers. Nothing here knows a device.
"""

from __future__ import annotations

from helios.sampler.ahead import AheadNoise
from helios.sampler.guidance import guidance_coeffs
from helios.sampler.noise import CounterNoise, DiffusersNoise, Noise
from helios.sampler.schedule import Schedule, Stage, build_schedule, pyramid_tokens
from helios.sampler.shift import calculate_shift
from helios.sampler.unipc import UniPCState

__all__ = [
    "AheadNoise",
    "CounterNoise",
    "DiffusersNoise",
    "Noise",
    "Schedule",
    "Stage",
    "UniPCState",
    "build_schedule",
    "calculate_shift",
    "guidance_coeffs",
    "pyramid_tokens",
]
