"""What a node asks that the hardware or an operator cannot do: the reason, or None.

A fused op that is refused reaches the lowering's expansion, so its parts are asked for one by one. What CANN lacks but
movement can express exactly (a replicated border in bfloat16, heads of other widths) is no refusal: the kernels do it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from helios.graph import Node, TensorType

__all__ = ["refusal"]

MULTIPLIED = (torch.bfloat16, torch.float16, torch.float32)
HEADS = 256
"""npu_fused_infer_attention_score takes no more."""
CHANNELS = 512
"""Of a head, for the same in 16 bits."""
WIDE_CHANNELS = 768
"""Of a head, for npu_fusion_attention in float32."""
TURNED = 1000
"""npu_rotary_mul in interleave mode takes fewer batch × heads."""
TURNED_CHANNELS = 896
"""And narrower heads."""


def refusal(node: Node) -> str | None:
    """Why an Ascend NPU does not run the node as this backend computes it."""
    types = [value.type for value in (*node.values, *node.outputs)]
    narrow = next((t.dtype for t in types if t.dtype.is_floating_point and t.dtype.itemsize == 1), None)
    if narrow is not None:
        return f"the cube unit of a 910B or 910C multiplies no {_name(narrow)} numbers"
    if any(t.dtype == torch.float64 for t in types):
        return "the NPU computes nothing in float64; the sampler's numbers are float32 in every precision it offers"
    asked = _ASKED.get(node.op)
    return None if asked is None else asked(node)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _types(node: Node) -> list[TensorType]:
    return [value.type for value in node.values]


def _attention(node: Node) -> str | None:
    q, *others = _types(node)
    if any(t.dtype != q.dtype for t in others) or q.dtype not in MULTIPLIED:
        found = ", ".join(_name(t.dtype) for t in (q, *others))
        return f"queries, keys and values have to be of one dtype, bfloat16, float16 or float32; these are {found}"
    _, _, heads, channels = q.shape
    most = WIDE_CHANNELS if q.dtype == torch.float32 else CHANNELS
    if heads > HEADS:
        return f"the attention operator takes at most {HEADS} heads, these are {heads}"
    if channels > most:
        return f"the attention operator takes heads of at most {most} channels in {_name(q.dtype)}, this has {channels}"
    return None


def _product(node: Node) -> str | None:
    x, *others = _types(node)
    if any(t.dtype != x.dtype for t in others):
        found = ", ".join(sorted({_name(t.dtype) for t in (x, *others)}))
        return f"a product takes operands of one dtype, these are {found}"
    return None


def _turned(batch: int, heads: int, channels: int) -> str | None:
    if batch * heads >= TURNED:
        return f"npu_rotary_mul takes fewer than {TURNED} batch × heads, these are {batch * heads}"
    if channels >= TURNED_CHANNELS:
        return f"npu_rotary_mul takes heads of fewer than {TURNED_CHANNELS} channels, this has {channels}"
    return None


def _rope(node: Node) -> str | None:
    batch, _, heads, channels = _types(node)[0].shape
    return _turned(batch, heads, channels)


def _queries(node: Node) -> str | None:
    batch, _, width = _types(node)[0].shape
    heads = int(dict(node.attrs)["heads"])  # type: ignore[arg-type]
    return _turned(batch, heads, width // heads)


_ASKED: Mapping[str, Callable[[Node], str | None]] = {
    "attention": _attention,
    "conv3d": _product,
    "linear": _product,
    "patch_embed": _product,
    "qk_norm_rope": _queries,
    "rope": _rope,
}
