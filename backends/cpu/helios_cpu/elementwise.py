"""Norms, modulation, residuals and RoPE in one pass over memory: a block of rows at a time, so that what lies between
the steps stays in the cache. All arithmetic is in float32 (float64 stays float64); each result is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.backend import Kernel
from helios.op import accumulator

__all__ = ["KERNELS"]

_BLOCK = 1 << 17
"""Elements of a block: 512 KiB of float32, which with its neighbours fits a core's second-level cache."""


def _blocks(start: int, stop: int, width: int) -> Iterator[slice]:
    """Rows start to stop in blocks of about ``_BLOCK`` elements."""
    rows = max(1, _BLOCK // width)
    for at in range(start, stop, rows):
        yield slice(at, min(at + rows, stop))


def _segments(rows: Tensor, split: int, length: int) -> list[tuple[int, int, int]]:
    """(row of the modulation, first token, end) of each stretch of tokens."""
    spans = [(0, 0, length)] if rows.shape[1] == 1 else [(0, 0, split), (1, split, length)]
    return [span for span in spans if span[1] < span[2]]


def _adaln(x: Tensor, scale: Tensor, shift: Tensor, *, split: int, eps: float) -> Tensor:
    """The modulation is the affine part of a layer norm, one call a stretch of tokens."""
    acc = accumulator(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    gain, bias = (1.0 + scale.to(acc)), shift.to(acc)
    for b in range(x.shape[0]):
        for row, start, stop in _segments(scale, split, x.shape[1]):
            for at in _blocks(start, stop, x.shape[2]):
                out[b, at] = F.layer_norm(x[b, at], x.shape[-1:], gain[b, row], bias[b, row], eps)
    return out


def _gated_add(x: Tensor, y: Tensor, gate: Tensor | None = None, *, gate_split: int) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    skipped = x.shape[1] - y.shape[1]
    out[:, :skipped] = x[:, :skipped]
    for b, at, row in _residual_blocks(y, gate, gate_split):
        _residual(x[b], y[b], None if gate is None else gate[b, row], at, skipped, out[b])
    return out


def _residual_blocks(y: Tensor, gate: Tensor | None, split: int) -> Iterator[tuple[int, slice, int]]:
    spans = [(0, 0, y.shape[1])] if gate is None else _segments(gate, split, y.shape[1])
    for b in range(y.shape[0]):
        for row, start, stop in spans:
            for at in _blocks(start, stop, y.shape[2]):
                yield b, at, row


def _residual(x: Tensor, y: Tensor, gate: Tensor | None, at: slice, skipped: int, out: Tensor) -> None:
    """``out = x + gate · y`` for one block of rows ``at`` of y, which are ``skipped`` rows further down in x."""
    there = slice(at.start + skipped, at.stop + skipped)
    if gate is None:
        torch.add(x[there], y[at], out=out[there])
        return
    acc = accumulator(x.dtype)
    out[there] = torch.addcmul(x[there].to(acc), y[at].to(acc), gate.to(acc))


def _gated_add_adaln(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, *, split: int, gate_split: int, eps: float
) -> tuple[Tensor, Tensor]:
    total = _gated_add(x, y, gate, gate_split=gate_split)
    return total, _adaln(total, scale, shift, split=split, eps=eps)


def _rotate(x: Tensor, table: Tensor) -> Tensor:
    """RoPE of ``[s, h, e]`` by a complex product with ``table`` ``[s, e/2]``."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * table[:, None]).flatten(-2)


def _rope(x: Tensor, table: Tensor) -> Tensor:
    acc = accumulator(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    turns = torch.view_as_complex(table.to(acc).contiguous())
    for b in range(x.shape[0]):
        for at in _blocks(0, x.shape[1], x.shape[2] * x.shape[3]):
            out[b, at] = _rotate(x[b, at].to(acc).contiguous(), turns[at])
    return out


def _norm_rope(x: Tensor, weight: Tensor, turns: Tensor, heads: int, eps: float) -> Tensor:
    acc = accumulator(x.dtype)
    b, s, d = x.shape
    out = torch.empty((b, s, heads, d // heads), dtype=x.dtype)
    wide = weight.to(acc)
    for i in range(b):
        for at in _blocks(0, s, d):
            rows = x[i, at].to(acc).contiguous()
            # A number a row: in float64, so that the way from the norm to its inverse rounds once.
            norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).double()
            scaled = torch.mul(rows, norm.square_().div_(d).add_(eps).rsqrt_().to(acc)).mul_(wide)
            out[i, at] = _rotate(scaled.unflatten(-1, (heads, -1)), turns[at])
    return out


def _qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor, *, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    turns = torch.view_as_complex(table.to(accumulator(q.dtype)).contiguous())
    late = turns[k.shape[1] - q.shape[1] :]
    return _norm_rope(q, q_weight, late, heads, eps), _norm_rope(k, k_weight, turns, heads, eps)


KERNELS = {
    "adaln": Kernel(_adaln),
    "gated_add": Kernel(_gated_add),
    "gated_add_adaln": Kernel(_gated_add_adaln),
    "qk_norm_rope": Kernel(_qk_norm_rope),
    "rope": Kernel(_rope),
}
