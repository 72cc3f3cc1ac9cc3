"""Kernels that are right for ordinary numbers alone: not for large ones, and not for rows without norm or variance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from helios_conformance.mutants.mutant import BF16, Mutant, Wrong, of_family

__all__ = ["MUTANTS"]

PRODUCTS = ("linear", "linear_gelu", "qkv_linear", "conv3d")
NORMS = ("rms_norm", "layer_norm", "channel_norm")
_HALF = torch.finfo(torch.float16).max


def _through_half(right: Any, *operands: Any, **attrs: Any) -> Any:
    """Operands and results lie in float16 on the way; the arithmetic itself is as it was."""
    results = right(*(x if x is None else x.half().to(x.dtype) for x in operands), **attrs)
    single = isinstance(results, Tensor)
    halves = [out.half().to(out.dtype) for out in ([results] if single else results)]
    return halves[0] if single else tuple(halves)


def _beyond(limit: float) -> Wrong:
    """Saturates its first operand."""

    def run(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Any:
        return right(x.clamp(-limit, limit), *rest, **attrs)

    return run


def _where_no_norm(dim: int) -> Wrong:
    """0 / 0 where a row, or a pixel, is all zero."""

    def run(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Tensor:
        return torch.where((x == 0).all(dim, keepdim=True), math.nan, right(x, *rest, **attrs))

    return run


def _where_no_variance(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Tensor:
    """Rows that are constant become what division by their spread would make of rounding."""
    return torch.where((x == x[..., :1]).all(-1, keepdim=True), 7.0, right(x, *rest, **attrs))


def _exponential_overflows(right: Any, x: Tensor) -> Tensor:
    """``x · e^x / (1 + e^x)``."""
    grown = torch.exp(x.float())
    return (x.float() * (grown / (1.0 + grown))).to(x.dtype)


_mutant = of_family("extremes")


MUTANTS: tuple[Mutant, ...] = (
    _mutant("half_products", "Products take and give float16.", _through_half, *PRODUCTS, precisions=BF16),
    _mutant("half_attention", "Attention takes and gives float16.", _through_half, "attention", precisions=BF16),
    _mutant("products_saturate", "Products saturate operands at 1000.", _beyond(1e3), *PRODUCTS),
    _mutant("norms_saturate", "Norms saturate operands at 1000.", _beyond(1e3), *NORMS),
    _mutant("residual_saturates", "The residual stream saturates as float16 does.", _beyond(_HALF), "gated_add", "add"),
    _mutant("rms_zero_rows", "RMSNorm of a row of zeros is NaN.", _where_no_norm(-1), "rms_norm"),
    _mutant("channel_zero_pixels", "The channel norm of a black pixel is NaN.", _where_no_norm(1), "channel_norm"),
    _mutant("layer_constant_rows", "LayerNorm of a constant row is not 0.", _where_no_variance, "layer_norm"),
    _mutant("silu_overflows", "SiLU is NaN where its exponential overflows.", _exponential_overflows, "silu"),
)
