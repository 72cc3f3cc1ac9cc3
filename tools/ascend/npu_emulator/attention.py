"""Attention: ``softmax(scale · q kᵀ, without what a mask hides) v``, with scores and sums in float32.

Probabilities enter the second product in the dtype of the inputs, as the cube unit takes them, before they are
divided by their sum. In each of these operators ``scale`` is 1 where it is not given, and a mask's ones hide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_emulator.rules import FLOATS, HALVES, absent, contiguous, dtypes, operator, require, same_dtype

__all__: list[str] = []

FAR = 2147483647


def _heads(x: Tensor, layout: str, heads: int, name: str) -> Tensor:
    """As ``[b, n, s, d]``."""
    if layout in ("BSH", "SBH"):
        require(x.dim() == 3 and x.shape[2] % heads == 0, name, f"{layout} wants three dimensions, the last of n·d")
        x = x.unflatten(2, (heads, -1))
        return x.permute(0, 2, 1, 3) if layout == "BSH" else x.permute(1, 2, 0, 3)
    require(x.dim() == 4, name, f"{layout} wants four dimensions, came {list(x.shape)}")
    x = x if layout.startswith("BNSD") else x.transpose(1, 2)
    require(x.shape[1] == heads, name, f"{heads} heads are declared, {layout} of {list(x.shape)} has {x.shape[1]}")
    return x


def _back(x: Tensor, layout: str) -> Tensor:
    """From ``[b, n, s, d]``, contiguous."""
    if layout == "BNSD":
        return x.contiguous()
    if layout == "SBH":
        return x.permute(2, 0, 1, 3).flatten(2)
    x = x.transpose(1, 2).contiguous()
    return x.flatten(2) if layout == "BSH" else x


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """``[b, n, s, d]`` in the dtype of q, and maximum and sum of each row in float32 ``[b, n, s, 1]``."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    scores = (q.float() @ k.float().transpose(2, 3)) * scale
    if mask is not None:
        scores = scores.masked_fill(mask.bool(), float("-inf"))
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    out = (weights.to(q.dtype).float() @ v.float()) / total
    return out.to(q.dtype), top, total


def _sizes(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    require(q.shape[0] == k.shape[0] == v.shape[0], name, "batches of query, key and value differ")
    require(k.shape[1] == v.shape[1] and k.shape[2] == v.shape[2], name, "key and value differ in heads or length")
    require(q.shape[3] == k.shape[3], name, "query and key differ in head size")
    require(q.shape[1] <= 256 and q.shape[1] % k.shape[1] == 0, name, "at most 256 heads, a multiple of the key's")


def _fusion(
    name: str, query: Tensor, key: Tensor, value: Tensor, heads: int, layout: str, scale: float, args: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes(name, FLOATS, query=query, key=key, value=value)
    same_dtype(name, query=query, key=key, value=value)
    require(layout in ("BSH", "SBH", "BSND", "BNSD"), name, f"layout {layout!r} is not emulated")
    require(args.pop("keep_prob", 1.0) == 1.0, name, "dropout is not emulated")
    require(args.pop("sparse_mode", 0) == 0, name, "sparse modes are not emulated")
    require(args.pop("inner_precise", 0) in (0, 1, 2), name, "inner_precise is 0, 1 or 2")
    mask = args.pop("atten_mask", None)
    tokens = [args.pop(k, FAR) for k in ("pre_tockens", "next_tockens", "pre_tokens", "next_tokens")]
    require(mask is None or tokens == [FAR] * 4, name, "a band of tokens beside a mask is not emulated")
    for ignored in ("gen_mask_parallel", "sync", "seed", "offset", "softmax_layout"):
        args.pop(ignored, None)
    absent(name, args.items())
    groups = heads if layout not in ("BSH", "SBH") else heads * key.shape[2] // query.shape[2]
    q = _heads(query, layout, heads, name)
    if layout in ("BSND", "BNSD"):
        groups = key.shape[1 if layout == "BNSD" else 2]
    k, v = _heads(key, layout, groups, name), _heads(value, layout, groups, name)
    _sizes(name, q, k, v)
    require(q.shape[3] <= 768 and v.shape[3] <= k.shape[3], name, "head sizes to 768, the value's at most the key's")
    if mask is not None:
        dtypes(name, (torch.bool, torch.uint8), atten_mask=mask)
        require(mask.shape[-2:] == (q.shape[2], k.shape[2]), name, f"atten_mask is {list(mask.shape)}")
    out, top, total = _attend(q, k, v, mask, scale)
    return _back(out, layout), top.expand(*top.shape[:3], 8), total.expand(*total.shape[:3], 8)


@operator("npu_fusion_attention")
def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *rest: Any, **args: Any
) -> tuple[Any, ...]:
    """Result, maxima, sums, a reserved tensor, and three integers of dropout."""
    args = _named(rest, args)
    scale = args.pop("scale", 1.0)
    found = _fusion("npu_fusion_attention", query, key, value, head_num, input_layout, scale, args)
    return (*found, query.new_empty(0), 0, 0, 0)


@operator("npu_fusion_attention_v3")
def npu_fusion_attention_v3(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *rest: Any, **args: Any
) -> tuple[Tensor, ...]:
    """As before it, with seed and offset of dropout as tensors."""
    args = _named(rest, args)
    scale = args.pop("scale", 1.0)
    found = _fusion("npu_fusion_attention_v3", query, key, value, head_num, input_layout, scale, args)
    number = torch.zeros(1, dtype=torch.int64, device=query.device)
    return (*found, query.new_empty(0), number, number.clone())


BY_POSITION = (
    "pse",
    "padding_mask",
    "atten_mask",
    "scale",
    "keep_prob",
    "pre_tockens",
    "next_tockens",
    "inner_precise",
)


def _named(rest: tuple[Any, ...], args: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(BY_POSITION, rest, strict=False)), **args}


INFER_NEUTRAL = {
    "pre_tokens": None, "next_tokens": None, "inner_precise": None, "sparse_mode": 0, "block_size": 0,
    "antiquant_mode": 0, "key_antiquant_mode": 0, "value_antiquant_mode": 0,
}  # fmt: skip
"""Numbers whose default does nothing; those with None may have any value where there is no mask."""


@operator("npu_fused_infer_attention_score")
def npu_fused_infer_attention_score(query: Tensor, key: Tensor, value: Tensor, **args: Any) -> tuple[Tensor, Tensor]:
    """Result and, if asked for, the logarithm of each row's sum of exponentials; else a zero."""
    name = "npu_fused_infer_attention_score"
    lse = args.pop("softmax_lse_flag", False)
    out, top, total = _infer(name, query, key, value, args, args.pop("scale", 1.0))
    if not lse:
        return out, torch.zeros(1, device=out.device)
    return out, top + torch.log(total)


@operator("npu_prompt_flash_attention")
def npu_prompt_flash_attention(query: Tensor, key: Tensor, value: Tensor, **args: Any) -> Tensor:
    """The result alone."""
    return _infer("npu_prompt_flash_attention", query, key, value, args, args.pop("scale_value", 1.0))[0]


def _infer(
    name: str, query: Tensor, key: Tensor, value: Tensor, args: dict[str, Any], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes(name, HALVES, query=query, key=key, value=value)
    same_dtype(name, query=query, key=key, value=value)
    mask = args.pop("atten_mask", None)
    contiguous(name, query=query, key=key, value=value, atten_mask=mask)
    layout, heads = args.pop("input_layout", "BSH"), args.pop("num_heads", 1)
    require(layout in ("BSH", "BSND", "BNSD", "BNSD_BSND"), name, f"layout {layout!r} is not emulated")
    groups = args.pop("num_key_value_heads", 0) or heads
    for key_, neutral in INFER_NEUTRAL.items():
        came = args.pop(key_, neutral)
        require(neutral is None or came == neutral, name, f"{key_}={came} is not emulated")
    absent(name, args.items())
    q = _heads(query, layout, heads, name)
    k, v = _heads(key, layout, groups, name), _heads(value, layout, groups, name)
    _sizes(name, q, k, v)
    d = q.shape[3]
    require(d <= 512 and d * q.itemsize % 32 == 0, name, f"heads of {d} channels: at most 512, in steps of 32 bytes")
    require(layout.startswith("BNSD") or heads * d < 65535, name, "heads × channels must be below 65535")
    if mask is not None:
        dtypes(name, (torch.bool, torch.int8, torch.uint8), atten_mask=mask)
        require(mask.shape[-2:] == (q.shape[2], k.shape[2]), name, f"atten_mask is {list(mask.shape)}")
    out, top, total = _attend(q, k, v, mask, scale)
    return _back(out, "BSND" if layout == "BNSD_BSND" else layout), top, total
