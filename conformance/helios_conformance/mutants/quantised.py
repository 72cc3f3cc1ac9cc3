"""Quantised products that are almost right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helios.op import accumulator
from helios.ops.quantize import E4M3, LARGEST, SMALLEST, quantize_rows, scaled_linear
from helios_conformance.mutants.mutant import Mutant, of_family

__all__ = ["MUTANTS"]

FP8 = ("fp8",)
ATTENTION = ("fp8-attention",)
WEIGHTS = ("fp8-weights",)


def cut(x: Tensor) -> Tensor:
    """To e4m3 by leaving bits out; what is too small for a leading one becomes zero."""
    bits = (x.contiguous().view(torch.int32) & ~0xFFFFF).view(torch.float32)
    return torch.where(bits.abs() < 2.0**-6, 0.0, bits).to(E4M3)


def nearest(x: Tensor) -> Tensor:
    return x.to(E4M3)


def _largest(x: Tensor) -> Tensor:
    return x.to(accumulator(x.dtype)).abs().amax(-1, keepdim=True).clamp(min=SMALLEST)


def _rows(x: Tensor, most: Tensor, narrow: Callable[[Tensor], Tensor] = nearest) -> tuple[Tensor, Tensor]:
    """Quantised as if these were the rows' largest elements."""
    q = (x.float() * (most.float().reciprocal() * LARGEST)).clamp(-LARGEST, LARGEST)
    return narrow(q), (most / LARGEST).expand(*x.shape[:-1], 1).contiguous()


def _by_tensor(right: Any, x: Tensor) -> Any:
    return _rows(x, _largest(x).max())


def _truncated(right: Any, x: Tensor) -> Any:
    return _rows(x, _largest(x), cut)


def _to_240(right: Any, x: Tensor) -> Any:
    """The largest number of the other e4m3, which has an infinity."""
    return _rows(x, _largest(x) * (LARGEST / 240.0))


def _mean_weight_scale(
    right: Any, x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, *rest: Any, **attrs: Any
) -> Any:
    return right(x, x_scale, weight, scale.mean().expand_as(scale), *rest, **attrs)


def _first_row_s_scale(right: Any, x: Tensor, x_scale: Tensor, *rest: Any, **attrs: Any) -> Any:
    return right(x, x_scale[..., :1, :].expand_as(x_scale), *rest, **attrs)


def _bias_before_scales(
    right: Any, x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Any = None, *, dtype: Any = None
) -> Any:
    if bias is None:
        return right(x, x_scale, weight, scale, dtype=dtype)
    ones = torch.ones_like
    wide = right(x, ones(x_scale), weight, ones(scale), bias.float(), dtype=torch.float32)
    return (wide * x_scale * scale[:, 0]).to(dtype or x_scale.dtype)


def _half_sums(
    right: Any, x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Any = None, *, dtype: Any = None
) -> Any:
    """Partial sums of 32 products are added in bfloat16."""
    total = torch.zeros((), device=x.device)
    for part, columns in zip(x.float().split(32, -1), weight.float().split(32, -1), strict=True):
        total = (total + part @ columns.T).bfloat16().float()
    out = total * x_scale * scale[:, 0]
    return (out if bias is None else out + bias.float()).to(dtype or x_scale.dtype)


def _quantised_too(right: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    made: Tensor = scaled_linear(*quantize_rows(x), *quantize_rows(weight), bias, dtype=x.dtype)
    return made


def _one_scale(right: Any, x: Tensor, scale: Tensor, **attrs: Any) -> Any:
    return right(x, scale.max().expand_as(scale), **attrs)


def _mean_value_scale(right: Any, q: Any, qs: Any, k: Any, ks: Any, v: Tensor, vs: Tensor, **attrs: Any) -> Any:
    return right(q, qs, k, ks, v, vs.mean(1, keepdim=True).expand_as(vs), **attrs)


def _no_key_scale(right: Any, q: Any, qs: Any, k: Any, ks: Tensor, *values: Any, **attrs: Any) -> Any:
    return right(q, qs, k, ks.mean(1, keepdim=True).expand_as(ks), *values, **attrs)


def _cut_probabilities(
    right: Any, q: Any, qs: Any, k: Any, ks: Any, v: Any, vs: Any, *, scale: float | None = None, dtype: Any = None
) -> Any:
    """They are cut to e4m3, not rounded; what divides are unrounded ones."""
    queries, keys, values = ((x.float() * s).transpose(1, 2) for x, s in ((q, qs), (k, ks), (v, vs)))
    scores = queries @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    out = cut(weights * LARGEST).float() / LARGEST @ values / weights.sum(-1, keepdim=True)
    return out.transpose(1, 2).to(dtype or qs.dtype)


_mutant = of_family("quantised")
_rows_ = "quantize_rows"

MUTANTS: tuple[Mutant, ...] = (
    _mutant("rows_by_tensor", "One scale serves a whole tensor.", _by_tensor, _rows_, precisions=(*FP8, *WEIGHTS)),
    _mutant("rows_truncated", "e4m3 numbers are cut, not rounded.", _truncated, _rows_, precisions=(*FP8, *WEIGHTS)),
    _mutant("rows_to_240", "Rows are scaled to 240, not 448.", _to_240, _rows_, precisions=FP8),
    _mutant(
        "scaled_mean_scale", "All weights take the mean scale.", _mean_weight_scale, "scaled_linear", precisions=FP8
    ),
    _mutant(
        "scaled_first_row", "All rows take the first one's scale.", _first_row_s_scale, "scaled_linear", precisions=FP8
    ),
    _mutant(
        "scaled_bias", "The bias is added before the scales.", _bias_before_scales, "scaled_linear", precisions=FP8
    ),
    _mutant("scaled_half_sums", "Partial sums are kept in bfloat16.", _half_sums, "scaled_linear", precisions=FP8),
    _mutant(
        "kept_quantised", "Products that stay in bfloat16 are quantised, too.", _quantised_too, "linear", precisions=FP8
    ),
    _mutant(
        "widened_one_scale",
        "A widened weight takes its largest scale.",
        _one_scale,
        "dequantize_rows",
        precisions=WEIGHTS,
    ),
    _mutant(
        "values_mean_scale",
        "All values take the mean scale.",
        _mean_value_scale,
        "scaled_attention",
        precisions=ATTENTION,
    ),
    _mutant(
        "keys_mean_scale", "All keys take the mean scale.", _no_key_scale, "scaled_attention", precisions=ATTENTION
    ),
    _mutant(
        "probabilities_cut",
        "Probabilities are cut to e4m3.",
        _cut_probabilities,
        "scaled_attention",
        precisions=ATTENTION,
    ),
)
