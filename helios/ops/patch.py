"""Between latents and tokens, and the sinusoid of the timestep."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.errors import OpError
from helios.op import Arg, ErrorCase, Fill, Sample, accumulator, multiplicands, op

__all__ = ["patch_embed", "timestep_embedding", "unpatchify"]


def _patch_samples() -> list[Sample]:
    def case(
        name: str,
        shape: tuple[int, ...],
        d: int,
        kernel: tuple[int, int, int],
        big: bool = False,
        fill: Fill = "normal",
    ) -> Sample:
        fan = shape[1] * math.prod(kernel)
        weight = Arg((d, shape[1], *kernel), scale=fan**-0.5)
        return Sample(name, (Arg(shape, fill), weight, Arg((d,), scale=0.1)), big=big)

    return [
        case("noisy", (2, 4, 3, 4, 6), 24, (1, 2, 2)),
        case("mid", (1, 16, 2, 8, 12), 33, (2, 4, 4)),
        case("long", (1, 16, 4, 8, 16), 24, (4, 8, 8)),
        case("many", (1, 4, 1, 182, 184), 8, (1, 2, 2)),  # 8372 tokens
        case("outliers", (1, 4, 2, 4, 124), 24, (1, 2, 2), fill="outliers"),
        case("stage2", (1, 16, 9, 48, 80), 5120, (1, 2, 2), True),
        case("long_14b", (1, 16, 16, 48, 80), 5120, (4, 8, 8), True),
    ]


def _patch_errors() -> list[ErrorCase]:
    return [ErrorCase("size", (Arg((1, 4, 3, 5, 6)), Arg((8, 4, 1, 2, 2)), Arg((8,))), {}, "not a multiple")]


@op(dims="b c t h w, d c _ _ _, d -> b n d", kind="reduce", samples=_patch_samples, errors=_patch_errors)
def patch_embed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution whose stride is its kernel: each patch becomes one token.

    Args:
        x: latents ``[b, c, t, h, w]``; time, height and width multiples of the kernel.
        weight: ``[d, c, kt, kh, kw]``.
        bias: ``[d]``.

    Returns:
        ``[b, n, d]``, tokens in (time, row, column) order; accumulates in at least float32.
    """
    kernel = tuple(weight.shape[2:])
    if any(size % k for size, k in zip(x.shape[2:], kernel, strict=True)):
        raise OpError(f"patch_embed: {list(x.shape[2:])} is not a multiple of the patch {list(kernel)}")
    video, filters, row = multiplicands(x, weight, bias)
    return F.conv3d(video, filters, row, stride=kernel).flatten(2).transpose(1, 2).to(x.dtype)  # type: ignore[arg-type]


def _unpatchify_samples() -> list[Sample]:
    return [
        Sample("small", (Arg((2, 18, 16)),), {"grid": (3, 2, 3), "patch": (1, 2, 2)}),
        Sample("deep", (Arg((1, 4, 48)),), {"grid": (1, 2, 2), "patch": (2, 2, 4)}),
        Sample("long", (Arg((1, 8372, 16)),), {"grid": (1, 91, 92), "patch": (1, 2, 2)}),
    ]


def _unpatchify_errors() -> list[ErrorCase]:
    return [ErrorCase("grid", (Arg((2, 18, 16)),), {"grid": (3, 2, 4), "patch": (1, 2, 2)}, "18 tokens")]


@op(dims="b n e -> b _ _ _ _", kind="move", samples=_unpatchify_samples, errors=_unpatchify_errors)
def unpatchify(x: Tensor, *, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """Tokens back to latents. Each token holds its patch as (time, row, column, channel).

    Args:
        x: ``[b, n, pt·ph·pw·c]``.
        grid: tokens in time, rows and columns; their product is n.
        patch: (pt, ph, pw).

    Returns:
        ``[b, c, t·pt, h·ph, w·pw]``.
    """
    if math.prod(grid) != x.shape[1]:
        raise OpError(f"unpatchify: {x.shape[1]} tokens do not fill the grid {list(grid)}")
    t, h, w = grid
    pt, ph, pw = patch
    cells = x.reshape(x.shape[0], t, h, w, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return cells.reshape(x.shape[0], -1, t * pt, h * ph, w * pw)


def _sinusoid_samples() -> list[Sample]:
    return [
        Sample("float", (Arg((3,), "uniform", scale=999.0, dtype=torch.float32),), {"dim": 256}),
        Sample("small", (Arg((1,), "uniform", scale=999.0, dtype=torch.float32),), {"dim": 12}),
    ]


@op(dims="b -> b e", kind="round", samples=_sinusoid_samples)
def timestep_embedding(t: Tensor, *, dim: int, period: float = 10000.0) -> Tensor:
    """``[cos(t·f_k), sin(t·f_k)]`` with ``f_k = period^(−k/(dim/2))``.

    Args:
        t: timesteps ``[b]``, 0 to 1000, whole or fractional; float32, or float64.
        dim: channels of the result, even.

    Returns:
        ``[b, dim]`` in the dtype of t, and computed in it: an angle of 999 carries an error of 3e-5 in float32.
    """
    acc = accumulator(t.dtype)
    half = dim // 2
    exponent = -math.log(period) * torch.arange(half, dtype=acc, device=t.device) / half
    angle = t.to(acc)[:, None] * torch.exp(exponent)
    return torch.cat((torch.cos(angle), torch.sin(angle)), dim=-1)
