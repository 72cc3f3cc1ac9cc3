"""Attention that is always there: softmax(q kᵀ · scale) v, a block of queries at a time, scores never in memory.

A program holds a block of queries and passes over all keys once. The running maximum, the sum and the result stay in
registers, in float32; powers are of two, since that is what the hardware has; scores are scaled in float32 inside the
exponent, so q itself is never rounded again. Probabilities are rounded to the dtype of v for the second product, and
the sum that divides is of those not rounded. Float32 operands are multiplied as such, never as TF32.

Work is 4·s·t·h·d FLOPs; bytes are q, k, v and the result once, since the blocks of one head run side by side and its
keys stay in the second-level cache. For one layer in bfloat16, 40 heads of 128, predicted at 600–650 TFLOP/s and, for
the bytes, 4.3 TB/s (an H200; predictions, not measurements):

===========================  ======  ======  ======  ======  =========  ===========
form                              s       t  TFLOP       MB  ms (work)  ms (bytes)
===========================  ======  ======  ======  ======  =========  ===========
stage 0, with history          2940    2940   0.177     120  0.27–0.30         0.03
stage 1                        4560    4560   0.426     187  0.66–0.71         0.04
stage 2                       11040   11040   2.496     452  3.84–4.16         0.11
stage 2, last block            8640   11040   1.953     403  3.01–3.26         0.09
stage 2, text                  8640     512   0.091     187  0.14–0.15         0.04
===========================  ======  ======  ======  ======  =========  ===========

Beside the products, 3.84 at least at stage 2, exponentials take 1.32 ms (16 a cycle of each of 132 multiprocessors at
1.755 GHz) and all instructions 1.36 (528 of each of 8 warps for 128 × 128 scores, 4 a cycle; counted in the binary of
the first tile for sm_90): a third of the products' time, if they are not hidden behind them.

So arithmetic decides everywhere, and libraries that overlap softmax with products are ahead of this kernel: it is what
runs where none of them does (odd head sizes, float32, a torch without them). ``helios_cuda.attention`` chooses.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from helios.backend import Kernel
from helios_cuda.kernels.numerics import dot, rounded
from helios_cuda.launch import Tile, Tiled, name_of, rows_apart

__all__ = ["FLOAT32", "KERNELS", "NARROW", "WIDE", "flash"]


@triton.jit
def _tile(base, apart, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr):
    """``[ROWS, WIDTH]``, each row ``apart`` elements after the last; zeros from ``rows`` and from ``width`` on."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    places = base + row.to(tl.int64) * apart + column
    if RAGGED:
        return tl.load(places, (row < rows) & (column < width), 0.0)
    else:  # a branch to the compiler, which has no value after a conditional return
        return tl.load(places)


@triton.jit
def _scores(
    query, q, q_row, queries, k, k_row, keys, width, KEYS: tl.constexpr, PART: tl.constexpr, RAGGED: tl.constexpr
):
    """Products ``[QUERIES, KEYS]`` of a block of queries with the keys at k, ``PART`` columns at a time."""
    QUERIES: tl.constexpr = query.shape[0]
    WIDTH: tl.constexpr = query.shape[1]
    scores = tl.zeros([QUERIES, KEYS], tl.float32)
    if PART == WIDTH:
        scores = dot(query, tl.trans(_tile(k, k_row, keys, width, KEYS, WIDTH, RAGGED)), scores)
    else:  # the block is read again and again from the cache; all of it would not fit into registers
        for at in tl.static_range(0, WIDTH, PART):
            part = _tile(q + at, q_row, queries, width - at, QUERIES, PART, True)
            scores = dot(part, tl.trans(_tile(k + at, k_row, keys, width - at, KEYS, PART, RAGGED)), scores)
    return scores


@triton.jit
def _weigh(scores, acc, top, total, keys, factor, LAST: tl.constexpr):
    """Softmax goes on: the weights of a block of scores, and the result, the highest score and the sum before it,
    brought to the new highest. Scores count times ``factor``, of which 2 is the base."""
    exists = tl.arange(0, scores.shape[1])[None, :] < keys
    if LAST:
        scores = tl.where(exists, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * factor)
    level = tl.where(higher == float("-inf"), 0.0, higher)  # else −∞ − −∞, where all scores so far are −∞
    weights = tl.exp2(scores * factor - level[:, None])
    if LAST:
        weights = tl.where(exists, weights, 0.0)  # a factor of 0 makes NaN of −∞
    fade = tl.exp2(top - level)
    return weights, acc * fade[:, None], higher, total * fade + tl.sum(weights, 1)


@triton.jit
def _attention(
    q,
    k,
    v,
    out,
    queries,
    keys,
    heads,
    width,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    factor,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A block of queries of one head over all keys. Programs of one head are neighbours: they share its keys."""
    blocks = tl.cdiv(queries, QUERIES)
    first = (tl.program_id(0) % blocks).to(tl.int64) * QUERIES
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    q += batch * q_batch + first * q_row + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    left = queries - first
    query = _tile(q, q_row, left, width, QUERIES, WIDTH, True)
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    apart = tl.full([], KEYS, tl.int64)  # a block of keys may reach over 2³¹ elements
    whole = keys // KEYS * KEYS
    for _ in tl.range(0, whole, KEYS):
        scores = _scores(query, q, q_row, left, k, k_row, KEYS, width, KEYS, PART, PADDED)
        weights, acc, top, total = _weigh(scores, acc, top, total, KEYS, factor, False)
        values = _tile(v, v_row, KEYS, width, KEYS, WIDTH, PADDED)
        acc = dot(rounded(weights, values.dtype), values, acc)
        k += apart * k_row
        v += apart * v_row
    if whole < keys:
        rest = keys - whole
        scores = _scores(query, q, q_row, left, k, k_row, rest, width, KEYS, PART, True)
        weights, acc, top, total = _weigh(scores, acc, top, total, rest, factor, True)
        values = _tile(v, v_row, rest, width, KEYS, WIDTH, True)
        acc = dot(rounded(weights, values.dtype), values, acc)
    row = first + tl.arange(0, QUERIES)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    place = ((batch * queries + row) * heads + head) * width + column
    result = rounded(acc * (1.0 / total)[:, None], out.dtype.element_ty)
    tl.store(out + place, result, (row < queries) & (column < width))


_INTERPRETED = Tile({"QUERIES": 256, "KEYS": 128})

NARROW = Tiled(
    _attention,
    "attention",
    (
        Tile({"QUERIES": 128, "KEYS": 128}, warps=8, stages=3, shared=225),
        Tile({"QUERIES": 128, "KEYS": 64}, warps=8, stages=2),
        Tile({"QUERIES": 128, "KEYS": 64}, warps=8, stages=3, shared=129),
        Tile({"QUERIES": 128, "KEYS": 32}, warps=8, stages=3),
        Tile({"QUERIES": 128, "KEYS": 32}, warps=8, stages=2),
        Tile({"QUERIES": 128, "KEYS": 128}, warps=8, stages=2, shared=161),
        Tile({"QUERIES": 64, "KEYS": 64}, warps=4, stages=3, shared=113),
    ),
    _INTERPRETED,
)
"""For head sizes up to 128. The first tile fits capability 9.0 and 10.0, whose products are of whole warpgroups; the
second is what runs unasked elsewhere."""
WIDE = Tiled(
    _attention,
    "attention_wide",
    (
        Tile({"QUERIES": 32, "KEYS": 32}, warps=8, stages=1),
        Tile({"QUERIES": 32, "KEYS": 16}, warps=8, stages=2),
    ),
    _INTERPRETED,
)
"""For head sizes above 128, on every architecture; sized for the 384 of the VAE, which 64 queries would spill at."""
FLOAT32 = Tiled(
    _attention,
    "attention_fp32",
    (Tile({"QUERIES": 32, "KEYS": 16}, warps=8, stages=1), Tile({"QUERIES": 64, "KEYS": 16}, warps=8, stages=1)),
    _INTERPRETED,
)
"""For float32, whose products hold their operands in registers."""


def flash(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """``softmax(q kᵀ · scale) v`` by this module's kernel; see the op ``attention``.

    Args:
        q: ``[b, s, h, d]``.
        k, v: ``[b, t, h, d]``, of the dtype of q, ``t`` at least 1.
        scale: of the scores; ``None`` for ``d^-½``.

    Returns:
        ``[b, s, h, d]``, contiguous, in the dtype of q.
    """
    b, s, h, d = q.shape
    factor = (d**-0.5 if scale is None else scale) / math.log(2.0)
    if factor < 0:  # the kernel takes the highest product for the highest score
        q, factor = -q, -factor
    q, k, v = rows_apart(q), rows_apart(k), rows_apart(v)
    out = q.new_empty(b, s, h, d)
    width = max(16, triton.next_power_of_2(d))
    _kernel(q.dtype, width).launch(
        lambda size: (triton.cdiv(s, size["QUERIES"]) * b * h,),
        *(q, k, v, out, s, k.shape[1], h, d, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], factor),
        key=f"{name_of(q.dtype)} d={d} {'short' if k.shape[1] <= 1024 else 'long'}",
        WIDTH=width,
        PART=min(width, 64) if q.dtype == torch.float32 else min(width, 128),
        PADDED=width != d,
    )
    return out


def _kernel(dtype: torch.dtype, width: int) -> Tiled:
    if dtype == torch.float32:
        return FLOAT32
    return NARROW if width <= 128 else WIDE


KERNELS = {"attention": Kernel(flash)}
