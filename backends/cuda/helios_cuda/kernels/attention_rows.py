"""Operands of quantised attention, laid as its products want them: heads outside, and values with tokens inside.

Tensor cores multiply bytes only where both operands have the summed dimension inside: for scores that is the channel,
for the second product the token. So queries and keys become ``[b, h, tokens, channels]`` and values ``[b, h, channels,
tokens]``, with zeros up to whole blocks of 128 tokens and a power of two of channels: what multiplies them needs no
masks, and every row starts at 16 bytes. Each token of a head has one float32 scale, ``[b, h, tokens]``.

A program takes a block of tokens of one head: it reads rows of 256 bytes, finds the largest element of each, converts,
and writes rows of 128 bytes; values are turned in shared memory. Operands may be parts of a fused buffer.

**The order of values.** The product that makes scores leaves columns 2t and 2t + 1 of each 8 with thread t of four, and
the next one wants four successive bytes of each 16 there. A sum over tokens does not ask for their order, so values
change places, in each 16 tokens: at ``4 t + 2 j + e`` is token ``8 j + 2 t + e``. Probabilities go on from where they
are, in registers and without a shuffle.

Bytes at 384×640, 40 heads of 128 in bfloat16, three launches; predicted at 4.3 TB/s (an H200; no measurement):

=================  ======  ========  ========  =====
form               tokens  MB read   MB wrote     µs
=================  ======  ========  ========  =====
stage 0              2940        90        46     32
stage 1              4560       140        71     49
stage 2             11040       339       173    119
=================  ======  ========  ========  =====

Three launches, not one: rows and turned rows differ in code, not in a number, and a launch inside a CUDA graph costs a
microsecond or two of the 119.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from helios_cuda.kernels.rows import as_bytes, converts, quantised
from helios_cuda.launch import Tile, name_of, rows_apart, tiled

__all__ = ["BLOCK", "Laid", "laid", "padded"]

BLOCK = 128
"""Tokens are padded to whole blocks: no tile of attention is larger."""
NARROWEST = 32
"""Channels are padded to so many at least: what one instruction sums over."""


class Laid(NamedTuple):
    """One operand.

    Attributes:
        numbers: float8_e4m3fn ``[b, h, tokens, channels]``, or ``[b, h, channels, tokens]`` of values; padded with 0.
        scales: float32 ``[b, h, tokens]``; 0 where there is no token.
        tokens, width: of what was laid, without padding.
    """

    numbers: Tensor
    scales: Tensor
    tokens: int
    width: int


def padded(width: int) -> int:
    """Channels of a head in memory.

    >>> padded(6), padded(96), padded(128)
    (32, 128, 128)
    """
    return max(NARROWEST, int(triton.next_power_of_2(width)))


@tiled(
    Tile({"TOKENS": 64}, warps=4),
    Tile({"TOKENS": 128}, warps=8),
    Tile({"TOKENS": 128}, warps=4),
    Tile({"TOKENS": 32}, warps=4),
    interpreted=Tile({"TOKENS": 128}),
)
@triton.jit
def _laid(
    x,
    given,
    numbers,
    scales,
    tokens,
    heads,
    room,
    width,
    x_batch,
    x_row,
    x_head,
    given_batch,
    given_row,
    given_head,
    gain,
    WIDTH: tl.constexpr,
    TURNED: tl.constexpr,
    CONVERTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A block of tokens of one head, quantised, or as it is where scales are given. Scales are written times gain."""
    blocks = room // TOKENS
    head = (tl.program_id(0) % heads).to(tl.int64)  # heads of a token are neighbours in memory
    batch = (tl.program_id(0) // heads // blocks).to(tl.int64)
    place = (tl.program_id(0) // heads % blocks) * TOKENS + tl.arange(0, TOKENS)
    token = place
    if TURNED:
        token = place // 16 * 16 + (place // 2) % 2 * 8 + place % 16 // 4 * 2 + place % 2
    there = token < tokens
    row = token.to(tl.int64)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = there[:, None] & (column < width)
    value = tl.load(x + batch * x_batch + row * x_row + head * x_head + column, inside, 0)
    if given is None:
        value, scale = quantised(value.to(tl.float32), CONVERTS)
    else:
        scale = tl.load(given + batch * given_batch + row * given_row + head * given_head, there[:, None], 0.0)
    both = batch * heads + head
    tl.store(scales + both * room + token[:, None], tl.where(there[:, None], scale * gain, 0.0))
    if TURNED:
        channel = both * WIDTH + tl.arange(0, WIDTH)[:, None]
        tl.store(numbers + channel * room + place[None, :], tl.trans(value))
    else:
        tl.store(numbers + (both * room + row) * WIDTH + column, value)


def laid(x: Tensor, scales: Tensor | None = None, *, turned: bool = False, gain: float = 1.0) -> Laid:
    """Lay one operand of attention, in one launch.

    Args:
        x: ``[b, tokens, h, d]``, of any strides: numbers to quantise by rows, or float8_e4m3fn with ``scales``.
        scales: ``[b, tokens, h, 1]``.
        turned: whether tokens go inside, in the order that the module says.
        gain: that scales are multiplied with.
    """
    b, tokens, heads, d = x.shape
    room, width = triton.cdiv(tokens, BLOCK) * BLOCK, padded(d)
    shape = (b, heads, width, room) if turned else (b, heads, room, width)
    numbers = x.new_empty(shape, dtype=torch.float8_e4m3fn)
    out = Laid(numbers, x.new_empty((b, heads, room), dtype=torch.float32), tokens, d)
    kind = name_of(x.dtype)
    x = rows_apart(x)
    _laid.launch(
        lambda size: (b * (room // size["TOKENS"]) * heads,),
        *(as_bytes(x) if x.dtype == torch.float8_e4m3fn else x, scales, as_bytes(numbers)),
        *(out.scales, tokens, heads, room, d, *x.stride()[:3]),
        *((0, 0, 0) if scales is None else scales.stride()[:3]),
        gain,
        key=f"{kind} d={d} {'turned' if turned else 'rows'}",
        WIDTH=width,
        TURNED=turned,
        CONVERTS=converts(x.device),
    )
    return out
