"""The program of the CUDA backend: kernel by kernel, on the backend's own device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from helios.kernel_program import KernelProgram

__all__ = ["CudaProgram"]


class CudaProgram(KernelProgram):
    """As its base; kernels are launched on the device of the backend, whichever is current outside."""

    def evaluate(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with self._current():
            return super().evaluate(graph, inputs)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        if self.backend.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.backend.device):
            yield
