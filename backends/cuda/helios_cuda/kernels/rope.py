"""Queries and keys made ready for attention: RMS norm over all heads together, then RoPE, both in one launch.

A program has a row of keys or of queries, all heads of it, in registers. It reads the float32 table of its token once
and turns all heads by it; the inverse norm multiplies the table, which is shorter than the row. Operands may be parts
of one fused ``[b, s, 3·d]`` buffer; results are ``[b, s, h, e]``, contiguous, as flash attention reads them. Pairs are
neighbours in memory, so a thread holds whole pairs in each 16 bytes that it reads, and nothing crosses threads but the
sum of squares.

Bytes at 384×640 in bfloat16: ``qk_norm_rope`` reads and writes 20,480 a token for queries and for keys each and reads
512 of table, so 122, 189 and 458 MB at 2,940, 4,560 and 11,040 tokens of 40 heads × 128 channels; ``rope`` is half of
it. About 10 FLOP an element. torch's bodies make at least six passes, and no library call norms over heads and turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from helios.backend import Kernel
from helios_cuda.kernels.numerics import inverse_root, rounded
from helios_cuda.launch import Tile, name_of, rows_apart, tiled

__all__ = ["KERNELS"]


@triton.jit
def _rows(
    x,
    weight,
    table,
    out,
    b,
    n,
    s,
    x_batch,
    x_row,
    eps,
    heads: tl.constexpr,
    head: tl.constexpr,
    x_head: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A tile of rows of one operand ``[b, n, heads, head]``, whose tokens are the last n of s."""
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    batch, token = (row // n).to(tl.int64), (row % n).to(tl.int64)
    which, within = tl.arange(0, HEADS)[None, :, None], tl.arange(0, HEAD)[None, None, :]
    real = (which < heads) & (within < head)
    inside = real & (row < b * n)
    value = tl.load(x + batch * x_batch + token * x_row + which.to(tl.int64) * x_head + within, inside, 0.0)
    turns = tl.load(table + (s - n + token) * head + within, (within < head) & (row < b * n), 0.0)
    cos, sin = tl.split(tl.reshape(turns.to(tl.float32), (TOKENS, 1, HEAD // 2, 2)))
    wide = value.to(tl.float32)
    channel = which * head + within
    if NORM:
        gain = tl.load(weight + channel, real, 0.0)
        squares = tl.sum(tl.sum(wide * wide, 2, keep_dims=True), 1, keep_dims=True)
        inverse = inverse_root(squares / (heads * head) + eps)
        wide, cos, sin = wide * gain.to(tl.float32), cos * inverse, sin * inverse
    a, b = tl.split(tl.reshape(wide, (TOKENS, HEADS, HEAD // 2, 2)))
    turned = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (TOKENS, HEADS, HEAD))
    tl.store(out + row.to(tl.int64) * (heads * head) + channel, rounded(turned, value.dtype), inside)


@tiled(
    Tile({"TOKENS": 1}, warps=4, stages=1),
    Tile({"TOKENS": 1}, warps=8, stages=1),
    Tile({"TOKENS": 2}, warps=8, stages=1),
    Tile({"TOKENS": 2}, warps=16, stages=1),
    interpreted=Tile({"TOKENS": 128}),
)
@triton.jit
def _qk_rope(
    q,
    k,
    q_weight,
    k_weight,
    table,
    q_out,
    k_out,
    b,
    s,
    n,
    q_batch,
    q_row,
    k_batch,
    k_row,
    eps,
    heads: tl.constexpr,
    head: tl.constexpr,
    k_head: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A tile of rows of k, or in the second row of the grid of q; without q, of k alone."""
    if tl.program_id(1) == 0:
        _rows(k, k_weight, table, k_out, b, s, s, k_batch, k_row, eps, heads, head, k_head, NORM, HEADS, HEAD, TOKENS)
    elif q is not None:
        _rows(q, q_weight, table, q_out, b, n, s, q_batch, q_row, eps, heads, head, head, NORM, HEADS, HEAD, TOKENS)


def _launch(
    q: Tensor | None,
    k: Tensor,
    weights: Sequence[Tensor | None],
    table: Tensor,
    outs: Sequence[Tensor | None],
    eps: float = 0.0,
) -> None:
    """``k`` ``[b, s, h, e]``, ``q`` ``[b, n, h·e]``: last dimensions contiguous; the norm where there are weights."""
    b, s, heads, head = k.shape
    normed = weights[0] is not None
    _qk_rope.launch(
        lambda size: (triton.cdiv(b * s, size["TOKENS"]), 1 if q is None else 2),
        *(q, k, *weights, table.contiguous(), *outs),
        *(b, s, s if q is None else q.shape[1]),
        *((0, 0) if q is None else q.stride()[:2]),
        *(*k.stride()[:2], eps),
        key=f"{name_of(k.dtype)} h={heads} e={head} both={q is not None} norm={normed}",
        heads=heads,
        head=head,
        k_head=k.stride(2),
        NORM=normed,
        HEADS=triton.next_power_of_2(heads),
        HEAD=triton.next_power_of_2(head),
    )


def _rope(x: Tensor, table: Tensor) -> Tensor:
    x = rows_apart(x)
    out = x.new_empty(x.shape)
    _launch(None, x, (None, None), table, (None, out))
    return out


def _qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor, *, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    q, k = rows_apart(q), rows_apart(k)
    q_out, k_out = (x.new_empty((*x.shape[:2], heads, x.shape[2] // heads)) for x in (q, k))
    weights = (q_weight.contiguous(), k_weight.contiguous())
    _launch(q, k.unflatten(2, (heads, -1)), weights, table, (q_out, k_out), eps)
    return q_out, k_out


KERNELS = {"qk_norm_rope": Kernel(_qk_norm_rope), "rope": Kernel(_rope)}
