"""Running a plan: contexts hold what slower phases computed; a run computes the rest.

::

    program = lower({"stage0": ..., "stage2": ...}, backend)
    program.load(weights)
    prompt = program.bind({"text": embeddings})          # text keys and values of all layers, once a prompt
    history = program.bind({"history_short": ..., ...})  # history embeddings, once a chunk
    out = program.run("stage2", {"sample": x, "timestep": t}, prompt | history)

Contexts are immutable: a second prompt is a second context, so there is no cache that one could forget to clear.
"""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from helios.backend import Backend
from helios.errors import GraphError, InputError
from helios.graph import Node, Rate, Value
from helios.passes import Plan

__all__ = ["EMPTY", "Context", "Coverage", "Program", "WeightReader"]


class WeightReader(Protocol):
    """Where weights come from: one host tensor at a time."""

    def read(self, name: str) -> Tensor: ...


@dataclasses.dataclass(slots=True)
class Coverage:
    """How the nodes of a program run, op by op: by the backend's kernel, fused, or by the fallback."""

    counts: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)

    def count(self, name: str, how: str, reason: str = "") -> None:
        self.counts.setdefault(name, collections.Counter())[how] += 1
        if reason:
            self.reasons.setdefault(name, reason)

    @property
    def fallbacks(self) -> int:
        return sum(c["fallback"] for c in self.counts.values())

    def rows(self) -> list[tuple[str, int, int, int, str]]:
        """op, native, fused, fallback, reason; sorted by op."""
        return [
            (name, c["native"], c["fused"], c["fallback"], self.reasons.get(name, ""))
            for name, c in sorted(self.counts.items())
        ]


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """Values at slower rates, on the device. Immutable; ``a | b`` is a context with the values of both."""

    values: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", types.MappingProxyType(dict(self.values)))

    def __or__(self, other: Context) -> Context:
        return Context({**self.values, **other.values})

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.values.values())


EMPTY = Context({})


class Program:
    """What ``Backend.compile`` returns. Binding, checking, placing and contexts are here, for all backends alike.

    An engine that runs graphs whole supplies ``evaluate``. To build weights into its engines it extends ``load`` (after
    which ``weights`` holds what graphs read) and says in ``wanted`` that it needs them no more.

    Attributes:
        weights: on the device, by name: the weights, and what the weights phase made of them, that other graphs read.
        evaluations: how often each slower phase ran, by rate.
    """

    def __init__(self, plan: Plan, backend: Backend, coverage: Coverage) -> None:
        self.plan, self.backend, self.coverage = plan, backend, coverage
        self.evaluations: collections.Counter[Rate] = collections.Counter()
        self.weights: dict[str, Tensor] = {}
        self._loaded = False

    def evaluate(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph of the plan, a phase or an entry.

        Args:
            graph: its name in ``plan.graphs``.
            inputs: what ``wanted`` names, on the device, of the declared shapes and dtypes and of any strides. They
                must not be written to; the mapping itself may be consumed.

        Returns:
            the outputs by name, on the device. They may share memory with inputs, but the next evaluation must not
            write to them: contexts and callers keep them.
        """
        raise NotImplementedError

    def wanted(self, graph: str) -> Iterable[str]:
        """Names of the inputs that ``evaluate`` needs for this graph: all, unless weights are held in another form."""
        return (v.name for v in self.plan.graphs[graph].inputs)

    def load(self, weights: WeightReader) -> None:
        """Read, convert and place every weight, and run the weights phase. Tensor by tensor: the host holds one at a
        time beyond what the program keeps."""
        placed = {name: self.place(weights.read(name), value) for name, value in self.weight_inputs().items()}
        label = Rate.WEIGHTS.label
        held = self.evaluate(label, {name: placed[name] for name in self.wanted(label)})
        self._ready(placed | held)

    def _ready(self, weights: Mapping[str, Tensor]) -> None:
        """Keep what graphs beyond the weights phase read."""
        read = {v.name for name, graph in self.plan.graphs.items() if name != Rate.WEIGHTS.label for v in graph.inputs}
        self.weights = {name: tensor for name, tensor in weights.items() if name in read}
        self.evaluations[Rate.WEIGHTS] += 1
        self._loaded = True

    def bind(self, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> Context:
        """Compute the phase that these inputs belong to.

        Args:
            inputs: all inputs of one rate, prompt or chunk, on any device.
            context: what that phase needs from slower phases beyond the weights.

        Returns:
            a context with the inputs and the held values of that phase.
        """
        rate = self.phase_of(inputs)
        # Copies: a caller who writes to a tensor after binding it must not change a context.
        given = {name: tensor.clone() for name, tensor in self._given(rate.label, inputs, rate).items()}
        environment = self._environment(rate.label, given, context)
        self.evaluations[rate] += 1
        return Context({**given, **self.evaluate(rate.label, environment)})

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        """One step of one entry; the outputs by name, on the device."""
        return self.evaluate(entry, self._step(entry, inputs, context))

    def profile(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> list[tuple[Node, float]]:
        """Seconds of each node in one step, synchronised after every one; nothing where graphs run whole."""
        return []

    def aside(self) -> bool:
        """Give the device's memory to others until the next evaluation, as far as the host has what lies there; False
        where it has not, so that only a program that is dropped gives it back."""
        return False

    def place(self, tensor: Tensor, value: Value, owner: str = "the graph") -> Tensor:
        """The tensor on the device, in the dtype of ``value``. Raises InputError if it has another shape.

        It is converted where it comes from: the device may not have the dtype that it comes in.
        """
        if tuple(tensor.shape) != value.shape:
            what = "weight" if value.rate == Rate.WEIGHTS else "input"
            raise InputError(f"{what} {value.name!r} has shape {list(tensor.shape)}, {owner} takes {list(value.shape)}")
        return self.move(tensor, value.dtype)

    def move(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor on the device in a dtype; a backend may know a better way there."""
        return tensor.to(dtype).to(self.backend.device)

    def _step(self, entry: str, inputs: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        if entry not in self.plan.steps:
            raise GraphError(f"the program has no entry {entry!r}; it has {', '.join(self.plan.steps)}")
        return self._environment(entry, self._given(entry, inputs, Rate.STEP), context)

    def _environment(self, name: str, given: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        """Everything that a graph wants, by name."""
        if not self._loaded:
            raise GraphError("the program has no weights yet", fix="call program.load(weights) first")
        known = collections.ChainMap(dict(given), dict(context.values), self.weights)
        wanted = list(self.wanted(name))
        absent = [key for key in wanted if key not in known]
        if absent:
            raise InputError(f"{name!r} lacks {', '.join(absent[:5])}", fix="bind the prompt and chunk inputs first")
        return {key: known[key] for key in wanted}

    def _given(self, name: str, inputs: Mapping[str, Tensor], rate: Rate) -> dict[str, Tensor]:
        """The inputs on the device, each of its declared shape and dtype."""
        graph = self.plan.graphs[name]
        # An input of a slower rate may be read by faster phases alone, and one of a step only by some of them.
        graphs = (graph,) if rate == Rate.STEP else self.plan.graphs.values()
        declared = {v.name: v for g in graphs for v in g.inputs_at(rate)}
        strange = [key for key in inputs if key not in declared]
        if strange:
            raise InputError(f"{name} has no input {strange[0]!r}; it has {', '.join(sorted(declared))}")
        return {key: self.place(tensor, declared[key], name) for key, tensor in inputs.items()}

    def phase_of(self, inputs: Iterable[str]) -> Rate:
        """The one rate that these inputs have."""
        names = set(inputs)
        for rate in (Rate.PROMPT, Rate.CHUNK):
            if names == self.input_names(rate):
                return rate
        wanted = " or ".join(str(sorted(self.input_names(r))) for r in (Rate.PROMPT, Rate.CHUNK))
        raise InputError(f"bind takes all inputs of one phase, {wanted}; got {sorted(names)}")

    def input_names(self, rate: Rate) -> set[str]:
        """Names of the plan's own inputs at a rate."""
        held = {v.name for graph in self.plan.phases.values() for _, v in graph.outputs}
        graphs = self.plan.graphs.values()
        return {v.name for graph in graphs for v in graph.inputs_at(rate) if v.name not in held}

    def weight_inputs(self) -> dict[str, Value]:
        """Every weight that the plan reads, by name."""
        held = {v.name for _, v in self.plan.phases[Rate.WEIGHTS].outputs}
        graphs = self.plan.graphs.values()
        return {v.name: v for graph in graphs for v in graph.inputs_at(Rate.WEIGHTS) if v.name not in held}
