"""Golden inputs and outputs of whole graphs, made on the spot: nothing is stored but the root that keys the draws.

A *scene* is a program and what is asked of it, call by call. The oracle answers each call in float64, and a later call
may be made of its answer: so a trajectory comes about. What a device is then given are those same inputs (*teacher
forcing*): an error of one call never reaches the next, and each call can be judged by itself.

The oracle walks over the graphs as they are written, op body by op body. It knows no fusion, no phases, no contexts and
no cache; whatever goes wrong there on the way to a device is not wrong here too.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Generator, Hashable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from helios import op
from helios.errors import InputError
from helios.graph import Graph, Node, Operand, Rate, Value
from helios.passes import quantize
from helios.precision import DTYPES, PRECISIONS
from helios.program import WeightReader
from helios_conformance.draws import Root, bits

__all__ = [
    "Call",
    "Calls",
    "Golden",
    "InPrecision",
    "Interpreter",
    "Scene",
    "calls_of",
    "golden",
    "reference",
    "rounded",
    "working",
]

Tensors: TypeAlias = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One step of one entry.

    Attributes:
        name: begins the names of its outputs, ``name.output``; unique in its scene.
        entry: of the program.
        inputs: at rate step, by name, host. Rounded already, so that every precision of the graph sees the same
            numbers.
        bound: inputs of slower rates by the name of the context that holds them. A name stands for the same
            tensors in every call, and the program binds it once.
    """

    name: str
    entry: str
    inputs: Tensors
    bound: Mapping[str, Tensors] = dataclasses.field(default_factory=dict)


Calls: TypeAlias = Generator[Call, Tensors, None]
"""Yields calls, and is sent the oracle's outputs of each."""


class Scene(Hashable, Protocol):
    """A program and what is asked of it: a frozen dataclass, so that equal scenes have one golden run."""

    @property
    def forced(self) -> bool:
        """Whether later calls are made of the oracle's answers to earlier ones."""
        ...

    def dtype(self, precision: str) -> torch.dtype:
        """Of the graphs' arithmetic in a precision to certify."""
        ...

    def graphs(self, dtype: torch.dtype) -> Mapping[str, Graph]:
        """Entries by name, in any dtype: the working one, or float64."""
        ...

    def weights(self, dtype: torch.dtype) -> WeightReader:
        """Rounded to the working dtype."""
        ...

    def calls(self, root: Root, dtype: torch.dtype) -> Calls:
        """All calls, with inputs rounded for the working dtype."""
        ...


class InPrecision:
    """Of scenes whose arithmetic is that of the precision itself."""

    def dtype(self, precision: str) -> torch.dtype:
        return DTYPES[precision]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """The calls of a scene, and the oracle's outputs by ``call.output`` in float64."""

    calls: tuple[Call, ...]
    outputs: Tensors


class Interpreter:
    """Runs graphs as they are written, node by node, on the host.

    Args:
        graphs: entries by name.
        weights: read when a graph first needs them and held as they come; a wider graph widens them node by node, so
            that 14B of width in float64 take the memory of the working dtype.
    """

    def __init__(self, graphs: Mapping[str, Graph], weights: WeightReader) -> None:
        self.graphs, self._source = graphs, weights
        self._held: dict[str, Tensor] = {}

    def run(self, call: Call) -> dict[str, Tensor]:
        """The outputs of a call by name. Raises InputError where its inputs are not those of the graph."""
        graph = self.graphs[call.entry]
        given = {**call.inputs, **{name: t for inputs in call.bound.values() for name, t in inputs.items()}}
        env: dict[str, Tensor] = {}
        for value in graph.inputs:
            if value.rate != Rate.WEIGHTS:
                env[value.name] = _placed(given[value.name], value)
        weights = {v.name: v for v in graph.inputs if v.rate == Rate.WEIGHTS}
        with torch.no_grad():
            self._walk(graph, env, weights)
        return {name: env[value.name] for name, value in graph.outputs}

    def _walk(self, graph: Graph, env: dict[str, Tensor], weights: Mapping[str, Value]) -> None:
        left = collections.Counter(v.name for node in graph.nodes for v in node.values)
        left.update(v.name for _, v in graph.outputs)

        def fetch(operand: Operand) -> Any:
            if isinstance(operand, Value):
                return env[operand.name] if operand.name in env else self._weight(weights[operand.name])
            return None if operand is None else [fetch(v) for v in operand]

        for node in graph.nodes:
            env.update(zip((v.name for v in node.outputs), self._compute(node, map(fetch, node.inputs)), strict=True))
            left.subtract(v.name for v in node.values)
            for value in (*node.values, *node.outputs):
                if not left[value.name]:
                    env.pop(value.name, None)

    def _compute(self, node: Node, operands: Iterable[Any]) -> Iterable[Tensor]:
        """The outputs of one node."""
        result = op.get(node.op).fn(*operands, **node.attributes)
        return result if isinstance(result, tuple) else (result,)

    def _weight(self, value: Value) -> Tensor:
        if value.name not in self._held:
            self._held[value.name] = self._source.read(value.name)
        return _placed(self._held[value.name], value)


class RoundingInterpreter(Interpreter):
    """As its base, every node in float64 and its outputs rounded once to what the graph declares."""

    def _compute(self, node: Node, operands: Iterable[Any]) -> Iterable[Tensor]:
        results = super()._compute(node, map(_widened, operands))
        return [x.to(v.type.dtype) for x, v in zip(results, node.outputs, strict=True)]


class DrawnInterpreter(RoundingInterpreter):
    """As its base, with other errors of rounding for every key: each result is moved by up to one more unit roundoff of
    itself before it is rounded. In float32 the operands of what computes are moved as well, since there sums are
    rounded in the dtype of the result: a sum in any order is the exact one of terms that are off by some u.

    Numbers of 8 bits stay: what they are made of has moved already, and the largest would become infinite.

    Args:
        key: 128 bits; of each number that is moved they and a count draw by how much.
    """

    def __init__(self, graphs: Mapping[str, Graph], weights: WeightReader, key: int) -> None:
        super().__init__(graphs, weights)
        self._key = key

    def _compute(self, node: Node, operands: Iterable[Any]) -> Iterable[Tensor]:
        given = map(_widened, operands)
        if op.get(node.op).kind == "move":
            return super()._compute(node, given)
        if node.outputs[0].type.dtype == torch.float32:
            given = map(self._off, given, node.inputs)
        results = Interpreter._compute(self, node, given)
        moved = [x if _fixed(v) else self._moved(x, v.dtype) for x, v in zip(results, node.outputs, strict=True)]
        return [x.to(v.type.dtype) for x, v in zip(moved, node.outputs, strict=True)]

    def _off(self, tensor: Any, operand: Operand) -> Any:
        """An operand, moved unless it is a weight: one factor of each product is enough."""
        if not isinstance(operand, Value) or _fixed(operand) or operand.rate == Rate.WEIGHTS:
            return tensor
        return self._moved(tensor, torch.float32)

    def _moved(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        self._key += 1
        off = torch.from_numpy(bits(self._key, tensor.numel()).astype(np.float64)).reshape(tensor.shape)
        return tensor * (1.0 + torch.finfo(dtype).eps / 2 * (off / 2**15 - 1.0))


def _fixed(value: Value) -> bool:
    return not value.dtype.is_floating_point or value.dtype.itemsize == 1


def _widened(operand: Any) -> Any:
    if isinstance(operand, list):
        return [_widened(x) for x in operand]
    return operand.double() if isinstance(operand, Tensor) and operand.is_floating_point() else operand


def _placed(tensor: Tensor, value: Value) -> Tensor:
    if tuple(tensor.shape) != value.shape:
        raise InputError(f"{value.name!r} has shape {list(tensor.shape)}, the graph takes {list(value.shape)}")
    return tensor.to(value.dtype)


def golden(scene: Scene, root: Root, dtype: torch.dtype) -> Golden:
    """The oracle's run of a scene whose inputs are rounded for that dtype. The newest few are remembered."""
    return _golden(scene, root, dtype)


@functools.lru_cache(maxsize=8)
def _golden(scene: Scene, root: Root, dtype: torch.dtype) -> Golden:
    interpreter = Interpreter(scene.graphs(torch.float64), scene.weights(dtype))
    made: list[Call] = []
    outputs: dict[str, Tensor] = {}
    script = scene.calls(root, dtype)
    answer: Tensors | None = None
    while True:
        try:
            call = script.send(answer)  # type: ignore[arg-type]  # the first send of a generator is None
        except StopIteration:
            return Golden(tuple(made), outputs)
        answer = interpreter.run(call)
        made.append(call)
        outputs.update((f"{call.name}.{name}", tensor) for name, tensor in answer.items())


def calls_of(scene: Scene, root: Root, dtype: torch.dtype) -> tuple[Call, ...]:
    """The calls alone: without the oracle, where no call is made of its answers."""
    return golden(scene, root, dtype).calls if scene.forced else tuple(scene.calls(root, dtype))


def working(scene: Scene, precision: str) -> dict[str, Graph]:
    """The graphs that a device runs, by entry: in the working dtype, and quantised where the precision is."""
    graphs = scene.graphs(scene.dtype(precision))
    return {name: quantize(graph, PRECISIONS[precision])[0] for name, graph in graphs.items()}


def reference(scene: Scene, root: Root, precision: str) -> dict[str, Tensor]:
    """What the op bodies give in a precision, by ``call.output``: as ``ReferenceBackend`` does."""
    dtype = scene.dtype(precision)
    return _outputs(Interpreter(working(scene, precision), scene.weights(dtype)), scene, root, dtype)


def rounded(scene: Scene, root: Root, precision: str, draw: int | None = None) -> dict[str, Tensor]:
    """What exact operations give whose results are rounded to what a precision's graphs declare, by ``call.output``.

    The same on every host, but for the order of sums in float64: no arithmetic of the working dtype is in it.

    Args:
        draw: a number for each of as many independent sets of rounding errors as are wanted; None for those of rounding
            to nearest alone.
    """
    dtype = scene.dtype(precision)
    told = working(scene, precision), scene.weights(dtype)
    if draw is None:
        return _outputs(RoundingInterpreter(*told), scene, root, dtype)
    return _outputs(DrawnInterpreter(*told, root.key("rounding errors", draw)), scene, root, dtype)


def _outputs(interpreter: Interpreter, scene: Scene, root: Root, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        f"{call.name}.{name}": tensor
        for call in calls_of(scene, root, dtype)
        for name, tensor in interpreter.run(call).items()
    }
