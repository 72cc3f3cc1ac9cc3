"""The program of the CUDA backend: steps as CUDA graphs, everything else kernel by kernel, on the backend's device."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from helios.graph import Node, operand_values
from helios.kernel_program import KernelProgram, Resolved
from helios.passes import Plan
from helios.program import EMPTY, Context, Coverage, WeightReader
from helios_cuda import failures, graphs, offload
from helios_cuda.arithmetic import as_declared
from helios_cuda.graphs import NotCaptured, Steps
from helios_cuda.held import saved
from helios_cuda.offload import Streamed
from helios_cuda.staging import Staging

if TYPE_CHECKING:
    from helios.backend import Backend
    from helios_cuda.backend import CudaBackend

__all__ = ["CudaProgram"]


class CudaProgram(KernelProgram):
    """As its base; entries that read a context are captured when the first of them is run, and replayed.

    Attributes:
        eager: why steps run kernel by kernel; empty where they are replayed, or will be.
    """

    def __init__(
        self, plan: Plan, backend: Backend, resolved: Mapping[str, list[Resolved]], coverage: Coverage
    ) -> None:
        super().__init__(plan, backend, resolved, coverage)
        self._cuda = cast("CudaBackend", backend)
        self._entries = {name: graph for name, graph in plan.steps.items() if graphs.reads_a_context(graph)}
        self._steps: Steps | None = None
        self._staging: Staging | None = None
        self._streamed: Streamed | None = None
        self.eager = self._cuda.eager

    def load(self, weights: WeightReader) -> None:
        self._handles = {}  # those of an earlier load, and what they are captured in, make room
        self._steps, self._streamed, self.eager = None, None, self._cuda.eager
        with self._running("the weights"):
            self._make_room()
            with self._staged():
                super().load(weights)

    def evaluate(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with self._running(graph):
            if graph in self._entries and not self.eager:
                steps = self._steps or self._capture()
                if steps is not None:
                    return steps.run(graph, inputs)
            with self._fetching(graph):
                return super().evaluate(graph, inputs)

    def bind(self, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> Context:
        with self.backend.explained("a context"):  # what goes there and is copied there, before it is evaluated
            return super().bind(inputs, context)

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        with self.backend.explained(entry):
            return super().run(entry, inputs, context)

    def profile(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> list[tuple[Node, float]]:
        with self._running(entry), self._fetching(entry):
            return super().profile(entry, inputs, context)

    def move(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Through pinned memory: from any other, the host would wait for the device.

        From pinned memory of the caller's own it does wait, since nobody tells him when he may write to it again.
        """
        if tensor.device.type != "cpu":
            return super().move(tensor, dtype)
        if self._staging is not None:
            return self._staging.upload(tensor, dtype)
        if self.backend.device.type == "cpu" or tensor.is_pinned():
            return super().move(tensor, dtype)
        return tensor.to(dtype).pin_memory().to(self.backend.device, non_blocking=True)

    def execution(self) -> dict[str, Any]:
        """How steps run, as JSON values: which are captured, or why none is."""
        if self._streamed is not None:
            kept, fetched = self._streamed.nbytes
            return {"graphs": [], "eager": self.eager, "resident_bytes": kept, "fetched_bytes": fetched}
        if self._steps is None:
            return {"graphs": [], "eager": self.eager or "nothing ran yet"}
        return {"graphs": list(self._steps.names), "static_bytes": self._steps.nbytes}

    def aside(self) -> bool:
        with self._running("the weights' copies"):
            return self._streamed is not None and self._streamed.aside()

    def capture(self) -> None:
        """Capture all entries now, and not when the first of them is run: for a process that is to answer at once."""
        with self._running("the graphs of its steps"):
            if self._steps is None and not self.eager and self._entries:
                self._capture()

    def _capture(self) -> Steps | None:
        recorder = self._cuda.recorder()
        assert recorder is not None
        try:
            self._steps = graphs.capture(
                recorder, self._entries, self.wanted, self.weights, super().evaluate, self.backend.device
            )
        except NotCaptured as error:
            cause = error.__cause__
            assert cause is not None
            told = failures.explain(cause, "the graphs of its steps", self.backend.label, self.backend.memory)
            if told is not None:
                raise told from cause
            self.eager = f"not captured: {error}"
            warnings.warn(f"steps run kernel by kernel, not as CUDA graphs: {error}", RuntimeWarning, stacklevel=2)
        return self._steps

    @contextlib.contextmanager
    def _running(self, doing: str) -> Iterator[None]:
        """The backend's device current, arithmetic as declared, errors explained."""
        device = self.backend.device
        current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with failures.explained(doing, self.backend.label, self.backend.memory), current, as_declared():
            yield

    @contextlib.contextmanager
    def _staged(self) -> Iterator[None]:
        link = self._cuda.link()
        self._staging = None if link is None else Staging(link, self.backend.device)
        try:
            yield
            if self._staging is not None:
                self._staging.finish()
        finally:
            self._staging = None

    def _make_room(self) -> None:
        """Keep handles on the host, where that was asked for and all of them do not fit."""
        calls = {call.key: call for sequence in self._sequences.values() for call in sequence.calls if call.key}
        came = sum(value.type.nbytes for value in self.weight_inputs().values())
        needed = came - sum(saved(call.node) for call in calls.values())
        told, reusable = self.backend.memory(), self._cuda.reusable()
        link = self._cuda.link()
        if not self._cuda.low or told is None or link is None:
            failures.require_room(needed, told, reusable, self.backend.label)
            return
        room = told[0] + reusable - offload.RESERVE
        if room >= needed:
            return
        often = {call.key for name in self.plan.steps for call in self._sequences[name].calls}
        seldom = {key: call for key, call in calls.items() if key not in often}
        packed = (call.node.inputs[i] for call in seldom.values() for i in call.packed)
        needed -= sum(value.type.nbytes for value in operand_values(packed))
        needed += sum(saved(call.node) for call in seldom.values())
        self._streamed = Streamed(link, self.backend.device, max(room, 0) / max(needed, 1), frozenset(seldom))
        self._handles = self._streamed
        self.eager = "weights are fetched from the host"

    @contextlib.contextmanager
    def _fetching(self, graph: str) -> Iterator[None]:
        """Weights on their way in the order in which this graph uses them."""
        if self._streamed is None:
            yield
            return
        self._streamed.begin([call.key for call in self._sequences[graph].calls if call.key is not None])
        try:
            yield
        finally:
            self._streamed.end()
