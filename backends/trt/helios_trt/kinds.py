"""Types of tensors: which an engine takes, and what TensorRT calls them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from helios.graph import Node, dtype_name

__all__ = ["KINDS", "unsupported"]

KINDS: Mapping[torch.dtype, str] = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.bool: "BOOL",
}
"""Members of TensorRT's ``DataType``. Its int8 and fp8 stand for quantised numbers alone, and it has no float64."""


def unsupported(node: Node) -> str | None:
    """Why an engine has no place for the node's tensors; ``None`` where it has."""
    for value in (*node.values, *node.outputs):
        if value.dtype not in KINDS:
            return f"TensorRT has no tensors of {dtype_name(value.dtype)} between the layers of a strongly typed engine"
    return None
