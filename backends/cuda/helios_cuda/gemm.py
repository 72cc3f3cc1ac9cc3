"""Matrix products: cuBLASLt through torch, with the bias and the GELU in the epilogue where it pays.

No Triton kernel stands here, since none would be faster than cuBLASLt at these sizes: all of them are bound by the
tensor cores. At the published sizes in bf16 (384 × 640; 2940, 4560 and 11040 tokens in the three stages; width 5120):

=====================  ============  =====================  ================
one block              FLOP a token  FLOP at stage 0, 1, 2  bytes of weights
=====================  ============  =====================  ================
``qkv_linear``         157.3e6       0.46, 0.72, 1.74 T     157 MB
3 × ``linear`` 5120    157.3e6       0.46, 0.72, 1.74 T     157 MB
``linear_gelu`` up     141.6e6       0.42, 0.65, 1.56 T     142 MB
``linear`` down        141.6e6       0.42, 0.65, 1.56 T     142 MB
=====================  ============  =====================  ================

The three are the outputs of both attentions and the query of the text; where noisy tokens alone ask the text (540, 2160
or 8640 of them), two of the three see no others, and the table counts too much. Keys and values of the text are two
more, once a prompt. One weight matrix for q, k and v: x is read once instead of three times (113 MB each at stage 2,
26 µs at 4.3 TB/s), and the output is one buffer whose thirds the next kernel reads by their strides.

**GELU in the epilogue.** Apart it reads and writes ``[tokens, 13824]``: 0.61 GB at stage 2, 0.14 ms a block beside
2.0 ms of product. torch's ``_addmm_activation`` asks cuBLASLt for ``GELU_BIAS``, which is the tanh form and acts on the
float32 accumulator, so that the result is rounded once. A product of one row or one inner channel cannot go that way
in torch; there it falls back to a product and a GELU by itself, which the op allows too. In float32 the two are always
apart: the epilogue's tanh is a fast one, and float32 is the precision that others are compared with.

**One row.** The modulation of a step is a product of one row with 30720 × 5120: 0.31 GB of weights, so bound by memory
(73 µs at 4.3 TB/s, six times a chunk at most), and any of cuBLAS' ways reads them once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.backend import Kernel
from helios.op import multiplicands

__all__ = ["KERNELS", "Matrix"]


class Matrix(NamedTuple):
    """A weight ``[o, i]``, contiguous, and its bias ``[o]``; ``parts`` are the widths of what was laid side by side."""

    weight: Tensor
    bias: Tensor | None
    parts: tuple[int, ...] = ()


def _matrix(weight: Tensor, bias: Tensor | None) -> Matrix:
    # cuBLASLt takes a bias in its epilogue only as a contiguous vector.
    return Matrix(weight.contiguous(), None if bias is None else bias.contiguous())


def _rows(x: Tensor) -> Tensor:
    """As a matrix, which torch gives to cuBLAS with its row stride: a third of a fused buffer needs no copy."""
    return x.reshape(-1, x.shape[-1])


def _product(x: Tensor, w: Matrix) -> Tensor:
    rows, weight, bias = multiplicands(_rows(x), w.weight, w.bias)
    assert rows is not None
    assert weight is not None
    out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return out.to(x.dtype).view(*x.shape[:-1], out.shape[1])


def _prepare_linear(_x: None, weight: Tensor, bias: Tensor | None) -> Matrix:
    return _matrix(weight, bias)


def _linear(w: Matrix, x: Tensor) -> Tensor:
    return _product(x, w)


def _prepare_linear_gelu(_x: None, weight: Tensor, bias: Tensor | None) -> Matrix:
    # The epilogue has no GELU without a bias in all of torch's versions.
    return _matrix(weight, weight.new_zeros(weight.shape[0]) if bias is None else bias)


def _linear_gelu(w: Matrix, x: Tensor) -> Tensor:
    if x.is_cuda and x.dtype != torch.float32:
        assert w.bias is not None
        out = torch._addmm_activation(w.bias, _rows(x), w.weight.t(), use_gelu=True)
        return out.view(*x.shape[:-1], out.shape[1])
    # Also on the CPU, where torch's fused form is the GELU with erf.
    return F.gelu(_product(x, w), approximate="tanh")


def _prepare_qkv(_x: None, wq: Tensor, wk: Tensor, wv: Tensor, *biases: Tensor | None) -> Matrix:
    """One matrix, made where the weights are: on the device."""
    weights = (wq, wk, wv)
    filled = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    bias = None if all(b is None for b in biases) else torch.cat(filled)
    return Matrix(torch.cat(weights), bias, tuple(w.shape[0] for w in weights))


def _qkv_linear(w: Matrix, x: Tensor) -> tuple[Tensor, ...]:
    """Views of one buffer ``[..., q + k + v]``."""
    return tuple(_product(x, w).split(w.parts, dim=-1))


def _prepare_patch(_x: None, weight: Tensor, bias: Tensor) -> tuple[Matrix, tuple[int, ...]]:
    return _matrix(weight.flatten(1), bias), tuple(weight.shape[2:])


def _patch_embed(handle: tuple[Matrix, tuple[int, ...]], x: Tensor) -> Tensor:
    """Stride equals kernel, so the convolution is a product with the patches as rows.

    Laying out the patches moves 2.2 MB at stage 2, and the product writes 88 MB of tokens: 21 µs at 4.3 TB/s.
    """
    matrix, kernel = handle
    b, c = x.shape[:2]
    cells = [n for size, k in zip(x.shape[2:], kernel, strict=True) for n in (size // k, k)]
    patches = x.reshape(b, c, *cells).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return _product(patches.reshape(b, math.prod(cells[::2]), c * math.prod(kernel)), matrix)


KERNELS = {
    "linear": Kernel(_linear, _prepare_linear, ("weight", "bias")),
    "linear_gelu": Kernel(_linear_gelu, _prepare_linear_gelu, ("weight", "bias")),
    "qkv_linear": Kernel(_qkv_linear, _prepare_qkv, ("wq", "wk", "wv", "bq", "bk", "bv")),
    "patch_embed": Kernel(_patch_embed, _prepare_patch, ("weight", "bias")),
}
