"""The program of the Ascend backend: kernel by kernel, or steps replayed as graphs of the device."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from helios import captured
from helios.captured import NotCaptured, Steps
from helios.graph import Node
from helios.kernel_program import KernelProgram, Resolved
from helios.passes import Plan
from helios.program import EMPTY, Context, Coverage, WeightReader
from helios_ascend import failures, rope, streams

if TYPE_CHECKING:
    from helios.backend import Backend
    from helios_ascend.backend import AscendBackend

__all__ = ["AscendProgram"]


class AscendProgram(KernelProgram):
    """As its base; with ``graphs`` on, entries that read a context are captured when the first is run, and replayed.

    Attributes:
        eager: why steps run kernel by kernel; empty where they are replayed, or will be.
    """

    def __init__(
        self, plan: Plan, backend: Backend, resolved: Mapping[str, list[Resolved]], coverage: Coverage
    ) -> None:
        super().__init__(plan, backend, resolved, coverage)
        self._npu = cast("AscendBackend", backend)
        self._entries = {name: graph for name, graph in plan.steps.items() if captured.reads_a_context(graph)}
        self._recorder = self._npu.recorder()
        self._steps: Steps | None = None
        self.eager = "" if self._recorder else "asked for"

    def load(self, weights: WeightReader) -> None:
        self._handles = {}  # those of an earlier load, and what they are captured in, make room
        self._steps, self.eager = None, "" if self._recorder else "asked for"
        needed = sum(value.type.nbytes for value in self.weight_inputs().values())
        with self._running("the weights"):
            failures.require_room(needed, self.backend.memory(), self._npu.reusable(), self.backend.label)
            with rope.sharing():
                super().load(weights)

    def evaluate(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with self._running(graph):
            if graph in self._entries and not self.eager:
                steps = self._steps or self._capture()
                if steps is not None:
                    return steps.run(graph, inputs)
            return super().evaluate(graph, inputs)

    def bind(self, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> Context:
        with self.backend.explained("a context"):
            return super().bind(inputs, context)

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        with self.backend.explained(entry):
            return super().run(entry, inputs, context)

    def profile(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> list[tuple[Node, float]]:
        with self._running(entry):
            return super().profile(entry, inputs, context)

    def execution(self) -> dict[str, Any]:
        """How steps run, as JSON values: which are captured, or why none is."""
        if self._steps is None:
            return {"graphs": [], "eager": self.eager or "nothing ran yet"}
        return {"graphs": list(self._steps.names), "static_bytes": self._steps.nbytes}

    def _capture(self) -> Steps | None:
        assert self._recorder is not None
        try:
            self._steps = captured.capture(
                self._recorder, self._entries, self.wanted, self.weights, super().evaluate, self.backend.device
            )
        except NotCaptured as error:
            cause = error.__cause__
            assert cause is not None
            told = failures.explain(cause, "the graphs of its steps", self.backend.label, self.backend.memory)
            if told is not None:
                raise told from cause
            self.eager = f"not captured: {error}"
            warnings.warn(f"steps run kernel by kernel, not as graphs: {error}", RuntimeWarning, stacklevel=2)
        return self._steps

    @contextlib.contextmanager
    def _running(self, doing: str) -> Iterator[None]:
        """The backend's device current, errors explained."""
        with self.backend.explained(doing), streams.npu().device(self.backend.device):
            yield
