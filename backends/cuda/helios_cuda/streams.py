"""The streams of a device, one for each purpose, the same as long as the process lives.

torch hands streams out of a pool of 32, in turn: were they taken anew for every load, one purpose would some day have
another's. And torch keeps a workspace of cuBLAS for each pair of a thread's handle and a stream, 32 MiB on sm_90, and
never gives it back (``at::cuda::setWorkspaceForHandle``; newer versions take one for each call, on the current stream).
A captured product uses that of the stream it was captured on, wherever it is replayed. So what is replayed on the usual
stream and what runs beside it share none, as cuBLAS demands for equal bits, as long as captures and the stream beside
are two streams: they come from two pools, since their priorities differ.

``BESIDE`` has the higher priority: what is decoded there is wanted before what is denoised meanwhile, which takes the
units that it leaves.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["BESIDE", "CAPTURES", "LANDINGS", "SENDS", "beside", "of_device"]

CAPTURES = "captures"
SENDS = "copies to the device"
LANDINGS = "copies to the host"
BESIDE = "computations beside others"


@functools.cache
def of_device(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """The stream that a device has for a purpose."""
    return torch.cuda.Stream(device, priority=-1 if purpose == BESIDE else 0)


@contextlib.contextmanager
def beside(device: torch.device, read: Iterable[Tensor]) -> Iterator[None]:
    """Within, ``BESIDE`` is the current stream.

    Args:
        device: that has both.
        read: tensors of the stream that is current outside; where there are any, it is waited for, and their memory is
            not used again before what reads them here is done.
    """
    outside, inside = torch.cuda.current_stream(device), of_device(device, BESIDE)
    tensors = list(read)
    if tensors:
        inside.wait_stream(outside)
    for tensor in tensors:
        tensor.record_stream(inside)
    with torch.cuda.stream(inside):
        yield
