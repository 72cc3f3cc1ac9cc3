"""Convolutions over video, and the other ops of the Wan VAE.

Videos are ``[b, c, t, h, w]`` throughout. Causality in time is explicit: a graph puts two frames in front of a
convolution (zeros with ``pad_zero``, or the last frames of the group before with ``concat``) and keeps ``last_frames``
for the next group, so that the convolution itself pads only rows and columns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.errors import OpError
from helios.op import Arg, ErrorCase, Fill, Sample, accumulator, multiplicands, op
from helios.ops.pointwise import HUGE, silu

__all__ = [
    "channel_norm",
    "channel_norm_silu",
    "clamp",
    "conv3d",
    "denormalize_latents",
    "interleave_frames",
    "last_frames",
    "pad_zero",
    "sample_posterior",
    "upsample_nearest",
]

# Decoder activations at 384 × 640 with groups of one latent (four frames after both upsamplings in time).
SIZES = {"latent": (384, 1, 48, 80), "half": (192, 4, 192, 320), "full": (96, 4, 384, 640)}


def _conv_samples() -> list[Sample]:
    def case(
        name: str,
        shape: tuple[int, ...],
        out: int,
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
        padding: tuple[int, int, int] = (0, 0, 0),
        big: bool = False,
        fill: Fill = "normal",
        scale: float = 1.0,
    ) -> Sample:
        fan = shape[1] * kernel[0] * kernel[1] * kernel[2]
        weight, bias = Arg((out, shape[1], *kernel), scale=fan**-0.5), Arg((out,), scale=0.1)
        return Sample(name, (Arg(shape, fill, scale=scale), weight, bias), {"stride": stride, "padding": padding}, big)

    same, rows, frames = (3, 3, 3), (1, 3, 3), (3, 1, 1)
    big = [case(n, (1, c, t + 2, h, w), c, same, padding=(0, 1, 1), big=True) for n, (c, t, h, w) in SIZES.items()]
    return [
        case("causal", (2, 4, 5, 4, 6), 8, same, padding=(0, 1, 1)),
        case("odd", (1, 7, 3, 5, 3), 5, same, padding=(0, 1, 1)),
        case("frame", (2, 6, 2, 5, 7), 3, rows, padding=(0, 1, 1)),
        case("down", (1, 4, 2, 9, 7), 4, rows, (1, 2, 2)),
        case("time", (1, 4, 5, 2, 3), 8, frames),
        case("time_down", (1, 4, 5, 2, 3), 4, frames, (2, 1, 1)),
        case("point", (2, 6, 2, 3, 4), 5, (1, 1, 1)),
        case("outliers", (1, 4, 3, 4, 123), 5, same, padding=(0, 1, 1), fill="outliers"),
        case("huge", (1, 7, 3, 5, 3), 5, same, padding=(0, 1, 1), scale=HUGE),
        *big,
        case("to_rgb", (1, 96, 6, 384, 640), 3, same, padding=(0, 1, 1), big=True),
        case("up_full", (1, 192, 4, 384, 640), 96, rows, padding=(0, 1, 1), big=True),
        case("time_half", (1, 384, 4, 96, 160), 768, frames, big=True),
    ]


def _conv_errors() -> list[ErrorCase]:
    x = Arg((1, 4, 3, 4, 4))
    return [
        ErrorCase("channels", (x, Arg((8, 3, 3, 3, 3)), None), {}, "'c' is 3"),
        ErrorCase("bias", (x, Arg((8, 4, 3, 3, 3)), Arg((7,))), {}, "'o' is 7"),
        ErrorCase("kernel", (Arg((1, 4, 2, 4, 4)), Arg((8, 4, 3, 3, 3)), None), {}, "smaller than the kernel"),
    ]


@op(dims="b c t h w, o c _ _ _, o? -> b o _ _ _", kind="reduce", samples=_conv_samples, errors=_conv_errors)
def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """Convolution (cross-correlation) over time, rows and columns.

    Args:
        x: ``[b, c, t, h, w]``.
        weight: ``[o, c, kt, kh, kw]``, of the dtype of x.
        bias: ``[o]``, of the dtype of x.
        stride: steps in time, rows and columns.
        padding: zeros on *both* sides of time, rows and columns.

    Returns:
        ``[b, o, (t + 2·pt − kt)/st + 1, …]``; products and the bias accumulate in at least float32, rounded once.
    """
    room = [size + 2 * pad for size, pad in zip(x.shape[2:], padding, strict=True)]
    if any(have < kernel for have, kernel in zip(room, weight.shape[2:], strict=True)):
        raise OpError(f"conv3d: the padded input {room} is smaller than the kernel {list(weight.shape[2:])}")
    video, kernel, row = multiplicands(x, weight, bias)
    return F.conv3d(video, kernel, row, stride=stride, padding=padding).to(x.dtype)  # type: ignore[arg-type]


def _norm_samples() -> list[Sample]:
    def case(name: str, b: int, c: int, t: int, h: int, w: int, scale: float = 1.0, big: bool = False) -> Sample:
        return Sample(name, (Arg((b, c, t, h, w), scale=scale), Arg((c,), offset=1.0, scale=0.1)), big=big)

    return [
        case("small", 2, 8, 3, 4, 5),
        case("odd", 1, 33, 1, 3, 7),
        case("faint", 1, 6, 2, 3, 4, scale=1e-6),
        case("vanishing", 1, 6, 2, 3, 4, scale=5e-13),  # norms on both sides of eps
        Sample("flat", (Arg((1, 64, 1, 3, 4), "flat"), Arg((64,), offset=1.0, scale=0.1))),  # by rows of pixels
        case("huge", 1, 33, 1, 3, 7, scale=HUGE),
        Sample("outliers", (Arg((1, 12, 2, 3, 122), "outliers"), Arg((12,), offset=1.0, scale=0.1))),
        *(case(n, 1, *size, big=True) for n, size in SIZES.items()),
    ]


def _norm_errors() -> list[ErrorCase]:
    return [ErrorCase("channels", (Arg((1, 4, 2, 3, 3)), Arg((5,))), {}, "'c' is 5")]


@op(dims="b c t h w, c -> b c t h w", kind="reduce", samples=_norm_samples, errors=_norm_errors)
def channel_norm(x: Tensor, gamma: Tensor, *, eps: float = 1e-12) -> Tensor:
    """``x / max(‖x‖₂, eps) · √c · gamma``, the norm over the channels of each position.

    Args:
        x: ``[b, c, t, h, w]``.
        gamma: ``[c]``.
        eps: smallest norm divided by; it only guards against positions that are all zero.

    Returns:
        ``[b, c, t, h, w]`` in the dtype of x; computed in at least float32, rounded once.
    """
    wide = x.to(accumulator(x.dtype))
    length: Tensor = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(eps)
    gain = gamma.to(wide.dtype) * math.sqrt(x.shape[1])
    wide = wide / length  # rebound, not nested: the copy that a narrow dtype needs is freed here
    return wide.mul_(gain[:, None, None, None]).to(x.dtype)


@op(dims="b c t h w, c -> b c t h w", kind="fused", samples=_norm_samples)
def channel_norm_silu(x: Tensor, gamma: Tensor, *, eps: float = 1e-12) -> Tensor:
    """``silu(channel_norm(x, gamma))``, which stands before every 3×3×3 convolution of the VAE."""
    return silu(channel_norm(x, gamma, eps=eps))


def _up_samples() -> list[Sample]:
    return [
        Sample("small", (Arg((2, 3, 2, 3, 4)),)),
        Sample("full", (Arg((1, 192, 4, 192, 320)),), big=True),
    ]


@op(dims="b c t h w -> b c t _ _", kind="move", samples=_up_samples)
def upsample_nearest(x: Tensor) -> Tensor:
    """Each pixel becomes a square of 2 × 2: ``[b, c, t, h, w]`` to ``[b, c, t, 2h, 2w]``."""
    b, c, t, h, w = x.shape
    return x[:, :, :, :, None, :, None].expand(b, c, t, h, 2, w, 2).reshape(b, c, t, 2 * h, 2 * w)


def _interleave_samples() -> list[Sample]:
    return [
        Sample("small", (Arg((2, 6, 3, 2, 4)),)),
        Sample("half", (Arg((1, 768, 2, 96, 160)),), big=True),
    ]


def _interleave_errors() -> list[ErrorCase]:
    return [ErrorCase("odd", (Arg((1, 5, 2, 3, 3)),), {}, "must be even")]


@op(dims="b c t h w -> b _ _ h w", kind="move", samples=_interleave_samples, errors=_interleave_errors)
def interleave_frames(x: Tensor) -> Tensor:
    """Half of the channels become frames: ``[b, 2c, t, h, w]`` to ``[b, c, 2t, h, w]``.

    Frame 2i of the result is frame i of the first c channels, frame 2i + 1 that of the last c.
    """
    b, channels, t, h, w = x.shape
    if channels % 2:
        raise OpError(f"interleave_frames: the {channels} channels of {list(x.shape)} must be even in number")
    return x.reshape(b, 2, channels // 2, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, channels // 2, 2 * t, h, w)


def _pad_samples() -> list[Sample]:
    return [
        Sample("front", (Arg((2, 3, 2, 3, 4)),), {"before": (2, 0, 0)}),
        Sample("corner", (Arg((2, 3, 2, 3, 4)),), {"after": (0, 1, 1)}),
    ]


@op(dims="b c t h w -> b c _ _ _", kind="move", samples=_pad_samples)
def pad_zero(x: Tensor, *, before: tuple[int, int, int] = (0, 0, 0), after: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """Zeros before and after time, rows and columns."""
    sides = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
    return F.pad(x, sides)


def _last_samples() -> list[Sample]:
    return [
        Sample("two", (Arg((2, 3, 5, 2, 4)),), {"count": 2}),
        Sample("one", (Arg((1, 3, 1, 2, 4)),), {"count": 1}),
    ]


def _last_errors() -> list[ErrorCase]:
    return [ErrorCase("few", (Arg((1, 3, 1, 2, 4)),), {"count": 2}, "has 1 frames")]


@op(dims="b c t h w -> b c _ h w", kind="move", samples=_last_samples, errors=_last_errors)
def last_frames(x: Tensor, *, count: int) -> Tensor:
    """A copy of the last ``count`` frames: never a view, which would keep all of x in memory as long as it lives."""
    if not 0 < count <= x.shape[2]:
        raise OpError(f"last_frames: {list(x.shape)} has {x.shape[2]} frames, wanted the last {count}")
    return x[:, :, x.shape[2] - count :].clone(memory_format=torch.contiguous_format)


def _clamp_samples() -> list[Sample]:
    return [Sample("unit", (Arg((2, 3, 2, 4, 5)),), {"low": -1.0, "high": 1.0})]


@op(dims="... -> ...", kind="move", samples=_clamp_samples)
def clamp(x: Tensor, *, low: float, high: float) -> Tensor:
    """``min(max(x, low), high)``; NaN stays NaN. Exact where both bounds are numbers of the dtype."""
    return x.clamp(low, high)


LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075)
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558)


def _latent_samples() -> list[Sample]:
    stats = {"mean": LATENTS_MEAN, "std": LATENTS_STD}
    return [
        Sample("small", (Arg((2, 4, 3, 2, 5)),), stats),
        Sample("to_bfloat16", (Arg((1, 4, 2, 3, 3), dtype=torch.float32),), {**stats, "dtype": torch.bfloat16}),
    ]


def _latent_errors() -> list[ErrorCase]:
    return [ErrorCase("channels", (Arg((1, 3, 1, 2, 2)),), {"mean": LATENTS_MEAN, "std": LATENTS_STD}, "4 means")]


@op(dims="b z t h w -> b z t h w", kind="round", samples=_latent_samples, errors=_latent_errors)
def denormalize_latents(
    x: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """``x · std + mean`` of each channel: from what the transformer sees to what the VAE decodes.

    Args:
        x: ``[b, z, t, h, w]``.
        mean, std: z numbers each.
        dtype: of the result; ``None`` for that of x.
    """
    shift, scale = _per_channel(x, mean), _per_channel(x, std)
    return (x.to(scale.dtype) * scale + shift).to(dtype or x.dtype)


def _per_channel(x: Tensor, numbers: tuple[float, ...]) -> Tensor:
    if len(numbers) != x.shape[1]:
        raise OpError(
            f"latents {list(x.shape)} have {x.shape[1]} channels, but {len(numbers)} means or deviations came"
        )
    return torch.tensor(numbers, dtype=accumulator(x.dtype), device=x.device).view(-1, 1, 1, 1)


def _posterior_samples() -> list[Sample]:
    stats = {"mean": LATENTS_MEAN, "std": LATENTS_STD}
    return [
        Sample("sample", (Arg((2, 8, 3, 2, 5)), Arg((2, 4, 3, 2, 5))), stats),
        Sample("mode", (Arg((2, 8, 3, 2, 5)), None), stats),
        Sample("clipped", (Arg((1, 8, 1, 2, 3), scale=30.0), Arg((1, 4, 1, 2, 3))), stats),
    ]


def _posterior_errors() -> list[ErrorCase]:
    stats = {"mean": LATENTS_MEAN, "std": LATENTS_STD}
    return [
        ErrorCase("channels", (Arg((1, 4, 1, 2, 2)), None), stats, "wanted 8"),
        ErrorCase("noise", (Arg((1, 8, 1, 2, 2)), Arg((1, 4, 1, 2, 3))), stats, "'w' is 3"),
    ]


@op(dims="b _ t h w, b z t h w? -> b z t h w", kind="round", samples=_posterior_samples, errors=_posterior_errors)
def sample_posterior(
    moments: Tensor, noise: Tensor | None = None, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Draw latents from the encoder's normal distribution and normalise them for the transformer.

    Args:
        moments: ``[b, 2z, t, h, w]``: z means, then z log-variances, which count as at least −30 and at most 20.
        noise: standard normal ``[b, z, t, h, w]``; without it the result is the mode.
        mean, std: z numbers each: the published statistics of latents.

    Returns:
        ``(μ + exp(logvar/2) · noise − mean) / std``, ``[b, z, t, h, w]`` in the dtype of ``moments``.
    """
    if moments.shape[1] != 2 * len(mean):
        raise OpError(
            f"sample_posterior: moments {list(moments.shape)} have {moments.shape[1]} channels, wanted {2 * len(mean)}"
        )
    centre, logvar = moments.to(accumulator(moments.dtype)).chunk(2, dim=1)
    if noise is not None:
        centre = centre + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise.to(centre.dtype)
    return ((centre - _per_channel(centre, mean)) / _per_channel(centre, std)).to(moments.dtype)
