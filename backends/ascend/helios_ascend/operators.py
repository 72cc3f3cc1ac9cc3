"""The one place that calls torch_npu: its fused operators, with what their documentation says of layouts and dtypes.

``TABLE`` is everything that is called, with the arguments that are passed and the versions of torch_npu that have it
so. A test holds it against the schemas of each version, and against what the functions here really pass. aten's own
operators are called where they are needed, on contiguous tensors.

Sources: the operator pages of "Ascend Extension for PyTorch" (the docstrings in torch_npu's own wheel are the same
text), and the pages of the CANN operators behind them (aclnn…), which are named where they decide something.

=====================================  ====================================================================
operator                               what is relied on
=====================================  ====================================================================
``npu_fused_infer_attention_score``    bfloat16 and float16 only; contiguous; heads of 16 n channels, 512 at
                                       most; at most 256 heads; no mask means all keys; ``scale`` is 1 unless
                                       given; may be captured in a graph
``npu_fusion_attention``, ``…_v3``     float32 as well; heads of at most 768 channels; ``scale`` is 1 unless
                                       given; the first cannot be captured at all, the other in BNSD alone
``npu_rms_norm``                       statistics in float32, rounded once; gamma of the dtype of the input
``npu_rotary_mul``                     ``half`` unless ``interleave`` is asked for; tables ``[1, s, 1, d]`` for
                                       an input ``[b, s, n, d]``, each cosine twice, of the input's dtype;
                                       ``b·n`` < 1000, d even and < 896
``npu_add_layer_norm``                 16-bit inputs with float32 gamma and beta; epsilon 1e-5 unless given;
                                       the sum is the fourth output, and only if asked for
``npu_format_cast``                    29 is FRACTAL_NZ: blocks of 16 × 16, what the cube unit reads
``aten::native_layer_norm``            16-bit input with float32 weight and bias (aclnnLayerNorm)
``aten::addmm``                        a bias ``[n]`` joins the float32 sums; the second matrix may be NZ in 16
                                       bits, unless one of its sizes is 1 (aclnnAddmmWeightNz)
=====================================  ====================================================================
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "FRACTAL_NZ",
    "TABLE",
    "Operator",
    "add_layer_norm",
    "attention",
    "begin",
    "blocked",
    "float32_attention",
    "layer_norm",
    "rms_norm",
    "rotate",
    "torch_npu",
    "version",
]

FRACTAL_NZ = 29
Version = tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Operator:
    """One operator as this backend calls it.

    Args:
        since: the first version of torch_npu, (major, minor), whose schema takes these arguments.
        positional: how many tensors and values come by position.
        keywords: names that are passed.
        outputs: how many it returns.
    """

    since: Version
    positional: int
    keywords: tuple[str, ...]
    outputs: int


TABLE: Mapping[str, Operator] = {
    "npu_add_layer_norm": Operator((2, 9), 4, ("epsilon", "additional_output"), 4),
    "npu_format_cast": Operator((2, 9), 2, (), 1),
    "npu_fused_infer_attention_score": Operator((2, 9), 3, ("num_heads", "scale", "input_layout", "inner_precise"), 2),
    "npu_fusion_attention": Operator((2, 9), 5, ("scale",), 7),
    "npu_fusion_attention_v3": Operator((2, 10), 5, ("scale",), 6),
    "npu_rms_norm": Operator((2, 9), 2, ("epsilon",), 2),
    "npu_rotary_mul": Operator((2, 9), 3, ("rotary_mode",), 1),
}


def torch_npu() -> Any:
    """The module, imported when a device is first used: it gives torch the device ``npu``."""
    return importlib.import_module("torch_npu")


@functools.cache
def version() -> Version:
    """Major and minor version of the installed torch_npu."""
    major, minor = str(torch_npu().__version__).split(".")[:2]
    return int(major), int(minor)


@functools.cache
def begin() -> None:
    """Set what belongs to the process, once: arithmetic as the dtypes say, and formats of the cube unit allowed.

    CANN multiplies float32 as HF32 (19 bits) in convolutions unless told otherwise. Compiling operators when they are
    called (``jit_compile``) would take the rotation in interleave mode away.
    """
    npu = torch_npu().npu
    npu.matmul.allow_hf32 = False
    npu.conv.allow_hf32 = False
    npu.config.allow_internal_format = True
    npu.set_compile_mode(jit_compile=False)


def _call(name: str, *operands: Any, **keywords: Any) -> Any:
    return getattr(torch.ops.npu, name)(*operands, **keywords)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, layout: str) -> Tensor:
    """``softmax(q kᵀ · scale) v`` over all keys.

    Args:
        q, k, v: contiguous, of one dtype, in the layout; in 16 bits heads of a multiple of 16 channels.
        scale: of the scores; the operators' own default is 1.
        layout: ``BSND`` or ``BNSD``.

    Returns:
        as q.
    """
    heads = q.shape[layout.index("N")]
    if q.dtype == torch.float32:
        return _first(_call(float32_attention(), q, k, v, heads, layout, scale=scale))
    # inner_precise 0: sums of float16 in float32. bfloat16 has no other way.
    found = _call(
        "npu_fused_infer_attention_score",
        q,
        k,
        v,
        num_heads=heads,
        scale=scale,
        input_layout=layout,
        inner_precise=0,
    )
    return _first(found)


def float32_attention() -> str:
    """The operator for float32: the newer one is the same arithmetic and may be captured in a graph."""
    newer = "npu_fusion_attention_v3"
    return newer if version() >= TABLE[newer].since else "npu_fusion_attention"


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · gamma`` over the last dimension; gamma of the dtype of x."""
    return _first(_call("npu_rms_norm", x, gamma, epsilon=eps))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (2i, 2i+1) of ``[b, s, n, d]``; cos and sin ``[1, s, 1, d]`` of its dtype, each number twice."""
    turned: Tensor = _call("npu_rotary_mul", x, cos, sin, rotary_mode="interleave")
    return turned


def layer_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """aten's, over the last dimension, in the dtype of x; gamma and beta of one dtype, that of x or float32."""
    return F.layer_norm(x, x.shape[-1:], gamma, beta, eps)


def add_layer_norm(x: Tensor, y: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + y``, and its layer norm over the last dimension; x and y of one dtype, gamma and beta float32."""
    normed, _, _, total = _call("npu_add_layer_norm", x, y, gamma, beta, epsilon=eps, additional_output=True)
    return total, normed


def blocked(matrix: Tensor) -> Tensor:
    """A matrix in the cube unit's own format, where it takes it: 16 bits and no size of 1."""
    if matrix.dtype == torch.float32 or 1 in matrix.shape:
        return matrix
    laid: Tensor = _call("npu_format_cast", matrix, FRACTAL_NZ)
    return laid


def _first(outputs: Any) -> Tensor:
    first: Tensor = outputs[0]
    return first
