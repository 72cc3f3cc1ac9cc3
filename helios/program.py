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
import itertools
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from helios import op
from helios.backend import Backend, Kernel
from helios.errors import GraphError, InputError
from helios.graph import Graph, Node, Operand, Rate, Value, operand_values
from helios.passes import Plan

__all__ = ["Context", "Coverage", "KernelProgram", "Program", "Resolved", "WeightReader"]


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
        given = self._given(rate.label, inputs, rate)
        environment = self._environment(rate.label, given, context)
        self.evaluations[rate] += 1
        return Context({**given, **self.evaluate(rate.label, environment)})

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        """One step of one entry; the outputs by name, on the device."""
        return self.evaluate(entry, self._step(entry, inputs, context))

    def profile(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> list[tuple[Node, float]]:
        """Seconds of each node in one step, synchronised after every one; nothing where graphs run whole."""
        return []

    def place(self, tensor: Tensor, value: Value, owner: str = "the graph") -> Tensor:
        """The tensor on the device, in the dtype of ``value``. Raises InputError if it has another shape.

        It is converted where it comes from: the device may not have the dtype that it comes in.
        """
        if tuple(tensor.shape) != value.shape:
            what = "weight" if value.rate == Rate.WEIGHTS else "input"
            raise InputError(f"{what} {value.name!r} has shape {list(tensor.shape)}, {owner} takes {list(value.shape)}")
        return tensor.to(value.dtype).to(self.backend.device)

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
        # An input of a slower rate may be read by the steps alone, and one of a step only by some of them.
        graphs = (graph,) if rate == Rate.STEP else (graph, *self.plan.steps.values())
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


@dataclasses.dataclass(frozen=True, slots=True)
class Resolved:
    """A node with the kernel that runs it; ``how`` is native, fused, fallback or constant."""

    node: Node
    kernel: Kernel
    how: str


Getter = Callable[[dict[str, Any]], Any]


class KernelProgram(Program):
    """One kernel a node. Values are freed after their last use."""

    def __init__(
        self, plan: Plan, backend: Backend, resolved: Mapping[str, list[Resolved]], coverage: Coverage
    ) -> None:
        super().__init__(plan, backend, coverage)
        self._handles: dict[tuple[Any, ...], Any] = {}
        self._sequences = {
            name: _Sequence(graph, resolved[name], backend.device) for name, graph in plan.graphs.items()
        }

    def load(self, weights: WeightReader) -> None:
        self._handles.clear()
        self.weights, self._loaded = {}, False
        loader = _Loader(self, weights)
        phase = self._sequences[Rate.WEIGHTS.label]
        self._prepare(phase.calls, loader)
        environment = {v.name: loader.get(v.name) for v in phase.graph.inputs if v.name in loader.kept}
        self.weights.update(phase.run(environment, self._handles))
        for name, sequence in self._sequences.items():
            if name != Rate.WEIGHTS.label:
                self._prepare(sequence.calls, loader)
        self._ready(self.weights | loader.finish())

    def _prepare(self, calls: Iterable[_Call], loader: _Loader) -> None:
        for call in calls:
            if call.key is not None and call.key not in self._handles:
                operands = [loader.operand(x) if i in call.packed else None for i, x in enumerate(call.node.inputs)]
                assert call.kernel.prepare is not None
                self._handles[call.key] = call.kernel.prepare(*operands, **call.attrs)
                loader.release(call)

    def evaluate(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._sequences[graph].run(inputs, self._handles)

    def wanted(self, graph: str) -> Iterable[str]:
        return self._sequences[graph].wanted

    def profile(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> list[tuple[Node, float]]:
        environment = self._step(entry, inputs, context)
        clock = _Clock(self.backend)
        self._sequences[entry].run(environment, self._handles, clock)
        return clock.laps


class _Clock:
    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.laps: list[tuple[Node, float]] = []
        backend.synchronize()
        self._last = time.perf_counter()

    def lap(self, node: Node) -> None:
        self.backend.synchronize()
        now = time.perf_counter()
        self.laps.append((node, now - self._last))
        self._last = now


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A resolved node made ready: how to fetch its operands, and what to forget after it."""

    node: Node
    kernel: Kernel
    attrs: dict[str, Any]
    packed: frozenset[int]
    key: tuple[Any, ...] | None
    operands: tuple[Operand, ...]
    outputs: tuple[str, ...]
    dead: tuple[str, ...]
    constant: bool


class _Sequence:
    """The calls of one graph, in order."""

    def __init__(self, graph: Graph, resolved: list[Resolved], device: torch.device) -> None:
        self.graph, self.device = graph, device
        resolved, packed = _needed(graph, resolved)
        last = {}
        for at, (item, gone) in enumerate(zip(resolved, packed, strict=True)):
            for i, operand in enumerate(item.node.inputs):
                if i not in gone:
                    last.update({v.name: at for v in operand_values([operand])})
            last.update({v.name: at for v in item.node.outputs if v.name not in last})
        # Slower inputs belong to contexts, which live on anyway.
        keep = {v.name for _, v in graph.outputs} | {v.name for v in graph.inputs if v.rate < Rate.STEP}
        dead: dict[int, list[str]] = collections.defaultdict(list)
        for name, at in last.items():
            if name not in keep:
                dead[at].append(name)
        self.calls = [
            _call(item, gone, tuple(dead[at])) for at, (item, gone) in enumerate(zip(resolved, packed, strict=True))
        ]
        used = {v.name for call in self.calls for v in operand_values(call.operands)}
        used |= {v.name for _, v in graph.outputs}
        self.wanted = tuple(v.name for v in graph.inputs if v.name in used)  # of others only a packed form is left

    def run(self, env: dict[str, Any], handles: Mapping[Any, Any], clock: _Clock | None = None) -> dict[str, Tensor]:
        with torch.no_grad():
            for call in self.calls:
                results = self._call(call, env, handles)
                for name, tensor in zip(call.outputs, results, strict=True):
                    env[name] = tensor
                for name in call.dead:
                    del env[name]
                if clock is not None:
                    clock.lap(call.node)
        return {name: env[value.name] for name, value in self.graph.outputs}

    def _call(self, call: _Call, env: dict[str, Any], handles: Mapping[Any, Any]) -> tuple[Tensor, ...]:
        if call.constant:
            result = call.kernel.run(**call.attrs).to(self.device)
        else:
            operands = [_fetch(x, env) for x in call.operands]
            if call.key is not None:
                result = call.kernel.run(handles[call.key], *operands, **call.attrs)
            elif call.kernel.prepare is not None:
                result = _prepare_and_run(call, operands)
            else:
                result = call.kernel.run(*operands, **call.attrs)
        return result if isinstance(result, tuple) else (result,)


def _fetch(operand: Operand, env: dict[str, Any]) -> Any:
    if isinstance(operand, Value):
        return env[operand.name]
    return None if operand is None else [env[v.name] for v in operand]


def _prepare_and_run(call: _Call, operands: list[Any]) -> Any:
    """A kernel with ``prepare`` on a node whose weights are no weights: prepared anew each time."""
    names = [o.name for o in op.get(call.node.op).operands]
    packed = [x if name in call.kernel.weights else None for name, x in zip(names, operands, strict=True)]
    rest = [x for name, x in zip(names, operands, strict=True) if name not in call.kernel.weights]
    assert call.kernel.prepare is not None
    return call.kernel.run(call.kernel.prepare(*packed, **call.attrs), *rest, **call.attrs)


def _needed(graph: Graph, resolved: list[Resolved]) -> tuple[list[Resolved], list[frozenset[int]]]:
    """The nodes that a run needs, and what each has packed: a view of a weight that only ``prepare`` saw is gone."""
    used = {v.name for _, v in graph.outputs}
    kept: list[tuple[Resolved, frozenset[int]]] = []
    for item in reversed(resolved):
        if any(v.name in used for v in item.node.outputs):
            gone = _packed(item)
            rest = (x for i, x in enumerate(item.node.inputs) if i not in gone)
            used.update(v.name for v in operand_values(rest))
            kept.append((item, gone))
    kept.reverse()
    return [item for item, _ in kept], [gone for _, gone in kept]


def _packed(item: Resolved) -> frozenset[int]:
    """Positions of the operands that ``prepare`` consumes at load: its weights, if all of them are weights."""
    if item.kernel.prepare is None:
        return frozenset()
    names = [o.name for o in op.get(item.node.op).operands]
    places = frozenset(i for i, name in enumerate(names) if name in item.kernel.weights)
    values = [v for i in places for v in operand_values([item.node.inputs[i]])]
    return places if all(v.rate == Rate.WEIGHTS for v in values) else frozenset()


def _call(item: Resolved, packed: frozenset[int], dead: tuple[str, ...]) -> _Call:
    node = item.node
    key: tuple[Any, ...] | None = None
    if packed:
        names = tuple(tuple(v.name for v in operand_values([node.inputs[i]])) for i in sorted(packed))
        key = (node.op, node.attrs, id(item.kernel), names)
    operands = tuple(x for i, x in enumerate(node.inputs) if i not in packed)
    outputs = tuple(v.name for v in node.outputs)
    attrs = dict(node.attrs)
    return _Call(node, item.kernel, attrs, packed, key, operands, outputs, dead, item.how == "constant")


class _Loader:
    """Reads each weight when it is first needed, and lets go of it after its last ``prepare`` unless a run needs it."""

    def __init__(self, program: KernelProgram, source: WeightReader) -> None:
        self._source = source
        self._types = program.weight_inputs()
        self._device = program.backend.device
        self._placed: dict[str, Tensor] = {}
        self._program = program
        graphs = program.plan.graphs.values()
        self._made = {v.name: n for g in graphs for n in g.nodes for v in n.outputs if v.rate == Rate.WEIGHTS}
        calls = [call for sequence in program._sequences.values() for call in sequence.calls]
        self.kept = {v.name for call in calls for v in operand_values(call.operands) if v.name in self._types}
        outputs = (v for sequence in program._sequences.values() for _, v in sequence.graph.outputs)
        self.kept |= {v.name for v in outputs if v.name in self._types}
        keys: dict[tuple[Any, ...], _Call] = {call.key: call for call in calls if call.key is not None}
        self._waiting = collections.Counter(itertools.chain(*(_packed_names(call) for call in keys.values())))

    def get(self, name: str) -> Tensor:
        if name in self._program.weights:
            return self._program.weights[name]
        if name in self._made:
            return self._compute(name)
        if name not in self._placed:
            self._placed[name] = self._program.place(self._source.read(name), self._types[name])
        return self._placed[name]

    def _compute(self, name: str) -> Tensor:
        """A view or cast of a weight, which no phase holds because each step would rather make it again."""
        node = self._made[name]
        with torch.no_grad():
            result = op.get(node.op).fn(*(self.operand(x) for x in node.inputs), **node.attributes)
        results = result if isinstance(result, tuple) else (result,)
        return typing.cast(Tensor, results[[v.name for v in node.outputs].index(name)].to(self._device))

    def operand(self, operand: Operand) -> Any:
        if isinstance(operand, Value):
            return self.get(operand.name)
        return None if operand is None else [self.get(v.name) for v in operand]

    def release(self, call: _Call) -> None:
        for name in _packed_names(call):
            self._waiting[name] -= 1
            if not self._waiting[name] and name not in self.kept:
                self._placed.pop(name, None)

    def finish(self) -> dict[str, Tensor]:
        """All weights that runs need as they are."""
        return {name: self.get(name) for name in sorted(self.kept)}


def _packed_names(call: _Call) -> Iterator[str]:
    return (v.name for i in sorted(call.packed) for v in operand_values([call.node.inputs[i]]))
