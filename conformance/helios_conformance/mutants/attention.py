"""Attention that is almost right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helios_conformance.mutants.mutant import FP32, Mutant, wrong_kernels

__all__ = ["MUTANTS"]

_TILE = 64


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """``[b, h, s, t]`` in float32."""
    return torch.einsum("bshd,bthd->bhst", q.float(), k.float()) * (q.shape[-1] ** -0.5 if scale is None else scale)


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhst,bthd->bshd", weights, v.float()).to(v.dtype)


def _inverse_scale(right: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    return right(q, k, v, scale=1.0 / q.shape[-1] if scale is None else scale)  # type: ignore[no-any-return]


def _scale_ignored(right: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    return right(q, k, v)  # type: ignore[no-any-return]


def _last_key_dropped(right: Any, q: Tensor, k: Tensor, v: Tensor, **attrs: Any) -> Tensor:
    t = max(1, k.shape[1] - 1)
    return right(q, k[:, :t], v[:, :t], **attrs)  # type: ignore[no-any-return]


def _padding_masked(right: Any, q: Tensor, k: Tensor, v: Tensor, **attrs: Any) -> Tensor:
    """Keys of padded text are all the same: those at the end are left out."""
    same = (k == k[:, -1:]).flatten(2).all(-1).all(0)
    run = int(same.flip(0).long().cumprod(0).sum())
    t = k.shape[1] - run if 1 < run < k.shape[1] else k.shape[1]
    return right(q, k[:, :t], v[:, :t], **attrs)  # type: ignore[no-any-return]


def _causal(right: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    scores = _scores(q, k, scale)
    if q.shape[1] == k.shape[1]:
        scores += torch.full_like(scores, -torch.inf).triu(1)
    return _weighted(scores.softmax(-1), v)


def _narrow_scores(right: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    return _weighted(_scores(q, k, scale).bfloat16().float().softmax(-1), v)


def _no_maximum(right: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    raised = _scores(q, k, scale).exp()
    return _weighted(raised / raised.sum(-1, keepdim=True), v)


def _tiles_not_rescaled(right: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    tiles = _scores(q, k, scale).split(_TILE, -1)
    raised = torch.cat([(tile - tile.amax(-1, keepdim=True)).exp() for tile in tiles], -1)
    return _weighted(raised / raised.sum(-1, keepdim=True), v)


def _narrow_sum(right: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    scores = _scores(q, k, scale)
    raised = (scores - scores.amax(-1, keepdim=True)).exp()
    total = torch.zeros_like(raised[..., :1]).bfloat16()
    for part in raised.split(8, -1):
        total = (total.float() + part.sum(-1, keepdim=True)).bfloat16()
    return _weighted(raised / total.float(), v)


def _quantised(right: Any, q: Tensor, k: Tensor, v: Tensor, **attrs: Any) -> Tensor:
    def eight_bits(x: Tensor) -> Tensor:
        step = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127.0
        return ((x.float() / step).round() * step).to(x.dtype)

    return right(eight_bits(q), eight_bits(k), v, **attrs)  # type: ignore[no-any-return]


def _bfloat16_inside(right: Any, q: Tensor, k: Tensor, v: Tensor, **attrs: Any) -> Tensor:
    narrow = (x.bfloat16().to(x.dtype) for x in (q, k, v))
    return right(*narrow, **attrs)  # type: ignore[no-any-return]


def _first_batch(right: Any, q: Tensor, k: Tensor, v: Tensor, **attrs: Any) -> Tensor:
    return right(q, k[:1].expand_as(k), v[:1].expand_as(v), **attrs)  # type: ignore[no-any-return]


def _first_head(right: Any, q: Tensor, k: Tensor, v: Tensor, **attrs: Any) -> Tensor:
    h = k.shape[2]
    pairs = torch.arange(h, device=k.device) // 2 * 2
    return right(q, k[:, :, pairs], v[:, :, pairs], **attrs)  # type: ignore[no-any-return]


def _tile_edge(right: Any, q: Tensor, k: Tensor, v: Tensor, **attrs: Any) -> Tensor:
    out: Tensor = right(q, k, v, **attrs).clone()
    out[:, _TILE::_TILE] = out[:, _TILE - 1 : -1 : _TILE]
    return out


def _mutant(name: str, wrong: str, kernel: Any, **told: Any) -> Mutant:
    return wrong_kernels(f"attention_{name}", wrong, "attention", {"attention": kernel}, **told)


MUTANTS: tuple[Mutant, ...] = (
    _mutant("scale_inverse", "Scores are scaled by 1/d, not by d^-1/2.", _inverse_scale),
    _mutant("scale_ignored", "A scale that the graph gives is ignored.", _scale_ignored),
    _mutant("last_key_dropped", "The last key is left out.", _last_key_dropped),
    _mutant(
        "padding_masked", "Padding of the text is masked, which Helios attends to.", _padding_masked, level="blocks"
    ),
    _mutant("causal", "Where there are as many keys as queries, a causal mask is applied.", _causal),
    _mutant("scores_bfloat16", "Scores are rounded to bfloat16 before the softmax.", _narrow_scores),
    _mutant("no_maximum", "The softmax does not subtract the maximum, so that large scores overflow.", _no_maximum),
    _mutant("tiles_not_rescaled", "The online softmax does not rescale tiles of 64 keys.", _tiles_not_rescaled),
    _mutant("sum_bfloat16", "The softmax' sum is accumulated in bfloat16.", _narrow_sum),
    _mutant("quantised", "Queries and keys are silently quantised to 8 bits.", _quantised),
    _mutant("low_precision", "float32 attention computes in bfloat16.", _bfloat16_inside, precisions=FP32),
    _mutant("batch_one", "Every video of a batch reads the keys and values of the first.", _first_batch),
    _mutant("grouped_heads", "Two heads share one head's keys and values.", _first_head),
    _mutant("tile_edge", "The first query of each tile of 64 gets the result of the one before.", _tile_edge),
)
