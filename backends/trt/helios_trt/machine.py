"""The GPU as far as engines need it: what it is, which stream is in turn, and how steps are captured there."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from helios_cuda import streams
from helios_cuda.graphs import CudaRecorder, Recorder

__all__ = ["ALIGNMENT", "ENGINES", "CudaMachine", "Machine", "driver_version"]

ALIGNMENT = 256
"""Bytes. What TensorRT may demand of addresses; a view into a tensor may have less."""

ENGINES = "engines"
"""The purpose of the stream that engines run on where torch's own is the default one."""


class Machine:
    """Where engines run. The base is for a device whose memory the host addresses.

    Attributes:
        device: of tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def identity(self) -> Mapping[str, str]:
        """What an engine is built for: it runs nowhere else."""
        raise NotImplementedError

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """New memory, at an address that is a multiple of ``ALIGNMENT``: torch's allocator on a GPU gives 512."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def plain(self, tensor: Tensor) -> Tensor:
        """The tensor row-major and aligned: itself, or a copy where it is not."""
        if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
            return tensor
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    @contextlib.contextmanager
    def queue(self) -> Iterator[int]:
        """Within, the device is current; the handle of a stream that is behind everything that was queued before, and
        before everything that is queued after."""
        yield 0

    def recorder(self) -> Recorder | None:
        """What captures steps; ``None`` where nothing can."""
        return None


class CudaMachine(Machine):
    """An NVIDIA GPU, through torch."""

    def identity(self) -> Mapping[str, str]:
        """Name, compute capability, and the CUDA version of the driver."""
        major, minor = torch.cuda.get_device_capability(self.device)
        return {
            "name": torch.cuda.get_device_name(self.device),
            "capability": f"{major}.{minor}",
            "driver": driver_version(ctypes.CDLL("libcuda.so.1")),
        }

    @contextlib.contextmanager
    def queue(self) -> Iterator[int]:
        """torch's current stream. On the default stream TensorRT would wait for the device at each call, so where that
        is the current one, engines get a stream of their own that waits for it and is waited for."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            if current != torch.cuda.default_stream(self.device):
                yield current.cuda_stream
                return
            own = streams.of_device(self.device, ENGINES)
            own.wait_stream(current)
            try:
                yield own.cuda_stream
            finally:
                current.wait_stream(own)

    def recorder(self) -> Recorder | None:
        return CudaRecorder(self.device)


def driver_version(libcuda: Any) -> str:
    """The newest CUDA that the driver knows, such as 13.0."""
    number = ctypes.c_int(0)
    status = libcuda.cuDriverGetVersion(ctypes.byref(number))
    return f"{number.value // 1000}.{number.value % 1000 // 10}" if status == 0 else f"unknown ({status})"
