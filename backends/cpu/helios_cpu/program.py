"""The program of the CPU backend: kernel by kernel, with the allocator told what is coming."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from helios.graph import Rate
from helios.kernel_program import KernelProgram
from helios.program import EMPTY, Context, WeightReader
from helios_cpu import allocator

__all__ = ["CpuProgram"]


class CpuProgram(KernelProgram):
    """As its base, at a lower peak.

    Steps keep what they free, since the next one takes the same sizes. Nothing is kept over a load, from one chunk to
    the next, or in a network that runs once a chunk: the VAE, which no prompt is bound to.
    """

    def load(self, weights: WeightReader) -> None:
        with allocator.returning_at_once():
            super().load(weights)

    def bind(self, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> Context:
        allocator.return_freed_memory()
        return super().bind(inputs, context)

    def evaluate(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.plan.phases[Rate.PROMPT].nodes:
            return super().evaluate(graph, inputs)
        with allocator.returning_at_once():
            return super().evaluate(graph, inputs)
