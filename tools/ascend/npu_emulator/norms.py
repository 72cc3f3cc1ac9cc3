"""Norms: statistics in float32, the result rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_emulator.rules import FLOATS, dtypes, operator, require, same_dtype

__all__ = ["standardized"]


def _over(name: str, x: Tensor, gamma: Tensor) -> tuple[int, ...]:
    """The dimensions that gamma covers: the last ones of x."""
    covered = x.shape[x.dim() - gamma.dim() :]
    require(1 <= x.dim() <= 8 and gamma.shape == covered, name, f"gamma {list(gamma.shape)} is not the tail of x")
    return tuple(range(x.dim() - gamma.dim(), x.dim()))


def _rms(x: Tensor, gamma: Tensor, epsilon: float, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.square().mean(over, keepdim=True) + epsilon)
    return x * rstd * gamma.float(), rstd


@operator("npu_rms_norm")
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """``x · rsqrt(mean x² + epsilon) · gamma``, and the reciprocal root."""
    dtypes("npu_rms_norm", FLOATS, input=input, gamma=gamma)
    same_dtype("npu_rms_norm", input=input, gamma=gamma)
    y, rstd = _rms(input.float(), gamma, epsilon, _over("npu_rms_norm", input, gamma))
    return y.to(input.dtype), rstd


@operator("npu_gemma_rms_norm")
def npu_gemma_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The same with ``1 + gamma``."""
    dtypes("npu_gemma_rms_norm", FLOATS, input=input, gamma=gamma)
    same_dtype("npu_gemma_rms_norm", input=input, gamma=gamma)
    y, rstd = _rms(input.float(), 1 + gamma.float(), epsilon, _over("npu_gemma_rms_norm", input, gamma))
    return y.to(input.dtype), rstd


@operator("npu_add_rms_norm")
def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Norm of the rounded sum, the reciprocal root, and that sum."""
    dtypes("npu_add_rms_norm", FLOATS, x1=x1, x2=x2, gamma=gamma)
    same_dtype("npu_add_rms_norm", x1=x1, x2=x2, gamma=gamma)
    require(x1.shape == x2.shape, "npu_add_rms_norm", "x1 and x2 differ in shape")
    x = (x1.float() + x2.float()).to(x1.dtype)
    y, rstd = _rms(x.float(), gamma, epsilon, _over("npu_add_rms_norm", x, gamma))
    return y.to(x1.dtype), rstd, x


def standardized(x: Tensor, over: tuple[int, ...], epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Without mean and of unit deviation over some dimensions, the mean, and the reciprocal deviation."""
    mean = x.mean(over, keepdim=True)
    rstd = torch.rsqrt((x - mean).square().mean(over, keepdim=True) + epsilon)
    return (x - mean) * rstd, mean, rstd


@operator("npu_add_layer_norm")
def npu_add_layer_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor, epsilon: float = 1e-5, additional_output: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Layer norm of ``x1 + x2``, mean, reciprocal deviation, and the sum: nothing but NaN where it is not asked for."""
    name = "npu_add_layer_norm"
    dtypes(name, FLOATS, x1=x1, x2=x2, gamma=gamma, beta=beta)
    same_dtype(name, x1=x1, x2=x2)
    same_dtype(name, gamma=gamma, beta=beta)
    require(gamma.dtype in (x1.dtype, torch.float32), name, "gamma is of the dtype of x1, or float32")
    require(x1.shape == x2.shape and gamma.shape == beta.shape, name, "x1 and x2, or gamma and beta, differ in shape")
    x = x1.float() + x2.float()
    y, mean, rstd = standardized(x, _over(name, x, gamma), epsilon)
    y = (y * gamma.float() + beta.float()).to(x1.dtype)
    return y, mean, rstd, x.to(x1.dtype) if additional_output else torch.full_like(x1, float("nan"))


@operator("npu_layer_norm_eval")
def npu_layer_norm_eval(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm over the last dimensions."""
    name = "npu_layer_norm_eval"
    dtypes(name, FLOATS, input=input, weight=weight, bias=bias)
    same_dtype(name, input=input, weight=weight, bias=bias)
    shape = tuple(normalized_shape)
    require(input.shape[-len(shape) :] == shape, name, f"{list(shape)} is not the tail of {list(input.shape)}")
    y = standardized(input.float(), tuple(range(input.dim() - len(shape), input.dim())), eps)[0]
    y = y if weight is None else y * weight.float()
    return (y if bias is None else y + bias.float()).to(input.dtype)
