"""What an engine takes: types of tensors, what TensorRT calls them, and what has to be constant."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from helios.graph import Node, Rate, dtype_name, operand_values

__all__ = ["CONVOLUTIONS", "KINDS", "unsupported"]

KINDS: Mapping[torch.dtype, str] = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.bool: "BOOL",
}
"""Members of TensorRT's ``DataType``. Its int8 and fp8 stand for quantised numbers alone, and it has no float64."""


CONVOLUTIONS = ("conv3d", "patch_embed")
"""Ops that are written as Conv; their kernel and bias have to be constant."""


def unsupported(node: Node) -> str | None:
    """Why an engine has no place for the node's tensors; ``None`` where it has."""
    if node.op in CONVOLUTIONS and any(v.rate > Rate.WEIGHTS for v in operand_values(node.inputs[1:])):
        return "a convolution of TensorRT wants its kernel and bias to be constant: weights, and not inputs"
    for value in (*node.values, *node.outputs):
        if value.dtype not in KINDS:
            return f"TensorRT has no tensors of {dtype_name(value.dtype)} between the layers of a strongly typed engine"
    return None
