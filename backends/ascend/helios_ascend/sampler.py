"""Solver steps, guidance, what lies between the stages, and the timestep's sinusoid. All on float32, and small.

The steps are the op bodies on dense operands: sums and products of float32, one operator each. Written anew is what
would send numbers from the host in each step, or lean on how CANN reduces large angles.

**Sinusoid.** Its angles reach 1000. CANN does not say how its sine and cosine reduce them; so a multiple of 2π is
taken off first, in three pieces of which the first two have few enough bits that their products are exact. The angle
itself, which float32 knows to 3e-5 at 1000, is a sum of products of 12 bits each, so that nothing of it is lost.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helios import op
from helios.backend import Kernel
from helios.ops.resample import block_factor

__all__ = ["KERNELS"]

F32 = torch.float32
STEPS = (
    "blend",
    "cfg",
    "cfg_zero_star",
    "dmd_step",
    "euler_step",
    "unipc_correct",
    "unipc_predict",
    "velocity_to_x0",
)
TURN = (6.28125, 0.0019352436065673828, 6.357301884918343e-08)
"""2π in pieces: the first has 8 bits, the second 13, so that their products with 160 turns are exact in float32."""


def _dense(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body of an op on contiguous operands."""

    @functools.wraps(body)
    def run(*operands: Tensor, **attrs: Any) -> Any:
        return body(*(x.contiguous() for x in operands), **attrs)

    return run


@functools.lru_cache(maxsize=64)
def _numbers(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Float32 on the device: sent once, and not in each step."""
    return torch.tensor(numbers, dtype=torch.float64).to(F32).to(device)


def _per_channel(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return _numbers(tuple(numbers), device).view(-1, 1, 1, 1)


def _timestep_embedding(t: Tensor, *, dim: int, period: float) -> Tensor:
    """Of the angle ``t · f`` the largest part is an exact product of halves, and only what is left of it is rounded."""
    half = dim // 2
    frequencies = [math.exp(-math.log(period) * k / half) for k in range(half)]
    coarse = tuple(_short(f) for f in frequencies)
    fine = tuple(f - c for f, c in zip(frequencies, coarse, strict=True))
    high, low = _halves(t.contiguous().to(F32).view(-1, 1))
    f, g = _numbers(coarse, t.device), _numbers(fine, t.device)
    angle = _reduced(high * f) + (low * f + (high + low) * g)
    return torch.cat((torch.cos(angle), torch.sin(angle)), dim=-1)


def _short(number: float) -> float:
    """The number rounded to 12 bits."""
    mantissa, exponent = math.frexp(number)
    return math.ldexp(round(mantissa * 4096.0), exponent - 12)


def _halves(t: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers of 12 bits whose sum is t."""
    spread = t * 4097.0
    high = spread - (spread - t)
    return high, t - high


def _reduced(angle: Tensor) -> Tensor:
    """The angle without its whole turns, between −π and π."""
    turns = torch.round(angle * (1.0 / math.tau))
    for piece in TURN:
        angle = angle - turns * piece
    return angle


def _downsample_noise(x: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    patches = x.contiguous().to(F32).view(b * c * t, h // 2, 2, w // 2, 2)
    return (patches.sum((2, 4)) * 0.5).to(x.dtype).view(b, c, t, h // 2, w // 2)


def _block_noise(z: Tensor, *, gamma: float) -> Tensor:
    """The factor in closed form, as a product of rows of four: nothing is factorised on the device."""
    b, c, t, h, w, _ = z.shape
    lower = _numbers(tuple(number for row in zip(*block_factor(gamma), strict=True) for number in row), z.device)
    patches = torch.mm(z.contiguous().to(F32).view(-1, 4), lower.view(4, 4))
    rows = patches.to(z.dtype).view(b * c * t * h, w, 2, 2).permute(0, 2, 1, 3).contiguous()
    return rows.view(b, c, t, 2 * h, 2 * w)


def _denormalize_latents(
    x: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype | None
) -> Tensor:
    wide = x.contiguous().to(F32) * _per_channel(std, x.device)
    return wide.add_(_per_channel(mean, x.device)).to(dtype or x.dtype)


def _sample_posterior(
    moments: Tensor, noise: Tensor | None, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    centre, logvar = (half.contiguous().to(F32) for half in moments.chunk(2, dim=1))
    if noise is not None:
        centre = centre + torch.exp(logvar.clamp(-30.0, 20.0) * 0.5) * noise.contiguous().to(F32)
    return ((centre - _per_channel(mean, centre.device)) / _per_channel(std, centre.device)).to(moments.dtype)


KERNELS = {
    **{name: Kernel(_dense(op.get(name).fn)) for name in STEPS},
    "block_noise": Kernel(_block_noise),
    "denormalize_latents": Kernel(_denormalize_latents),
    "downsample_noise": Kernel(_downsample_noise),
    "sample_posterior": Kernel(_sample_posterior),
    "timestep_embedding": Kernel(_timestep_embedding),
}
