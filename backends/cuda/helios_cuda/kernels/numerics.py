"""Rounding and products, the one way that all kernels do them.

On a GPU both functions are what Triton has. Its interpreter truncates where it should round to bfloat16, and multiplies
bfloat16 tiles wrongly; there they are made to give what a GPU gives.

e4m3 numbers are bytes in memory: a GPU before sm_89 has no type for them, and the interpreter truncates small ones and
makes NaN of large ones. Where ``CONVERTS`` is not set, integer arithmetic converts them, to the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from helios_cuda.interpreter import interpreting

__all__ = ["INTERPRETED", "LARGEST", "dot", "e4m3", "inverse_root", "rounded", "widened"]

INTERPRETED: tl.constexpr = tl.constexpr(interpreting())
LARGEST: tl.constexpr = tl.constexpr(448.0)
"""The largest finite e4m3 number."""


@triton.jit
def rounded(x, kind: tl.constexpr):
    """float32 ``x`` in the dtype ``kind``, to nearest, ties to even; NaN stays NaN."""
    if INTERPRETED and kind == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, up, bits | 0x400000).to(tl.float32, bitcast=True)
    return x.to(kind)


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b``, accumulated in float32; float32 operands are multiplied as such, never as TF32.

    Args:
        a, b: tiles ``[m, k]`` and ``[k, n]`` of one dtype.
        acc: float32 ``[m, n]``.
    """
    if INTERPRETED:
        # Products of 16-bit numbers are exact in float32, so this differs in the order of the sum alone.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def inverse_root(x):
    """``1 / sqrt(x)`` of float32, its root and its quotient rounded to nearest: one number decides a whole row."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def e4m3(x, CONVERTS: tl.constexpr):
    """float32 ``x`` as bytes of e4m3: to nearest, ties to even, no further than ±448; NaN stays NaN.

    Args:
        x: of any size and sign.
        CONVERTS: by an instruction of the device; see ``rows.converts``.
    """
    if CONVERTS:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Three bits of the fraction are kept of 23, and the exponent's bias is 7 instead of 127.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2⁻⁶ the steps are 2⁻⁹, as those of float32 are from 2¹⁴ on: the sum rounds.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, tl.where(size < 0x43E00000, normal, 0x7E))
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | (bits >> 24 & 0x80)).to(tl.uint8)


@triton.jit
def widened(x, CONVERTS: tl.constexpr):
    """Bytes of e4m3 as float32, exactly; NaN stays NaN."""
    if CONVERTS:
        return x.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    bits = x.to(tl.uint32)
    size = bits & 0x7F
    # Exponent and fraction where float32 has its own; small numbers become small ones, and 2¹²⁰ mends the bias.
    wide = (size << 20 | (bits & 0x80) << 24).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(size == 0x7F, float("nan"), wide)
