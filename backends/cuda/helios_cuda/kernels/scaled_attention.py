"""Attention of e4m3 numbers: both products on tensor cores that take bytes, scores never in memory.

As ``kernels.attention``, with rows' scales: those of q and of the scores are in the factor of a row of scores, those of
k multiply its columns. The exponent is raised so that a probability of 1 comes out as 448 over the largest scale of the
head's values; times the scale of its value it is at most 448, and is rounded to e4m3. The sum that divides is of
probabilities that were neither rounded nor scaled, but raised as well, so that both cancel in the quotient: what comes
out has its units, and no product is left for the end. ``kernels.attention_rows`` quantises and lays the operands.

Hopper's tensor cores keep about 14 bits of a sum of bytes, too few for 11,040 keys. So each block of keys has a sum of
its own, and the results of blocks are added in float32; that is one instruction, which brings what there is to the new
highest score anyway. Probabilities stay in registers between the products, without a shuffle: values have their tokens
in the order in which the first product leaves its columns.

Work and bytes of one layer, 40 heads of 128, from bfloat16 to bfloat16, and milliseconds of an H100 at 1.755 GHz: from
where all parts overlap to where none does. Predictions, not measurements: products at 1,979 TFLOP/s; exponentials at 16
a cycle of each of 132 multiprocessors; instructions at 4 a cycle, 688 of each of 8 warps for 128 × 128 scores (counted
in the loop of the first tile's binary for sm_90); quantising at 4.3 TB/s before all that:

===================  ======  ======  ======  ========  =====  ============  ====  =========
form                      s       t   TFLOP  products    exp  instructions    MB  ms
===================  ======  ======  ======  ========  =====  ============  ====  =========
stage 0, history       2940    2940   0.177      0.09   0.09          0.13   211  0.16–0.25
stage 1                4560    4560   0.426      0.22   0.22          0.30   327  0.35–0.57
stage 2               11040   11040   2.496      1.26   1.32          1.77   791  1.89–3.15
stage 2, last block    8640   11040   1.953      0.99   1.03          1.38   718  1.49–2.48
===================  ======  ======  ======  ========  =====  ============  ====  =========

0.12 ms of stage 2 are quantising: 340 MB of q, k and v read, 170 written. The bf16 kernel has 528 instructions in that
loop, 1.36 ms (its exponentials 1.32, too), and products of 2.52, so 2.5–3.9 ms: what stands between the products bounds
the gain to a quarter or a third, not to a half. A polynomial for some of the exponentials would not help: issuing
instructions is the slowest part, and it has seven for one. On sm_100, where products take half as long, it might.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from helios.backend import Kernel
from helios_cuda.interpreter import interpreting
from helios_cuda.kernels.attention_rows import Laid, laid
from helios_cuda.kernels.numerics import INTERPRETED, LARGEST, dot, e4m3, rounded, widened
from helios_cuda.kernels.rows import as_bytes
from helios_cuda.launch import Tile, Tiled

__all__ = ["KERNELS", "NARROW", "WIDE", "attend", "operands", "quantized", "scaled"]


@triton.jit
def _numbers(places):
    """A tile of e4m3 numbers; the interpreter has bytes, and products of float32."""
    if INTERPRETED:
        return widened(tl.load(places), False)
    else:  # a branch to the compiler, which has no value after a conditional return
        return tl.load(places)


@triton.jit
def _narrowed(weights):
    """Weights in e4m3, their tokens in the order that values have: see ``attention_rows``."""
    QUERIES: tl.constexpr = weights.shape[0]
    KEYS: tl.constexpr = weights.shape[1]
    weights = widened(e4m3(weights, False), False) if INTERPRETED else weights.to(tl.float8e4nv)
    pairs = tl.permute(tl.reshape(weights, [QUERIES, KEYS // 16, 2, 4, 2]), [0, 1, 3, 2, 4])
    return tl.reshape(pairs, [QUERIES, KEYS])


@triton.jit
def _go_on(query, size, rise, k, k_scale, v, v_scale, acc, top, total, keys, LAST: tl.constexpr):
    """Softmax over one more block of keys: the result, the highest score and the sum, all as of the new highest.

    Sums and results are of probabilities times 2^rise, which brings the largest with the largest value to 448.
    """
    QUERIES: tl.constexpr = query.shape[0]
    scores = dot(query, tl.trans(_numbers(k)), tl.zeros([QUERIES, k.shape[0]], tl.float32))
    scores *= tl.load(k_scale)[None, :]
    exists = tl.arange(0, k.shape[0])[None, :] < keys
    if LAST:
        scores = tl.where(exists, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * size)
    level = tl.where(higher == float("-inf"), 0.0, higher)  # else −∞ − −∞, where all scores so far are −∞
    weights = tl.exp2(scores * size[:, None] - (level - rise)[:, None])
    if LAST:
        weights = tl.where(exists, weights, 0.0)  # a size of 0 makes NaN of −∞
    fade = tl.exp2(top - level)
    total = total * fade + tl.sum(weights, 1)
    narrow = _narrowed(weights * tl.load(v_scale)[None, :])
    # A sum of its own for each block: Hopper's tensor cores keep 14 bits of a sum of bytes.
    part = dot(narrow, tl.trans(_numbers(v)), tl.zeros([QUERIES, v.shape[0]], tl.float32))
    return acc * fade[:, None] + part, higher, total


@triton.jit
def _scaled_attention(
    q,
    q_scale,
    k,
    k_scale,
    v,
    v_scale,
    most,
    out,
    queries,
    keys,
    heads,
    width,
    query_room,
    key_room,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A block of queries of one head over all keys. Programs of one head are neighbours: they share its keys."""
    blocks = query_room // QUERIES
    row = (tl.program_id(0) % blocks).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    head = (tl.program_id(0) // blocks).to(tl.int64)  # of all sequences
    channel, key = tl.arange(0, WIDTH), tl.arange(0, KEYS)
    place = head * query_room + row
    query = _numbers(q + place[:, None] * WIDTH + channel[None, :])
    size = tl.load(q_scale + place)
    rise = -tl.log2(tl.load(most + head) * (1.0 / LARGEST))
    k += head * key_room * WIDTH + (key[:, None] * WIDTH + channel[None, :])
    v += (head * WIDTH + channel)[:, None] * key_room + key[None, :]
    k_scale += head * key_room + key
    v_scale += head * key_room + key
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    whole = keys // KEYS * KEYS
    for _ in tl.range(0, whole, KEYS):
        acc, top, total = _go_on(query, size, rise, k, k_scale, v, v_scale, acc, top, total, KEYS, False)
        k += KEYS * WIDTH
        k_scale += KEYS
        v += KEYS
        v_scale += KEYS
    if whole < keys:
        rest = keys - whole
        acc, top, total = _go_on(query, size, rise, k, k_scale, v, v_scale, acc, top, total, rest, True)
    result = rounded(acc * (1.0 / total)[:, None], out.dtype.element_ty)
    place = (head // heads * queries + row) * heads + head % heads
    there = (row < queries)[:, None] & (channel < width)[None, :]
    tl.store(out + place[:, None] * width + channel[None, :], result, there)


_INTERPRETED = Tile({"QUERIES": 128, "KEYS": 128})

NARROW = Tiled(
    _scaled_attention,
    "scaled_attention",
    (
        Tile({"QUERIES": 128, "KEYS": 128}, warps=8, stages=3, shared=131),
        Tile({"QUERIES": 128, "KEYS": 64}, warps=8, stages=3),
        Tile({"QUERIES": 128, "KEYS": 64}, warps=8, stages=4),
        Tile({"QUERIES": 128, "KEYS": 64}, warps=8, stages=2),
        Tile({"QUERIES": 128, "KEYS": 128}, warps=8, stages=2),
        Tile({"QUERIES": 64, "KEYS": 128}, warps=4, stages=3, shared=115),
        Tile({"QUERIES": 64, "KEYS": 64}, warps=4, stages=3),
        Tile({"QUERIES": 128, "KEYS": 32}, warps=8, stages=4),
    ),
    _INTERPRETED,
)
"""For head sizes up to 128. Where shared memory is small, tensor cores work from registers, and the second tile is what
those have room for."""
WIDE = Tiled(
    _scaled_attention,
    "scaled_attention_wide",
    (
        Tile({"QUERIES": 32, "KEYS": 32}, warps=8, stages=2),
        Tile({"QUERIES": 64, "KEYS": 64}, warps=8, stages=1),
    ),
    _INTERPRETED,
)
"""For head sizes above 128, sized for 256: a few that no published model quantises."""


def attend(q: Laid, k: Laid, v: Laid, dtype: torch.dtype) -> Tensor:
    """Attention of operands that are laid for it: ``[b, s, h, d]`` in ``dtype``, contiguous."""
    b, heads, room, width = q.numbers.shape
    out = q.numbers.new_empty((b, q.tokens, heads, q.width), dtype=dtype)
    numbers = [as_bytes(x.numbers) if interpreting() else x.numbers for x in (q, k, v)]
    kernel = NARROW if width <= 128 else WIDE
    kernel.launch(
        lambda size: (room // size["QUERIES"] * b * heads,),
        *(numbers[0], q.scales, numbers[1], k.scales, numbers[2], v.scales, v.scales.amax(-1), out),
        *(q.tokens, k.tokens, heads, q.width, room, k.numbers.shape[2]),
        key=f"e4m3 d={q.width} {'short' if k.tokens <= 1024 else 'long'}",
        WIDTH=width,
    )
    return out


def operands(q: Tensor, k: Tensor, v: Tensor, scale: float | None, *scales: Tensor) -> tuple[Laid, Laid, Laid]:
    """Queries, keys and values as ``attend`` wants them; quantised, where their three ``scales`` are not given."""
    of_q, of_k, of_v = scales or (None, None, None)
    factor = (q.shape[-1] ** -0.5 if scale is None else scale) / math.log(2.0)
    # The kernel takes the highest product for the highest score, so the sign goes to the keys.
    queries, keys = laid(q, of_q, gain=abs(factor)), laid(k, of_k, gain=math.copysign(1.0, factor))
    return queries, keys, laid(v, of_v, turned=True)


def scaled(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The op ``scaled_attention``. Operands may have any strides; the result is contiguous.

    Args:
        q, k, v: float8_e4m3fn ``[b, s, h, d]`` and ``[b, t, h, d]``, ``t`` at least 1.
        q_scale, k_scale, v_scale: float32 ``[b, s, h, 1]`` and ``[b, t, h, 1]``.
        scale: of the scores; ``None`` for ``d^-½``.
        dtype: of the result; ``None`` for float32.
    """
    return attend(*operands(q, k, v, scale, q_scale, k_scale, v_scale), dtype or q_scale.dtype)


def quantized(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """The op ``quantized_attention``: as ``scaled`` of operands in bfloat16, float16 or float32, and in their dtype."""
    return attend(*operands(q, k, v, scale), q.dtype)


KERNELS = {"quantized_attention": Kernel(quantized), "scaled_attention": Kernel(scaled)}
