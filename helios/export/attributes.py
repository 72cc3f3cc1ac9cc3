"""Attributes of Helios ops as those of ONNX nodes, and back without loss.

Integers, texts and lists of integers are what they are; a boolean is an integer, a dtype its name. ONNX has numbers of
32 bits alone, so a number is a tensor of float64. What is None is absent, and so is an empty list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from helios import op
from helios.errors import GraphError
from helios.graph import DTYPES, Attr, dtype_name

__all__ = ["from_onnx", "to_onnx"]

_DTYPE = "dtype:"
"""Before the name of a dtype, which would else be a text."""


def to_onnx(attrs: Iterable[tuple[str, Attr]]) -> list[ir.Attr]:
    """As attributes of an ONNX node, by name."""
    return [_one(name, value) for name, value in attrs if value is not None]


def _one(name: str, value: Attr) -> ir.Attr:
    if isinstance(value, torch.dtype):
        return ir.AttrString(name, _DTYPE + dtype_name(value))
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, int):
        return ir.AttrInt64(name, int(value))
    if isinstance(value, tuple) and all(isinstance(x, int) for x in value):
        return ir.AttrInt64s(name, [int(x) for x in value if isinstance(x, int)])
    numbers = np.array(value, dtype=np.float64)
    return ir.AttrTensor(name, ir.tensor(numbers))


def from_onnx(name: str, given: Mapping[str, ir.Attr]) -> tuple[tuple[str, Attr], ...]:
    """The attributes of an op, sorted, from those of its ONNX node.

    Raises:
        GraphError: the op has no such attribute, or none of that type.
    """
    declared = op.get(name).attrs
    strange = sorted(set(given) - set(declared))
    if strange:
        raise GraphError(f"{name} has no attribute {strange[0]!r}; it has {', '.join(sorted(declared)) or 'none'}")
    return tuple((key, _back(given[key], declared[key]) if key in given else None) for key in sorted(declared))


def _back(attr: ir.Attr, default: Any) -> Attr:
    if attr.type == ir.AttributeType.TENSOR:
        numbers = attr.as_tensor().numpy()
        return float(numbers) if numbers.ndim == 0 else tuple(float(x) for x in numbers)
    if attr.type == ir.AttributeType.INT:
        return bool(attr.as_int()) if isinstance(default, bool) else attr.as_int()
    if attr.type == ir.AttributeType.INTS:
        return tuple(attr.as_ints())
    if attr.type != ir.AttributeType.STRING:
        raise GraphError(f"attribute {attr.name!r} is of a type that no Helios op has: {attr.type}")
    text = attr.as_string()
    return DTYPES[text.removeprefix(_DTYPE)] if text.startswith(_DTYPE) else text
