"""Between the stages of the pyramid: noise down, latents up, and the noise that repairs what upsampling did."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from helios.errors import OpError
from helios.op import Arg, ErrorCase, Sample, accumulator, op
from helios.ops.sampler import blend

__all__ = ["block_factor", "block_noise", "downsample_noise", "renoise_upsample", "upsample_nearest2"]

F32 = torch.float32
ONE_THIRD = 1.0 / 3.0


def _down_samples() -> list[Sample]:
    return [
        Sample("small", (Arg((2, 3, 2, 4, 6)),)),
        Sample("thin", (Arg((1, 1, 1, 2, 10)),)),
        Sample("stage2", (Arg((1, 16, 9, 48, 80)),), big=True),
        Sample("stage1", (Arg((1, 16, 9, 24, 40)),), big=True),
    ]


def _down_errors() -> list[ErrorCase]:
    return [ErrorCase("odd", (Arg((1, 2, 3, 5, 4)),), {}, "even")]


@op(dims="b c t h w -> b c t _ _", kind="reduce", samples=_down_samples, errors=_down_errors)
def downsample_noise(x: Tensor) -> Tensor:
    """Half the rows and columns of each frame, keeping unit variance: half the sum of each 2×2 patch.

    That is bilinear interpolation to half the size (which averages the patch) times two, in the dtype of ``x``.

    Args:
        x: independent noise ``[b, c, t, h, w]``, h and w even.

    Raises:
        OpError: h or w is odd.
    """
    b, c, t, h, w = x.shape
    if h % 2 or w % 2:
        raise OpError(
            f"downsample_noise: frames of {h}×{w} have no half; both must be even",
            "choose a height and width whose latents divide by 2 at each pyramid stage",
        )
    patches = x.to(accumulator(x.dtype)).reshape(b, c, t, h // 2, 2, w // 2, 2)
    return (patches.sum((4, 6)) * 0.5).to(x.dtype)


def _up_samples() -> list[Sample]:
    return [
        Sample("small", (Arg((2, 3, 2, 2, 3)),)),
        Sample("odd", (Arg((1, 1, 1, 1, 5)),)),
        Sample("stage1", (Arg((1, 16, 9, 12, 20)),), big=True),
        Sample("stage2", (Arg((1, 16, 9, 24, 40)),), big=True),
    ]


@op(dims="b c t h w -> b c t _ _", kind="move", samples=_up_samples)
def upsample_nearest2(x: Tensor) -> Tensor:
    """Twice the rows and columns of each frame, each value repeated in a 2×2 patch."""
    b, c, t, h, w = x.shape
    return x[:, :, :, :, None, :, None].expand(b, c, t, h, 2, w, 2).reshape(b, c, t, 2 * h, 2 * w)


def block_factor(gamma: float) -> list[list[float]]:
    """The lower triangular L with ``L·Lᵀ = (1 + γ)·I − γ·11ᵀ`` over the 4 pixels of a patch, in closed form.

    Pixel k has pivot ``(1+γ)(1−kγ)/(1−(k−1)γ)`` and, below it, ``−γ(1+γ)/(1−(k−1)γ)``. At γ = 1/3, the value of every
    published model, the last pivot is exactly zero and the covariance singular: the four values sum to zero. A numeric
    Cholesky factorisation fails there or passes by luck of rounding.

    Raises:
        OpError: γ is outside of [0, 1/3], where no such noise exists.
    """
    if not 0.0 <= gamma <= ONE_THIRD:
        raise OpError(f"block_noise: gamma is {gamma}, but a patch of 4 has such noise only for gamma in [0, 1/3]")
    factor = [[0.0] * 4 for _ in range(4)]
    for k in range(4):
        common = (1.0 + gamma) / (1.0 - (k - 1) * gamma)
        pivot = math.sqrt(common * (1.0 - k * gamma))
        factor[k][k] = pivot
        for i in range(k + 1, 4):
            factor[i][k] = -gamma * common / pivot
    return factor


def _block_samples() -> list[Sample]:
    return [
        Sample("small", (Arg((2, 3, 2, 2, 3, 4)),)),
        Sample("weaker", (Arg((1, 2, 1, 3, 1, 4)),), {"gamma": 0.2}),
        Sample("stage1", (Arg((1, 16, 9, 12, 20, 4)),), big=True),
        Sample("stage2", (Arg((1, 16, 9, 24, 40, 4)),), big=True),
    ]


def _block_errors() -> list[ErrorCase]:
    return [
        ErrorCase("gamma", (Arg((1, 1, 1, 1, 1, 4)),), {"gamma": 0.4}, "gamma in [0, 1/3]"),
        ErrorCase("patch", (Arg((1, 1, 1, 1, 1, 3)),), {}, "'4' is 3"),
    ]


@op(dims="b c t h w 4 -> b c t _ _", kind="reduce", samples=_block_samples, errors=_block_errors)
def block_noise(z: Tensor, *, gamma: float = ONE_THIRD) -> Tensor:
    """Noise that is correlated within each 2×2 patch: unit variance, covariance −γ between pixels of a patch.

    Nearest upsampling makes the four pixels of a patch equal; this noise, scaled and added, makes them independent
    again (arXiv 2410.05954, renoising). With γ = 1/3 each patch sums to zero up to rounding.

    Args:
        z: independent standard normals ``[b, c, t, h, w, 4]``; the last dimension is the patch in row-major order.
        gamma: strength of the correlation, in [0, 1/3].

    Returns:
        ``[b, c, t, 2h, 2w]`` in the dtype of ``z``.

    Raises:
        OpError: ``gamma`` is out of range.
    """
    acc = accumulator(z.dtype)
    factor = torch.tensor(block_factor(gamma), dtype=acc, device=z.device)
    b, c, t, h, w, _ = z.shape
    patches = (z.to(acc) @ factor.T).reshape(b, c, t, h, w, 2, 2)
    return patches.permute(0, 1, 2, 3, 5, 4, 6).reshape(b, c, t, 2 * h, 2 * w).to(z.dtype)


def _renoise_samples() -> list[Sample]:
    def case(name: str, b: int, c: int, t: int, h: int, w: int, z: torch.dtype | None, big: bool = False) -> Sample:
        coeffs = Arg((2,), "uniform", dtype=F32)
        return Sample(name, (Arg((b, c, t, h, w)), Arg((b, c, t, h, w, 4), dtype=z), coeffs), big=big)

    return [
        case("small", 2, 3, 2, 2, 3, None),
        case("float32_noise", 1, 2, 3, 1, 4, F32),
        case("stage1", 1, 16, 9, 12, 20, F32, big=True),
        case("stage2", 1, 16, 9, 24, 40, F32, big=True),
    ]


@op(dims="b c t h w, b c t h w 4, 2 -> b c t _ _", kind="fused", samples=_renoise_samples)
def renoise_upsample(latents: Tensor, noise: Tensor, coeffs: Tensor, *, gamma: float = ONE_THIRD) -> Tensor:
    """Start point of the next pyramid stage: ``α·up(latents) + β·block_noise(noise)``, in the dtype of ``latents``.

    Args:
        latents: end point of the stage before ``[b, c, t, h, w]``.
        noise: independent standard normals ``[b, c, t, h, w, 4]``.
        coeffs: ``[α, β]``, see ``helios.sampler.schedule.Stage.renoise``.
        gamma: strength of the correlation, in [0, 1/3].
    """
    return blend(upsample_nearest2(latents), block_noise(noise, gamma=gamma), coeffs)
