"""Norms, modulation and residuals that are almost right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_conformance.mutants.mutant import BF16, Mutant, Wrong, of_family

__all__ = ["MUTANTS"]


def _eps_outside(right: Any, x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    wide = x.float()
    out: Tensor = wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps)
    return (out if weight is None else out * weight.float()).to(x.dtype)


def _eps_larger(right: Any, *operands: Any, eps: float = 1e-6, **attrs: Any) -> Any:
    return right(*operands, eps=10.0 * eps, **attrs)


def _sum_for_mean(right: Any, x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """The mean over the padded width: 8 channels at a time, the last group counted as full."""
    d = x.shape[-1]
    grown = -(-d // 8) * 8
    out: Tensor = right(x, weight, eps=eps * grown / d) * math.sqrt(grown / d)
    return out.to(x.dtype)


def _one_plus_weight(right: Any, x: Tensor, weight: Tensor | None = None, **attrs: Any) -> Any:
    return right(x, None if weight is None else 1.0 + weight, **attrs)


def _over_heads(
    right: Any, q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, table: Tensor, *, heads: int, eps: float = 1e-6
) -> Any:
    def by_head(x: Tensor) -> Any:
        """So scaled that the norm over the width does nothing more."""
        split = x.float().unflatten(-1, (heads, -1))
        return (split * torch.rsqrt(split.square().mean(-1, keepdim=True) + eps)).flatten(-2)

    out_q, out_k = right(by_head(q), by_head(k), wq, wk, table, heads=heads, eps=eps)
    return out_q.to(q.dtype), out_k.to(k.dtype)


def _layer_norm(normed: Callable[[Tensor, float], Tensor]) -> Wrong:
    """A LayerNorm that is right but for ``normed(x, eps)``, which centres and scales into float32."""

    def run(
        right: Any,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        eps: float = 1e-6,
        dtype: Any = None,
    ) -> Tensor:
        out = normed(x, eps)
        out = out if weight is None else out * weight.float()
        return (out if bias is None else out + bias.float()).to(dtype or x.dtype)

    return run


def _unbiased(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide - wide.mean(-1, keepdim=True)) * torch.rsqrt(wide.var(-1, keepdim=True) + eps)


def _one_pass(x: Tensor, eps: float) -> Tensor:
    """Variance as the mean of squares less the square of the mean, both in the working dtype."""
    mean = x.mean(-1, keepdim=True)
    variance = ((x * x).mean(-1, keepdim=True) - mean * mean).float().clamp_min(0.0)
    return (x.float() - mean.float()) * torch.rsqrt(variance + eps)


def _no_bias(right: Any, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **attrs: Any) -> Any:
    return right(x, weight, None, **attrs)


def _own_dtype(right: Any, x: Tensor, *rest: Any, dtype: Any = None, **attrs: Any) -> Any:
    return right(x, *rest, **attrs)


def _one_row(right: Any, x: Tensor, scale: Tensor, shift: Tensor, *, split: int = 0, **attrs: Any) -> Any:
    return right(x, scale[:, -1:], shift[:, -1:], split=0, **attrs)


def _split_off_by_one(right: Any, x: Tensor, scale: Tensor, shift: Tensor, *, split: int = 0, **attrs: Any) -> Any:
    return right(x, scale, shift, split=min(split + 1, x.shape[1]), **attrs)


def _no_one_plus(right: Any, x: Tensor, scale: Tensor, shift: Tensor, **attrs: Any) -> Any:
    return right(x, scale - 1.0, shift, **attrs)


def _swapped(right: Any, x: Tensor, scale: Tensor, shift: Tensor, **attrs: Any) -> Any:
    return right(x, shift, scale, **attrs)


def _no_gate(right: Any, x: Tensor, y: Tensor, gate: Tensor | None = None, *, gate_split: int = 0) -> Any:
    return right(x, y, None)


def _head_not_tail(right: Any, x: Tensor, y: Tensor, *rest: Any, **attrs: Any) -> Tensor:
    n = y.shape[1]
    return torch.cat((right(x[:, :n], y, *rest, **attrs), x[:, n:]), 1)


def _twice_rounded(right: Any, x: Tensor, y: Tensor, gate: Tensor | None = None, *, gate_split: int = 0) -> Any:
    """The gated branch is rounded before it is added."""
    zeros = torch.zeros_like(y)
    return right(x, y if gate is None else right(zeros, y, gate, gate_split=gate_split))


def _added_eps(right: Any, x: Tensor, gamma: Tensor, *, eps: float = 1e-12) -> Tensor:
    wide = x.float()
    length: Tensor = torch.linalg.vector_norm(wide, dim=1, keepdim=True) + 1e-6
    return (wide / length * math.sqrt(x.shape[1]) * gamma.float()[:, None, None, None]).to(x.dtype)


def _no_root(right: Any, x: Tensor, gamma: Tensor, **attrs: Any) -> Tensor:
    gain = gamma.float()[:, None, None, None]
    return (F.normalize(x.float(), dim=1) * math.sqrt(x.shape[1] - 1) * gain).to(x.dtype)


_mutant = of_family("norms")


MUTANTS: tuple[Mutant, ...] = (
    _mutant("rms_eps_outside", "RMSNorm adds epsilon outside of the root.", _eps_outside, "rms_norm"),
    _mutant("rms_eps_larger", "RMSNorm takes an epsilon of 1e-5 for 1e-6.", _eps_larger, "rms_norm"),
    _mutant("layer_eps_larger", "LayerNorm takes an epsilon of 1e-5 for 1e-6.", _eps_larger, "layer_norm"),
    _mutant("rms_padded_width", "RMSNorm divides by the width rounded up to 8.", _sum_for_mean, "rms_norm"),
    _mutant("rms_one_plus_weight", "RMSNorm multiplies by 1 + weight.", _one_plus_weight, "rms_norm"),
    _mutant(
        "rms_over_heads",
        "Queries and keys are normalised head by head, not over the width.",
        _over_heads,
        "qk_norm_rope",
    ),
    _mutant("layer_unbiased", "LayerNorm divides by n - 1.", _layer_norm(_unbiased), "layer_norm"),
    _mutant(
        "layer_one_pass",
        "LayerNorm takes its variance from sums in the working dtype.",
        _layer_norm(_one_pass),
        "layer_norm",
        precisions=BF16,
    ),
    _mutant("layer_no_bias", "The affine LayerNorm forgets its bias.", _no_bias, "layer_norm"),
    _mutant(
        "layer_own_dtype",
        "LayerNorm ignores the output dtype that is asked for.",
        _own_dtype,
        "layer_norm",
        precisions=BF16,
    ),
    _mutant(
        "timestep_zero_missing", "History is modulated by the current timestep, not by t = 0.", _one_row, "modulate"
    ),
    _mutant("modulate_split_late", "The first noisy token is modulated as history.", _split_off_by_one, "modulate"),
    _mutant("modulate_without_one", "Modulation multiplies by scale, not by 1 + scale.", _no_one_plus, "modulate"),
    _mutant("modulate_swapped", "Scale and shift are swapped.", _swapped, "modulate"),
    _mutant("gate_forgotten", "The residual is added without its gate.", _no_gate, "gated_add"),
    _mutant(
        "residual_at_head", "The branch is added to the first tokens, not to the last.", _head_not_tail, "gated_add"
    ),
    _mutant(
        "residual_twice_rounded",
        "The gated branch is rounded before it is added.",
        _twice_rounded,
        "gated_add",
        precisions=BF16,
    ),
    _mutant("channel_eps_added", "The VAE's norm adds 1e-6 to the length.", _added_eps, "channel_norm"),
    _mutant("channel_root_off", "The VAE's norm multiplies by the root of c - 1.", _no_root, "channel_norm"),
)
