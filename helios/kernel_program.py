"""Programs of single kernels: one call a node, weights packed at load where a kernel asks for it."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from helios import op
from helios.backend import Backend, Kernel
from helios.graph import Graph, Node, Operand, Rate, Value, operand_values
from helios.passes import Plan
from helios.program import EMPTY, Context, Coverage, Program, WeightReader

__all__ = ["KernelProgram", "Resolved"]


@dataclasses.dataclass(frozen=True, slots=True)
class Resolved:
    """A node with the kernel that runs it; ``how`` is native, fused, fallback or constant."""

    node: Node
    kernel: Kernel
    how: str


class KernelProgram(Program):
    """One kernel a node. Values are freed after their last use."""

    def __init__(
        self, plan: Plan, backend: Backend, resolved: Mapping[str, list[Resolved]], coverage: Coverage
    ) -> None:
        super().__init__(plan, backend, coverage)
        self._handles: MutableMapping[Any, Any] = {}  # by what was packed; see _call
        self._makers = {v.name: item for items in resolved.values() for item in items for v in item.node.outputs}
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
                results = _execute(call, env, handles, self.device)
                for name, tensor in zip(call.outputs, results, strict=True):
                    env[name] = tensor
                for name in call.dead:
                    del env[name]
                if clock is not None:
                    clock.lap(call.node)
        return {name: env[value.name] for name, value in self.graph.outputs}


def _execute(call: _Call, env: dict[str, Any], handles: Mapping[Any, Any], device: torch.device) -> tuple[Tensor, ...]:
    if call.constant:
        result = call.kernel.run(**call.attrs).to(device)
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
        key = (node.op, node.attrs, item.kernel.prepare, names)
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
        calls = [call for sequence in program._sequences.values() for call in sequence.calls]
        self.kept = {v.name for call in calls for v in operand_values(call.operands) if v.name in self._types}
        outputs = (v for sequence in program._sequences.values() for _, v in sequence.graph.outputs)
        self.kept |= {v.name for v in outputs if v.name in self._types}
        keys: dict[tuple[Any, ...], _Call] = {call.key: call for call in calls if call.key is not None}
        self._waiting = collections.Counter(itertools.chain(*(_packed_names(call) for call in keys.values())))

    def get(self, name: str) -> Tensor:
        if name in self._program.weights:
            return self._program.weights[name]
        if name in self._program._makers:
            return self._compute(name)
        if name not in self._placed:
            self._placed[name] = self._program.place(self._source.read(name), self._types[name])
        return self._placed[name]

    def _compute(self, name: str) -> Tensor:
        """A view or cast of a weight, which no phase holds because each step would rather make it again."""
        call = _call(self._program._makers[name], frozenset(), ())
        env = {v.name: self.get(v.name) for v in call.node.values}
        with torch.no_grad():
            return _execute(call, env, {}, self._device)[call.outputs.index(name)]

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
