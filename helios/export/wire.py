"""A tensor while a model is being written, and how types are called there."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import onnx_ir as ir
import torch

from helios.errors import GraphError
from helios.export.dim import Size
from helios.graph import dtype_name

__all__ = ["Sizes", "Wire", "element", "torch_dtype"]

Sizes: TypeAlias = tuple[Size, ...]

_ELEMENTS = {
    torch.float64: ir.DataType.DOUBLE,
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.float8_e5m2: ir.DataType.FLOAT8E5M2,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}
_DTYPES = {element: dtype for dtype, element in _ELEMENTS.items()}


def element(dtype: torch.dtype) -> ir.DataType:
    """ONNX's name of a dtype."""
    return _ELEMENTS[dtype]


def torch_dtype(kind: ir.DataType | None) -> torch.dtype:
    """The dtype of an ONNX element type. Raises GraphError where Helios has none."""
    if kind not in _DTYPES:
        raise GraphError(f"Helios has no dtype for the ONNX element type {kind}; it has {_known()}")
    return _DTYPES[kind]


def _known() -> str:
    return ", ".join(dtype_name(dtype) for dtype in _ELEMENTS)


@dataclasses.dataclass(frozen=True, slots=True)
class Wire:
    """An ONNX value of known dtype and sizes; a size is an integer, or depends on the dimensions of inputs."""

    value: ir.Value
    dtype: torch.dtype
    sizes: Sizes

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @property
    def name(self) -> str:
        return str(self.value.name)
