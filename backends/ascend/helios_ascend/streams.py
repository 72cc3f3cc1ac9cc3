"""The streams of a device, one for each purpose, the same as long as the process lives."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from helios_ascend import operators

__all__ = ["BESIDE", "CAPTURES", "beside", "of_device"]

CAPTURES = "captures"
BESIDE = "computations beside others"


def npu() -> Any:
    """``torch.npu``, as torch_npu makes it."""
    return operators.torch_npu().npu


@functools.cache
def of_device(device: torch.device, purpose: str) -> Any:
    """The stream that a device has for a purpose; what is decoded beside is wanted first."""
    return npu().Stream(device=device, priority=-1 if purpose == BESIDE else 0)


@contextlib.contextmanager
def beside(device: torch.device, read: Iterable[Tensor]) -> Iterator[None]:
    """Within, ``BESIDE`` is the current stream.

    Args:
        device: that has both.
        read: tensors of the stream that is current outside; where there are any, it is waited for, and their memory is
            not used again before what reads them here is done.
    """
    outside, inside = npu().current_stream(device), of_device(device, BESIDE)
    tensors = list(read)
    if tensors:
        inside.wait_stream(outside)
    for tensor in tensors:
        tensor.record_stream(inside)
    with npu().stream(inside):
        yield
