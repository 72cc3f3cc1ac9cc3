"""Operands and handles of products of e4m3 numbers, as several tests draw them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helios import op
from helios_cuda import packed, scaled
from helios_cuda.held import Quantised

BF16, F32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
UNIT = {BF16: 2.0**-8, F32: 2.0**-24}


def body(name: str, *operands: Any, **attrs: Any) -> Any:
    return op.get(name).fn(*operands, **attrs)


def drawn(m: int, n: int, k: int, bias: bool = True, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, Quantised]:
    g = torch.Generator().manual_seed(m + n + k)
    x, weight = torch.randn(m, k, generator=g), torch.randn(n, k, generator=g) * k**-0.5
    b = torch.randn(n, generator=g).to(BF16) if bias else None
    return *body("quantize_rows", x), Quantised(*body("quantize_rows", weight), b, dtype)


def wide(x: Tensor, x_scale: Tensor, w: Quantised) -> tuple[Tensor, Tensor]:
    """The product in float64, and the sum of its terms' sizes."""
    left, right = x.double() * x_scale.double(), w.weight.double() * w.scale.double()
    bias = 0.0 if w.bias is None else w.bias.double()
    return left @ right.T + bias, left.abs() @ right.abs().T + abs(bias)


def run(name: str, handle: Any, *operands: Tensor) -> Any:
    return {**scaled.KERNELS, **packed.KERNELS}[name].run(handle, *operands)


def prepared(name: str, *operands: Any) -> Any:
    prepare = {**scaled.KERNELS, **packed.KERNELS}[name].prepare
    assert prepare is not None
    return prepare(*operands)
