"""The side of the device: a backend at work on cases. Runs in a worker process, or in this one for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from helios.backend import PRECISIONS, Backend
from helios.graph import Graph
from helios.kernel_program import KernelProgram
from helios.lower import lower
from helios.program import Program
from helios_conformance.draws import Root

__all__ = ["Session"]


@dataclasses.dataclass(eq=False)
class Session:
    """What a check needs to run a case.

    Attributes:
        backend: under judgement.
        root: of all draws.
        fallback: ``error`` always, in a run that may certify.
        model: folder or None: what the levels pipeline and realtime may use instead of random weights.
    """

    backend: Backend
    root: Root
    fallback: str = "error"
    model: str | None = None

    def dtype(self, precision: str) -> torch.dtype:
        return PRECISIONS[precision]

    def lower(self, graphs: Mapping[str, Graph]) -> Program:
        """Through the same door as everybody. Raises UnsupportedNode where the backend declares that it cannot."""
        return lower(graphs, self.backend, fallback=self.fallback)

    def is_engine(self, program: Program) -> bool:
        """Whether graphs run whole, so that single ops are diagnostic only."""
        return not isinstance(program, KernelProgram)

    def to_host(self, tensor: Tensor) -> Tensor:
        self.backend.synchronize()
        return tensor.detach().to("cpu")
