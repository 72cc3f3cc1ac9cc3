"""Attention as oneDNN products, head by head and a block of queries at a time.

torch's own attention multiplies at the speed of its generic products; oneDNN's run at twice that on float32 with a
packed operand, and at four times on bfloat16. What stands in the way in bfloat16 is that a product can only be written
in bfloat16, and scores rounded to 8 bits fail any budget. So the scores are made as a sum of two: ``hi`` is the rounded
product, ``lo`` what the rounding lost, from a second product that starts at ``−hi`` in the float32 accumulator.
``hi + lo`` is exact to 2⁻¹⁷, and two fast products still beat one slow one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.backend import Kernel

__all__ = ["KERNELS"]

_SCORES = 1 << 20
"""Scores of a block: 4 MiB of float32, about a core's share of the last cache."""
_FEWEST = 1 << 16
"""Below so many scores a head, packing costs more than it gives."""
_THREADS = 8
"""Above this torch's attention, which runs heads in parallel, is assumed to win. Measured with 2 threads only."""


def _attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    worth_it = q.shape[1] * k.shape[1] >= _FEWEST and torch.get_num_threads() <= _THREADS
    if worth_it and torch.backends.mkldnn.is_available():
        if q.dtype == torch.float32:
            return _by_head(q, k, v, factor, _float32_head)
        if q.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return _by_head(q, k, v, factor, _bfloat16_head)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=factor)
    return out.transpose(1, 2)


def _by_head(q: Tensor, k: Tensor, v: Tensor, scale: float, head: Callable[..., None]) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype)
    rows = max(32, min(512, _SCORES // k.shape[1]))
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            head(q[b, :, h].contiguous(), k[b, :, h].contiguous(), v[b, :, h].contiguous(), scale, rows, out[b, :, h])
    return out


def _float32_head(q: Tensor, k: Tensor, v: Tensor, scale: float, rows: int, out: Tensor) -> None:
    """One head, ``q`` ``[s, d]``, ``k`` and ``v`` ``[t, d]``: both products with a packed right-hand side."""
    keys = torch.ops.mkldnn._reorder_linear_weight(k, rows)
    values = torch.ops.mkldnn._reorder_linear_weight(v.t().contiguous(), rows)
    scaled = q * scale
    for at in range(0, q.shape[0], rows):
        scores = torch.ops.mkldnn._linear_pointwise(scaled[at : at + rows], keys, None, "none", [], "")
        torch.softmax(scores, -1, out=scores)
        out[at : at + rows] = torch.ops.mkldnn._linear_pointwise(scores, values, None, "none", [], "")


def _bfloat16_head(q: Tensor, k: Tensor, v: Tensor, scale: float, rows: int, out: Tensor) -> None:
    """One head: scores as ``hi + lo``, softmax in float32, probabilities rounded to bfloat16 for the second product."""
    keys = k.t()
    block = (min(rows, q.shape[0]), k.shape[0])
    rounded, rest = torch.empty(block, dtype=q.dtype), torch.empty(block, dtype=q.dtype)
    wide = torch.empty(block)
    for at in range(0, q.shape[0], rows):
        part = q[at : at + rows]
        hi, lo, scores = rounded[: len(part)], rest[: len(part)], wide[: len(part)]
        torch.addmm(hi, part, keys, beta=0, alpha=scale, out=hi)
        torch.addmm(hi, part, keys, beta=-1, alpha=scale, out=lo)
        scores.copy_(hi).add_(lo)
        torch.softmax(scores, -1, out=scores)
        hi.copy_(scores)
        torch.mm(hi, v, out=out[at : at + rows])


KERNELS = {"attention": Kernel(_attention)}
