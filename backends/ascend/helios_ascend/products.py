"""Matrix products with weights: aclnnAddmm on matrices, the weight laid once at load as the cube unit reads it.

**Layout.** A weight ``[o, i]`` is turned to ``[i, o]`` and cast to FRACTAL_NZ when it is prepared, so that no product
transposes it or cuts it into blocks again. In float32 there is no such product: the matrix stays as it is.

**One rounding.** The bias joins the sums in float32 before they are rounded. Activations come as ``[rows, i]``: on
other ranks torch multiplies first and adds the bias to what was rounded.

**Three products for q, k and v**, not one. A common matrix would leave its thirds as strided views of one buffer, which
the norm behind it does not take: three copies of 113 MB at stage 2 of ``14b``, where x read twice more costs 226 MB
in products that are bound by the cube unit (computed, not measured).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from helios.backend import Kernel
from helios_ascend import operators

__all__ = ["KERNELS", "Matrix", "product"]


class Matrix(NamedTuple):
    """A weight ``[i, o]``, in 16 bits in blocks, and its bias ``[o]``."""

    weight: Tensor
    bias: Tensor | None


def matrix(weight: Tensor, bias: Tensor | None) -> Matrix:
    """Lay a weight ``[o, i]`` out for products."""
    laid = operators.blocked(weight.t().contiguous())
    return Matrix(laid, None if bias is None else bias.contiguous())


def product(rows: Tensor, w: Matrix) -> Tensor:
    """``[n, i]``, contiguous, times ``[i, o]``."""
    return torch.mm(rows, w.weight) if w.bias is None else torch.addmm(w.bias, rows, w.weight)


def _prepare_linear(_x: None, weight: Tensor, bias: Tensor | None) -> Matrix:
    return matrix(weight, bias)


def _linear(w: Matrix, x: Tensor) -> Tensor:
    out = product(x.contiguous().view(-1, x.shape[-1]), w)
    return out.view(*x.shape[:-1], out.shape[1])


def _prepare_patch(_x: None, weight: Tensor, bias: Tensor) -> tuple[Matrix, tuple[int, ...]]:
    return matrix(weight.contiguous().flatten(1), bias), tuple(weight.shape[2:])


def _patch_embed(handle: tuple[Matrix, tuple[int, ...]], x: Tensor) -> Tensor:
    """Stride equals kernel: the patches are rows of a product, and no convolution is needed."""
    w, kernel = handle
    b, c = x.shape[:2]
    cells = [n for size, k in zip(x.shape[2:], kernel, strict=True) for n in (size // k, k)]
    tokens, width = math.prod(cells[::2]), c * math.prod(kernel)
    videos = [_patches(x[i], c, cells).view(tokens, width) for i in range(b)]
    rows = videos[0] if b == 1 else torch.cat(videos)
    return product(rows, w).view(b, tokens, -1)


def _patches(video: Tensor, c: int, cells: list[int]) -> Tensor:
    """``[c, t, h, w]`` as ``[t', h', w', c, kt, kh, kw]``: seven dimensions, since copies know eight."""
    return video.contiguous().view(c, *cells).permute(1, 3, 5, 0, 2, 4, 6).contiguous()


KERNELS = {
    "linear": Kernel(_linear, _prepare_linear, ("weight", "bias")),
    "patch_embed": Kernel(_patch_embed, _prepare_patch, ("weight", "bias")),
}
