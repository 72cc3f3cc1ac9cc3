"""Rounding and products, the one way that all kernels do them.

On a GPU both functions are what Triton has. Its interpreter truncates where it should round to bfloat16, and multiplies
bfloat16 tiles wrongly; there they are made to give what a GPU gives.
"""

from __future__ import annotations

import triton
import triton.language as tl

from helios_cuda.interpreter import interpreting

__all__ = ["INTERPRETED", "dot", "inverse_root", "rounded"]

INTERPRETED: tl.constexpr = tl.constexpr(interpreting())


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
