"""The side of the device: a backend at work on cases. Runs in a worker process, or in this one for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from helios.backend import PRECISIONS, Backend
from helios.graph import Graph
from helios.kernel_program import KernelProgram
from helios.lower import lower
from helios.program import Program
from helios_conformance.draws import Root

__all__ = ["Session"]


def _nobody(told: Mapping[str, Any]) -> None:
    """Nobody listens."""


@dataclasses.dataclass(eq=False)
class Session:
    """What a check needs to run a case.

    Attributes:
        backend: under judgement.
        root: of all draws.
        fallback: ``error`` always, in a run that may certify.
        model: folder or None: what the level realtime times instead of random weights.
        options: of the run, JSON values: what the command line set of size, steps, chunks, seconds, soak …
        tell: hands a JSON object to the parent at once, while the case runs. The parent stamps its arrival with its own
            clock, counted from the moment it sent the case, and hands all of them to ``judge`` as
            ``observation.facts["told"]``: ``[[seconds, object], …]`` in order of arrival.
    """

    backend: Backend
    root: Root
    fallback: str = "error"
    model: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tell: Callable[[Mapping[str, Any]], None] = _nobody

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
