"""Matrix products and convolutions that are almost right."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_conformance.mutants.mutant import BF16, FP32, Mutant, of_family, wide

__all__ = ["MUTANTS"]


def tf32(x: Any) -> Any:
    """Rounded to the ten bits of mantissa that tensor cores take of float32."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def truncated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To bfloat16 by leaving bits out."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    return (x.float().contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype)


def _tf32(right: Any, x: Tensor, weight: Tensor, *rest: Any, **attrs: Any) -> Any:
    return right(tf32(x), tf32(weight), *rest, **attrs)


def _bfloat16(right: Any, x: Tensor, weight: Tensor, *rest: Any, **attrs: Any) -> Any:
    return right(x.bfloat16().to(x.dtype), weight.bfloat16().to(x.dtype), *rest, **attrs)


def _eight_bits(right: Any, x: Tensor, weight: Tensor, *rest: Any, **attrs: Any) -> Any:
    step = weight.float().flatten(1).abs().amax(1).clamp_min(1e-20).view(-1, *(1,) * (weight.ndim - 1)) / 127.0
    return right(x, ((weight.float() / step).round() * step).to(weight.dtype), *rest, **attrs)


def _narrow_accumulation(right: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    total = torch.zeros((), device=x.device)
    for part, columns in zip(x.float().split(16, -1), weight.float().split(16, -1), strict=True):
        total = (total + F.linear(part, columns)).bfloat16().float()
    return (total if bias is None else total + bias.float()).to(x.dtype)


def _truncated(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Any:
    return truncated(right(wide(x), *map(wide, rest), **attrs), x.dtype)


def _bias_after_rounding(right: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, **attrs: Any) -> Any:
    out = right(x, weight, None, **attrs)
    return out if bias is None else out + bias.view(-1, *(1,) * (weight.ndim - 2))


def _no_bias(right: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, **attrs: Any) -> Any:
    return right(x, weight, None, **attrs)


def _tail_columns(right: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Columns of the inner dimension beyond the last full 8."""
    full = x.shape[-1] // 8 * 8 or x.shape[-1]
    return right(x[..., :full], weight[:, :full], bias)


def _keys_for_values(right: Any, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, *biases: Any) -> Any:
    bq, bk, bv = biases or (None, None, None)
    return right(x, wq, wv, wk, bq, bv, bk)


def _columns_first(right: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return right(x, weight.transpose(3, 4), bias)


def _tokens_by_column(right: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return right(x.transpose(3, 4), weight.transpose(3, 4), bias)


def _true_convolution(right: Any, x: Tensor, weight: Tensor, *rest: Any, **attrs: Any) -> Any:
    return right(x, weight.flip(2), *rest, **attrs)


def _edge_repeated(
    right: Any, x: Tensor, weight: Tensor, bias: Any = None, *, padding: Any = (0, 0, 0), **attrs: Any
) -> Any:
    t, h, w = padding
    return right(F.pad(x, (w, w, h, h, t, t), mode="replicate"), weight, bias, **attrs)


def _stride_from_one(
    right: Any, x: Tensor, weight: Tensor, bias: Any = None, *, stride: Any = (1, 1, 1), **attrs: Any
) -> Any:
    """Where it strides over rows and columns, the last row and column are read for the first."""
    if stride[1] > 1:
        x = x.roll((-1, -1), (3, 4))
    return right(x, weight, bias, stride=stride, **attrs)


def _erf(right: Any, x: Tensor) -> Tensor:
    return F.gelu(x.float()).to(x.dtype)


def _sigmoid(right: Any, x: Tensor) -> Tensor:
    return (x.float() * torch.sigmoid(1.702 * x.float())).to(x.dtype)


def _narrow_silu(right: Any, x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-x))


def _linear_gelu_erf(right: Any, *operands: Any) -> Any:
    return F.gelu(F.linear(*map(wide, operands))).to(operands[0].dtype)


def _fp16_range(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Any:
    return right(x.clamp(-16.0, 16.0), *rest, **attrs)


_mutant = of_family("products")


MUTANTS: tuple[Mutant, ...] = (
    _mutant("linear_tf32", "float32 products silently take TF32 operands.", _tf32, "linear", precisions=FP32),
    _mutant("conv_tf32", "float32 convolutions silently take TF32 operands.", _tf32, "conv3d", precisions=FP32),
    _mutant("linear_bfloat16", "float32 products take bfloat16 operands.", _bfloat16, "linear", precisions=FP32),
    _mutant("linear_quantised", "Weights are silently quantised to 8 bits.", _eight_bits, "linear"),
    _mutant("linear_bfloat16_sums", "Partial sums are kept in bfloat16.", _narrow_accumulation, "linear"),
    _mutant("linear_truncates", "Results are cut to bfloat16, not rounded.", _truncated, "linear", precisions=BF16),
    _mutant("residual_truncates", "Residual sums are cut to bfloat16.", _truncated, "gated_add", precisions=BF16),
    _mutant(
        "bias_after_rounding", "The bias is added after rounding.", _bias_after_rounding, "conv3d", precisions=BF16
    ),
    _mutant("linear_no_bias", "The bias is left out.", _no_bias, "linear"),
    _mutant("linear_tail_columns", "Columns beyond the last full 8 are not summed.", _tail_columns, "linear"),
    _mutant("linear_outliers_clipped", "Activations beyond 16 are clipped.", _fp16_range, "linear"),
    _mutant("qkv_values_for_keys", "The fused projection gives values for keys.", _keys_for_values, "qkv_linear"),
    _mutant("patch_columns_first", "Patches are read column by column.", _columns_first, "patch_embed"),
    _mutant("tokens_by_column", "Tokens come in column order.", _tokens_by_column, "patch_embed"),
    _mutant("conv_time_flipped", "The convolution runs backwards in time.", _true_convolution, "conv3d"),
    _mutant("conv_edge_repeated", "Frames are padded by their border, not by zeros.", _edge_repeated, "conv3d"),
    _mutant("conv_stride_shifted", "Convolutions with a stride begin one pixel late.", _stride_from_one, "conv3d"),
    _mutant("gelu_erf", "GELU in its erf form.", _erf, "gelu", precisions=FP32),
    _mutant("gelu_sigmoid", "GELU as x * sigmoid(1.702 x).", _sigmoid, "gelu"),
    _mutant(
        "linear_gelu_erf",
        "The fused product and GELU takes the erf form.",
        _linear_gelu_erf,
        "linear_gelu",
        precisions=FP32,
    ),
    _mutant("silu_narrow", "SiLU computes in bfloat16.", _narrow_silu, "silu", precisions=BF16),
)
