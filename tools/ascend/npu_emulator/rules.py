"""What the documents demand of arguments, said so that a refusal names operator, argument and rule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["OPERATORS", "Refused", "absent", "contiguous", "dtypes", "operator", "require", "same_dtype"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)


class Refused(RuntimeError):
    """The real operator, or this emulation of it, does not take these arguments."""


OPERATORS: dict[str, Callable[..., Any]] = {}
"""By their names in ``torch.ops.npu``: functions of host tensors, with the parameters of the schema."""


def operator(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function as the meaning of these operators."""

    def enter(fn: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS.update(dict.fromkeys(names, fn))
        return fn

    return enter


def require(condition: bool, name: str, rule: str) -> None:
    """Refuse unless the condition holds."""
    if not condition:
        raise Refused(f"{name}: {rule}")


def dtypes(name: str, allowed: Collection[torch.dtype], **tensors: Tensor | None) -> None:
    """Refuse a tensor of a dtype that the operator's page does not list."""
    for key, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            raise Refused(f"{name}: {key} is {tensor.dtype}, documented are {', '.join(map(str, allowed))}")


def same_dtype(name: str, **tensors: Tensor | None) -> None:
    """Refuse tensors of different dtypes."""
    found = {key: tensor.dtype for key, tensor in tensors.items() if tensor is not None}
    require(len(set(found.values())) <= 1, name, f"dtypes must be the same, came {found}")


def contiguous(name: str, **tensors: Tensor | None) -> None:
    """Refuse a tensor with gaps or permuted strides."""
    for key, tensor in tensors.items():
        require(tensor is None or tensor.is_contiguous(), name, f"{key} must be contiguous")


def absent(name: str, given: Iterable[tuple[str, Any]]) -> None:
    """Refuse arguments that the operator has and this emulation does not."""
    for key, value in given:
        require(value is None or value is False, name, f"{key} is not emulated")
