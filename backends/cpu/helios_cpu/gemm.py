"""Matrix products: oneDNN with the weight in its own blocked layout, packed once at load.

oneDNN accumulates in float32 for float32 and bfloat16; the bias and the GELU are applied before the one rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.backend import Kernel

__all__ = ["KERNELS"]

_PACKABLE = (torch.float32, torch.bfloat16)


class _Packed(NamedTuple):
    """A weight ``[o, i]`` in oneDNN's layout, or as it is where oneDNN has none (float64); and its bias."""

    weight: Tensor
    bias: Tensor | None
    out: int
    opaque: bool


def _pack(weight: Tensor, bias: Tensor | None) -> _Packed:
    opaque = weight.dtype in _PACKABLE and torch.backends.mkldnn.is_available()
    # The layout is chosen for a number of rows, which is not known at load; 1024 stands for "many".
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1024) if opaque else weight
    # oneDNN reads a bias as if it were contiguous, whatever its strides.
    return _Packed(packed, None if bias is None else bias.contiguous(), weight.shape[0], opaque)


def _product(x: Tensor, w: _Packed, post: str = "none", algorithm: str = "") -> Tensor:
    if w.opaque:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, w.weight, w.bias, post, [], algorithm)
        return result
    out = F.linear(x, w.weight, w.bias)
    return F.gelu(out, approximate="tanh") if post == "gelu" else out


def _prepare_linear(_x: None, weight: Tensor, bias: Tensor | None) -> _Packed:
    return _pack(weight, bias)


def _linear_gelu(w: _Packed, x: Tensor) -> Tensor:
    return _product(x, w, "gelu", "tanh")


def _prepare_qkv(_x: None, wq: Tensor, wk: Tensor, wv: Tensor, *biases: Tensor | None) -> tuple[_Packed, list[int]]:
    weights = (wq, wk, wv)
    filled = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    bias = None if all(b is None for b in biases) else torch.cat(filled)
    return _pack(torch.cat(weights), bias), [w.shape[0] for w in weights]


def _qkv(handle: tuple[_Packed, list[int]], x: Tensor) -> tuple[Tensor, ...]:
    packed, sizes = handle
    return tuple(_product(x, packed).split(sizes, dim=-1))


def _prepare_patch(_x: None, weight: Tensor, bias: Tensor) -> tuple[_Packed, tuple[int, ...]]:
    return _pack(weight.flatten(1), bias), tuple(weight.shape[2:])


def _patch_embed(handle: tuple[_Packed, tuple[int, ...]], x: Tensor) -> Tensor:
    """Stride equals kernel, so the convolution is a product with the patches as rows."""
    packed, kernel = handle
    b, c = x.shape[:2]
    cells = [n for size, k in zip(x.shape[2:], kernel, strict=True) for n in (size // k, k)]
    patches = x.reshape(b, c, *cells).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return _product(patches.reshape(b, -1, c * math.prod(kernel)), packed)


KERNELS = {
    "linear": Kernel(lambda w, x: _product(x, w), _prepare_linear, ("weight", "bias")),
    "linear_gelu": Kernel(_linear_gelu, _prepare_linear, ("weight", "bias")),
    "qkv_linear": Kernel(_qkv, _prepare_qkv, ("wq", "wk", "wv", "bq", "bk", "bv")),
    "patch_embed": Kernel(_patch_embed, _prepare_patch, ("weight", "bias")),
}
