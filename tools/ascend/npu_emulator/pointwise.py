"""Activations and rotary embedding: each element in float32, rounded once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from npu_emulator.rules import FLOATS, dtypes, operator, require, same_dtype

__all__: list[str] = []


@operator("npu_fast_gelu", "fast_gelu")
def npu_fast_gelu(input: Tensor) -> Tensor:
    """``x / (1 + exp(−1.702 x))``: the formula of the A2 and A3 generations."""
    dtypes("npu_fast_gelu", FLOATS, input=input)
    x = input.float()
    return (x / (1 + torch.exp(-1.702 * x))).to(input.dtype)


@operator("npu_gelu")
def npu_gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """With erf unless ``approximate`` is ``tanh``."""
    dtypes("npu_gelu", FLOATS, input=input)
    return _gelu(input.float(), approximate, "npu_gelu").to(input.dtype)


def _gelu(x: Tensor, approximate: str, name: str) -> Tensor:
    require(approximate in ("none", "tanh"), name, f"approximate is none or tanh, not {approximate!r}")
    if approximate == "none":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@operator("npu_silu")
def npu_silu(input: Tensor) -> Tensor:
    """``x · sigmoid(x)``; its page lists no bfloat16."""
    dtypes("npu_silu", (torch.float16, torch.float32), input=input)
    x = input.float()
    return (x * torch.sigmoid(x)).to(input.dtype)


@operator("npu_swiglu")
def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """``silu(a) · b`` of the two halves along ``dim``."""
    dtypes("npu_swiglu", FLOATS, input=input)
    require(input.shape[dim] % 2 == 0, "npu_swiglu", f"{input.shape[dim]} entries have no halves")
    a, b = input.float().chunk(2, dim)
    return (a * torch.sigmoid(a) * b).to(input.dtype)


@operator("npu_rotary_mul")
def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """``r1 · x + r2 · turned(x)``: pairs are the two halves of a head, or neighbours where it is ``interleave``."""
    name = "npu_rotary_mul"
    require(rotate is None, name, "rotate is not emulated, nor is it in every version")
    dtypes(name, FLOATS, input=input, r1=r1, r2=r2)
    same_dtype(name, input=input, r1=r1, r2=r2)
    require(input.dim() == 4 and r1.dim() == 4 and r1.shape == r2.shape, name, "all have four dimensions, r1 as r2")
    d = input.shape[3]
    require(d % 2 == 0 and d < 896 and r1.shape[3] == d, name, f"{d} channels: an even number below 896, as in r1")
    require(rotary_mode in ("half", "interleave"), name, f"rotary_mode is half or interleave, not {rotary_mode!r}")
    _tables(name, input, r1, rotary_mode)
    x = input.float()
    if rotary_mode == "half":
        a, b = x.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return (r1.float() * x + r2.float() * turned).to(input.dtype)


def _tables(name: str, x: Tensor, table: Tensor, mode: str) -> None:
    """Tables are those of one sequence: 1S1D for BSND, 11SD for BNSD, S11D for SBND; half takes broadcast batches."""
    sizes, own = x.shape[:3], table.shape[:3]
    if mode == "half":
        require(all(n in (1, m) for n, m in zip(own, sizes, strict=True)), name, f"table {list(table.shape)}")
        require(sizes[0] < 1000 and sizes[1] < 1000, name, "batch and heads below 1000")
        return
    others = {(1, sizes[1], 1): sizes[0] * sizes[2], (1, 1, sizes[2]): sizes[0] * sizes[1]}
    others |= {(sizes[0], 1, 1): sizes[1] * sizes[2]}
    require(tuple(own) in others, name, f"interleave wants 1S1D, 11SD or S11D, came {list(table.shape)}")
    fewest = min(count for shape, count in others.items() if shape == tuple(own))
    require(fewest < 1000, name, f"batch × heads is {fewest}, must be below 1000")
