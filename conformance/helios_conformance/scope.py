"""What belongs to the scope of a precision: which ops are judged in it, and which cases it shares with its dtype.

A quantised precision computes most nodes in its working dtype. So its scope has the cases of single ops of that dtype,
under their own ids, beside those of the quantised ops; and of what holds no quantised product (the VAE, the solvers)
the cases of the dtype alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios.precision import PRECISIONS

__all__ = ["BESIDE", "SHARED", "dtype_scope", "ops"]

_ROWS = ("quantize_rows",)
_PRODUCTS = (
    *_ROWS,
    "adaln_quantize",
    "gated_add_adaln_quantize",
    "gelu_quantize",
    "layer_norm_quantize",
    "quantized_linear",
    "quantized_qkv_linear",
    "scaled_linear",
)
QUANTISED: Mapping[str, tuple[str, ...]] = {
    "fp8": _PRODUCTS,
    "fp8-attention": (*_PRODUCTS, "quantized_attention", "scaled_attention"),
    "fp8-weights": (*_ROWS, "dequantize_rows", "packed_linear"),
}
"""Ops that a precision has beyond those of its working dtype."""

SHARED = frozenset({"sampler", "vae", "vae_half"})
"""Checks whose cases are those of the working dtype."""

BESIDE = frozenset(
    {"op_large", "op_misfed", "op_programs", "op_refuses", "op_repeats", "op_specials", "op_step_weights", "op_values"}
    | {"plan_nodes"}
)
"""Checks of single ops: the cases of the working dtype, and those of the quantised ops."""


def ops(precision: str) -> list[str]:
    """Names of the ops whose cases carry this precision, sorted."""
    if precision in QUANTISED:
        return sorted(QUANTISED[precision])
    quantised = {name for names in QUANTISED.values() for name in names}
    return [name for name in op.names() if name not in quantised]


def dtype_scope(precision: str) -> str:
    """The precision of nothing but the working dtype."""
    if precision not in QUANTISED:
        return precision
    return next(p.name for p in PRECISIONS.values() if p.dtype == PRECISIONS[precision].dtype and not p.quantised)
