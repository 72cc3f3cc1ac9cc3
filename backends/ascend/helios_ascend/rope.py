"""Rotations by npu_rotary_mul, in interleave mode and in float32.

**Why float32.** The operator takes tables of the dtype of what it turns. A cosine in bfloat16 errs by 2⁻⁹, which the
suite's sample ``ones`` makes plain; so x is widened, turned by the float32 table, and rounded once. Between the norm
and the rotation nothing is rounded either, which is closer than the composition.

**Tables** ``[s, d/2, 2]`` become two of ``[1, s, 1, d]``, each number twice. In the networks they are values of the
weights: they are laid out once at load, and once for all layers that read the same one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from helios.backend import Kernel
from helios_ascend import operators

__all__ = ["KERNELS", "sharing"]

F32 = torch.float32


class Turns(NamedTuple):
    """cos and sin ``[1, s, 1, d]`` float32, of each pair twice."""

    cos: Tensor
    sin: Tensor

    def last(self, count: int) -> Turns:
        """Of the last tokens."""
        start = self.cos.shape[1] - count
        return Turns(self.cos[:, start:], self.sin[:, start:])


class Queries(NamedTuple):
    """What ``qk_norm_rope`` keeps of its weights."""

    q_gamma: Tensor
    k_gamma: Tensor
    turns: Turns


_shared: dict[Tensor, Turns] | None = None
"""While weights are loaded: turns by the table that they were made of."""


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Within, a table is laid out once for all that prepare it. Not for tables that somebody writes to meanwhile."""
    global _shared  # noqa: PLW0603  (one load at a time)
    _shared = {}
    try:
        yield
    finally:
        _shared = None


def _turns(table: Tensor) -> Turns:
    s, pairs, _ = table.shape
    halves = table.to(F32).permute(2, 0, 1).contiguous()
    both = torch.stack((halves, halves), dim=-1).view(2, 1, s, 1, 2 * pairs)
    return Turns(both[0], both[1])


def _turns_of_weight(table: Tensor) -> Turns:
    if _shared is None:
        return _turns(table)
    if table not in _shared:  # by identity: tensors hash so, and a dictionary asks for no more where that agrees
        _shared[table] = _turns(table)
    return _shared[table]


def _rotate(wide: Tensor, turns: Turns, dtype: torch.dtype) -> Tensor:
    return operators.rotate(wide, *turns).to(dtype)


def _prepare_rope(_x: None, table: Tensor) -> Turns:
    return _turns_of_weight(table)


def _rope(turns: Turns, x: Tensor) -> Tensor:
    return _rotate(x.contiguous().to(F32), turns, x.dtype)


def _prepare_queries(
    _q: None, _k: None, q_weight: Tensor, k_weight: Tensor, table: Tensor, **_attrs: object
) -> Queries:
    return Queries(q_weight.to(F32).contiguous(), k_weight.to(F32).contiguous(), _turns_of_weight(table))


def _qk_norm_rope(held: Queries, q: Tensor, k: Tensor, *, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    late = held.turns.last(q.shape[1])
    return _norm_rope(q, held.q_gamma, late, heads, eps), _norm_rope(k, held.k_gamma, held.turns, heads, eps)


def _norm_rope(x: Tensor, gamma: Tensor, turns: Turns, heads: int, eps: float) -> Tensor:
    normed = operators.rms_norm(x.contiguous().to(F32), gamma, eps)
    return _rotate(normed.view(*x.shape[:2], heads, -1), turns, x.dtype)


KERNELS = {
    "qk_norm_rope": Kernel(_qk_norm_rope, _prepare_queries, ("q_weight", "k_weight", "table")),
    "rope": Kernel(_rope, _prepare_rope, ("table",)),
}
