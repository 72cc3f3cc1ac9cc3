"""Steps recorded once over static buffers and replayed from then on: what the backends with such graphs share.

A backend brings the ``Recorder``; what is captured, how contexts are switched and where results go is here.
``helios_cuda.graphs`` says why it is done so, with figures.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from helios.graph import Graph, Rate, Value

__all__ = ["Evaluate", "NotCaptured", "Recorder", "Steps", "capture", "reads_a_context"]

T = TypeVar("T")
Evaluate = Callable[[str, dict[str, Tensor]], dict[str, Tensor]]
"""Runs an entry kernel by kernel; may consume the mapping."""


class Recorder(Protocol):
    """Captures what is launched. All that one recorder captures shares memory."""

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run once, so that what happens only the first time is not captured."""

    def capture(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """What replays the launches of ``run``, and what ``run`` returned, whose tensors each replay writes.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        ...


def reads_a_context(graph: Graph) -> bool:
    """Whether an entry's step is worth a capture: see the module."""
    return any(Rate.WEIGHTS < value.rate < Rate.STEP for value in graph.inputs)


class NotCaptured(Exception):
    """An entry cannot be captured: its name and why."""


class Steps:
    """The captured entries of one program with its weights, by name, as ``capture`` made them."""

    def __init__(self, entries: Mapping[str, _Entry], held: _Buffers) -> None:
        self._entries, self._held = entries, held

    @property
    def names(self) -> tuple[str, ...]:
        """Of the entries, in the order in which they were captured."""
        return tuple(self._entries)

    @property
    def nbytes(self) -> int:
        """Of all static buffers of inputs."""
        return self._held.nbytes + sum(entry.own.nbytes for entry in self._entries.values())

    def run(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replay an entry on inputs; the results are the caller's own."""
        return self._entries[name].run(inputs)


def capture(
    recorder: Recorder,
    graphs: Mapping[str, Graph],
    wanted: Callable[[str], Iterable[str]],
    weights: Mapping[str, Tensor],
    evaluate: Evaluate,
    device: torch.device,
) -> Steps:
    """Capture entries of one program. The result holds on to its weights, and not to the program.

    Args:
        recorder: captures them.
        graphs: entries by name.
        wanted: the inputs that each reads.
        weights: by name, read where they are; they stay where they are as long as the result is used.
        evaluate: runs an entry kernel by kernel.
        device: of the static buffers.

    Raises:
        NotCaptured: the recorder refused; its cause is the recorder's error.
    """
    held, entries = _Buffers(device), {}
    for name in sorted(graphs, key=lambda key: _bytes_of(graphs[key]), reverse=True):
        read = set(wanted(name))
        values = [v for v in graphs[name].inputs if v.name in read and v.name not in weights]
        entry = _Entry(values, {n: weights[n] for n in read if n in weights}, held, device)
        entry.record(recorder, functools.partial(evaluate, name), name)
        entries[name] = entry
    return Steps(entries, held)


def _bytes_of(graph: Graph) -> int:
    """All that the graph computes: a measure of its memory."""
    return sum(v.type.nbytes for node in graph.nodes for v in node.outputs)


def _first(error: BaseException) -> BaseException:
    """What came before all that it brought about: the end of a broken capture fails too, and says no more than that."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error


class _Buffers:
    """Static memory for inputs by name, which knows what lies in it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.tensors: dict[str, Tensor] = {}
        self._source: dict[str, weakref.ref[Tensor]] = {}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def add(self, value: Value) -> None:
        if value.name not in self.tensors:
            self.tensors[value.name] = torch.zeros(value.shape, dtype=value.dtype, device=self._device)

    def fill(self, name: str, source: Tensor) -> None:
        self.tensors[name].copy_(source)

    def hold(self, name: str, source: Tensor) -> None:
        """As ``fill``, for a tensor that nobody writes to: nothing to do if it lies there already.

        Known by a weak reference: a strong one would keep a context alive that its owner has dropped.
        """
        known = self._source.get(name)
        if known is None or known() is not source:
            self.fill(name, source)
            self._source[name] = weakref.ref(source)


class _Entry:
    """One entry: where its inputs go, what it was captured as, where its results are."""

    def __init__(self, values: list[Value], weights: dict[str, Tensor], held: _Buffers, device: torch.device) -> None:
        self._weights, self._held, self.own = weights, held, _Buffers(device)
        self._slower = [v.name for v in values if v.rate < Rate.STEP]
        for value in values:
            (self.own if value.rate == Rate.STEP else held).add(value)
        self._replay: Callable[[], None] | None = None
        self._results: dict[str, Tensor] = {}

    def _environment(self) -> dict[str, Tensor]:
        """All inputs in their static places."""
        slower = {name: self._held.tensors[name] for name in self._slower}
        return {**self._weights, **slower, **self.own.tensors}

    def record(self, recorder: Recorder, evaluate: Callable[[dict[str, Tensor]], dict[str, Tensor]], name: str) -> None:
        recorder.warm_up(lambda: evaluate(self._environment()))
        try:
            self._replay, self._results = recorder.capture(lambda: evaluate(self._environment()))
        except RuntimeError as error:
            first = _first(error)
            raise NotCaptured(f"{name}: {first}") from first

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self._replay is not None
        for name in self._slower:
            self._held.hold(name, inputs[name])
        for name in self.own.tensors:
            self.own.fill(name, inputs[name])
        self._replay()
        return {name: result.clone() for name, result in self._results.items()}
