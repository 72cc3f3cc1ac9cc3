"""Matrix products and convolutions on the cube unit: sums in float32, the result rounded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_emulator.rules import FLOATS, dtypes, operator, require, same_dtype
from npu_emulator.stand_in import hf32

__all__ = ["coarse", "wide"]

MANTISSA = 11
"""Bits of a fraction that HF32 keeps of float32's 23."""


def coarse(x: Tensor) -> Tensor:
    """Float32 as HF32 multiplies it: rounded to fewer bits."""
    dropped = 23 - MANTISSA
    bits = x.contiguous().view(torch.int32)
    half = (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
    return ((bits + half) & -(1 << dropped)).view(torch.float32)


def wide(fn: Callable[..., Tensor], tensors: Sequence[Tensor | None], unit: str, **args: Any) -> Tensor:
    """A product of the first operands that counts in float32, in the dtype that they came in."""
    first = next(x for x in tensors if x is not None)
    operands = [None if x is None else x.float() for x in tensors]
    if first.dtype == torch.float32 and hf32(unit):
        operands = [x if x is None or x.dim() < 2 else coarse(x) for x in operands]
    return fn(*operands, **args).to(first.dtype)


@operator("npu_linear")
def npu_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x wᵀ + b`` of two matrices; its page lists no bfloat16."""
    dtypes("npu_linear", (torch.float16, torch.float32), input=input, weight=weight, bias=bias)
    same_dtype("npu_linear", input=input, weight=weight, bias=bias)
    require(input.dim() == 2 and weight.dim() == 2, "npu_linear", "input and weight are matrices")
    return wide(F.linear, (input, weight, bias), "matmul")


@operator("npu_bmmV2")
def npu_bmm(input: Tensor, mat2: Tensor, output_sizes: Sequence[int]) -> Tensor:
    """Products of batches."""
    dtypes("npu_bmmV2", (torch.float16, torch.float32), input=input, mat2=mat2)
    same_dtype("npu_bmmV2", input=input, mat2=mat2)
    require(not output_sizes, "npu_bmmV2", "output_sizes belongs to the backward pass")
    return wide(torch.matmul, (input, mat2), "matmul")


@operator("npu_conv3d", "npu_conv2d", "npu_convolution")
def npu_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Cross-correlation with zeros on both sides."""
    dtypes("npu_conv", FLOATS, input=input, weight=weight, bias=bias)
    same_dtype("npu_conv", input=input, weight=weight, bias=bias)
    given = {"stride": list(stride), "padding": list(padding), "dilation": list(dilation), "groups": groups}
    fn = F.conv3d if input.dim() == 5 else F.conv2d
    return wide(fn, (input, weight, bias), "conv", **given)
