"""Tensors on ``npu`` seen from the host: the stand-in's device memory is host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npu_emulator.rules import Refused

__all__ = ["FRACTAL_NZ", "ND", "blocked", "deep", "format_of", "host", "mark", "on_npu", "place"]

ND, FRACTAL_NZ = 2, 29

_blocked: dict[int, Tensor] = {}
"""Tensors in blocks, by the address of their memory. They are kept, so that no other tensor gets that address: they
are weights, and a process that emulates is short."""


def on_npu(x: Any) -> bool:
    """Whether it is a tensor on the device."""
    return isinstance(x, Tensor) and x.device.type == "npu"


def host(x: Tensor) -> Tensor:
    """The same memory as a tensor of the host, of the same sizes and strides.

    Raises:
        Refused: numbers of 64 bits with a fraction, which the vector and cube units do not compute with.
    """
    if x.dtype in (torch.float64, torch.complex64, torch.complex128):
        raise Refused(f"{x.dtype} on the device: it computes with no float64 and no complex numbers")
    storage = x.untyped_storage()
    if not x.numel():
        return torch.empty(x.shape, dtype=x.dtype)
    room = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(room, dtype=x.dtype, count=storage.nbytes() // x.itemsize)
    return flat.as_strided(x.size(), x.stride(), x.storage_offset())


def place(x: Tensor) -> Tensor:
    """A contiguous copy on the device."""
    out = torch.empty(x.shape, dtype=x.dtype, device="npu")
    host(out).copy_(x)
    return out


def deep(x: Any, fn: Callable[[Any], Any]) -> Any:
    """The same lists and tuples, of what the function makes of their items."""
    if isinstance(x, list | tuple):
        return type(x)(deep(item, fn) for item in x)
    return fn(x)


def mark(x: Tensor) -> Tensor:
    """From here on its memory holds blocks of 16 × 16."""
    _blocked[x.untyped_storage().data_ptr()] = x
    return x


def blocked(x: Any) -> bool:
    """Whether a tensor, or what it is a view of, is held in blocks."""
    return bool(_blocked) and on_npu(x) and x.untyped_storage().data_ptr() in _blocked


def format_of(x: Tensor) -> int:
    """As ``get_npu_format`` tells it."""
    return FRACTAL_NZ if blocked(x) else ND
