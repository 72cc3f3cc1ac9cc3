"""Between the stages of the pyramid: noise down, and noise of correlated patches with or without the latents beneath.

Each op is one launch. A program takes pixels of the coarser grid, of which each has its four of the finer one. The
factor of the noise enters as seven numbers: torch's bodies would copy it to the device, which waits for the host and
cannot be captured.

Bytes: entering the last stage, ``renoise_upsample`` reads 0.6 MB of latents and 2.2 MB of noise and writes 2.2 MB, all
float32, and within the second-level cache; ``downsample_noise`` reads 2.2 MB and writes a quarter. What counts is
launches: the bodies have 7 (``renoise_upsample``) and 2 (``downsample_noise``), each twice a chunk; counted by
``pytest tests/backends/cuda/test_sampler_kernels.py -k launches``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from helios.backend import Kernel
from helios.ops.resample import block_factor
from helios_cuda.kernels.numerics import rounded
from helios_cuda.launch import Tile, name_of, tiled

__all__ = ["KERNELS"]

TILES = (
    Tile({"SIZE": 256}, warps=4, stages=1),
    Tile({"SIZE": 128}, warps=4, stages=1),
    Tile({"SIZE": 512}, warps=4, stages=1),
    Tile({"SIZE": 1024}, warps=8, stages=1),
)


@triton.jit
def _patch_rows(pixel, width):
    """Where the upper two of the four finer pixels begin; the lower two are ``2 · width`` further on. Column pairs."""
    above = (pixel // width) * 4 * width + (pixel % width) * 2
    return above[:, None] + tl.arange(0, 2)[None, :]


@tiled(*TILES, interpreted=Tile({"SIZE": 16384}))
@triton.jit
def _noise(
    latents,
    z,
    coeffs,
    out,
    count,
    width,
    pivot0,
    pivot1,
    pivot2,
    pivot3,
    below0,
    below1,
    below2,
    SIZE: tl.constexpr,
):
    """``out`` of each patch is the lower triangular factor times ``z`` ``[count, 4]``; blended with its latent, if any.

    In a column of the factor all numbers below the pivot are equal.
    """
    pixel = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = pixel < count
    drawn = tl.load(z + pixel[:, None] * 4 + tl.arange(0, 4)[None, :], inside[:, None], 0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(drawn, (SIZE, 2, 2)))
    z0, z2 = tl.split(even)
    z1, z3 = tl.split(odd)
    # The zeros of the factor are multiplied too: they make NaN of an infinity, as in any product of matrices.
    right3 = 0.0 * z3
    right2 = 0.0 * z2 + right3
    below = below0 * z0
    upper = tl.join(pivot0 * z0 + (0.0 * z1 + right2), below + pivot1 * z1 + right2)
    below += below1 * z1
    lower = tl.join(below + pivot2 * z2 + right3, below + below2 * z2 + pivot3 * z3)
    if latents is not None:
        signal, noise = tl.load(coeffs).to(tl.float32), tl.load(coeffs + 1).to(tl.float32)
        latent = signal * tl.load(latents + pixel, inside, 0.0).to(tl.float32)[:, None]
        upper, lower = latent + noise * upper, latent + noise * lower
    at = out + _patch_rows(pixel, width)
    tl.store(at, rounded(upper, out.dtype.element_ty), inside[:, None])
    tl.store(at + 2 * width, rounded(lower, out.dtype.element_ty), inside[:, None])


@tiled(*TILES, interpreted=Tile({"SIZE": 16384}))
@triton.jit
def _shrink(x, out, count, width, SIZE: tl.constexpr):
    """``out`` is half the sum of each patch of ``x``; ``width`` and ``count`` are those of ``out``."""
    pixel = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = pixel < count
    at = x + _patch_rows(pixel, width)
    upper = tl.load(at, inside[:, None], 0.0).to(tl.float32)
    lower = tl.load(at + 2 * width, inside[:, None], 0.0).to(tl.float32)
    total = tl.sum(upper, 1) + tl.sum(lower, 1)
    tl.store(out + pixel, rounded(total * 0.5, out.dtype.element_ty), inside)


def _run(latents: Tensor | None, z: Tensor, coeffs: Tensor | None, gamma: float) -> Tensor:
    b, c, t, h, w, _ = z.shape
    latents, coeffs = (None if x is None else x.contiguous() for x in (latents, coeffs))
    out = (z if latents is None else latents).new_empty((b, c, t, 2 * h, 2 * w))
    factor = block_factor(gamma)
    _noise.launch(
        lambda size: (triton.cdiv(out.numel() // 4, size["SIZE"]),),
        *(latents, z.contiguous(), coeffs, out, out.numel() // 4, w),
        *(factor[i][i] for i in range(4)),
        *(factor[i + 1][i] for i in range(3)),
        key=f"{name_of(z.dtype)}-{name_of(out.dtype)} blend={latents is not None}",
    )
    return out


def _block_noise(z: Tensor, *, gamma: float) -> Tensor:
    return _run(None, z, None, gamma)


def _renoise_upsample(latents: Tensor, noise: Tensor, coeffs: Tensor, *, gamma: float) -> Tensor:
    return _run(latents, noise, coeffs, gamma)


def _downsample_noise(x: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    out = x.new_empty((b, c, t, h // 2, w // 2))
    _shrink.launch(
        lambda size: (triton.cdiv(out.numel(), size["SIZE"]),),
        *(x.contiguous(), out, out.numel(), w // 2),
        key=name_of(x.dtype),
    )
    return out


KERNELS = {
    "block_noise": Kernel(_block_noise),
    "downsample_noise": Kernel(_downsample_noise),
    "renoise_upsample": Kernel(_renoise_upsample),
}
