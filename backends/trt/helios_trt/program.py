"""The program of the TensorRT backend: engines for graphs, steps captured as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from helios import op
from helios.errors import UnsupportedNode
from helios.graph import Node, Rate
from helios.passes import Plan
from helios.program import Coverage, Program, WeightReader
from helios_cuda import graphs
from helios_cuda.graphs import NotCaptured, Steps
from helios_trt.engine import Engine
from helios_trt.units import Unit, units_of, without_constants

if TYPE_CHECKING:
    from helios_trt.backend import TrtBackend

__all__ = ["TrtProgram"]


class TrtProgram(Program):
    """Each graph by its engine; entries that read a context are captured when the first of them is run, and replayed.

    Attributes:
        units: the engines that it needs.
        eager: why steps are not replayed; empty where they are, or will be.
    """

    def __init__(self, plan: Plan, backend: TrtBackend) -> None:
        super().__init__(plan, backend, _coverage(plan, backend))
        self._trt = backend
        split = {name: without_constants(graph) for name, graph in plan.graphs.items()}
        computed = {name: graph for name, (graph, _) in split.items()}
        self._constant = {name: graph for name, (_, graph) in split.items() if graph.outputs}
        reduced = Plan({r: computed[r.label] for r in plan.phases}, {name: computed[name] for name in plan.steps})
        self.units = units_of(reduced, self.weight_inputs(), backend.chosen["weights"])
        self._at = {graph.name: (unit, i) for unit in self.units for i, graph in enumerate(unit.graphs)}
        self._entries = {name: graph for name, graph in plan.steps.items() if graphs.reads_a_context(graph)}
        self._engines: dict[str, Engine] = {}
        self._arena: Tensor | None = None
        self._steps: Steps | None = None
        self.eager = backend.eager

    def wanted(self, graph: str) -> Iterable[str]:
        unit = self._unit(graph)
        built_in = () if unit is None else unit.baked
        return (v.name for v in self.plan.graphs[graph].inputs if v.name not in built_in)

    def _unit(self, graph: str) -> Unit | None:
        at = self._at.get(self.plan.graphs[graph].name)
        return None if at is None else at[0]

    def load(self, weights: WeightReader) -> None:
        """Open or build the engines, and place the weights that are not built into one. What is built in is read as
        often as it takes to know that the engine on disk is of these weights."""
        self._engines, self._steps, self._arena, self.eager = {}, None, None, self._trt.eager
        with self._trt.explained("the engines"):
            wanted = [(unit, self._trt.engines.ready(unit, weights)) for unit in self.units]
            # All are built before the first is loaded: a build wants the whole device.
            self._engines = {unit.name: self._trt.engines.open(one, weights) for unit, one in wanted}
            self._open()
        outside = {name for graph in self.plan.graphs for name in self.wanted(graph)}
        with self._trt.explained("the weights"):
            inputs = {name: value for name, value in self.weight_inputs().items() if name in outside}
            placed = {name: self.place(weights.read(name), value) for name, value in inputs.items()}
        label = Rate.WEIGHTS.label
        held = self.evaluate(label, {name: placed[name] for name in self.wanted(label)})
        self._ready(placed | held)
        # The base keeps what graphs read; what is built into their engines they do not.
        read = {name for graph in self.plan.graphs if graph != label for name in self.wanted(graph)}
        self.weights = {name: tensor for name, tensor in self.weights.items() if name in read}

    def move(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Aligned once, where it is placed: a weight that is not would be copied at each call."""
        return self._trt.machine.plain(super().move(tensor, dtype))

    def _open(self) -> None:
        """Contexts of all engines in one piece of memory: they run one after another."""
        needed = [engine.workspace for engine in self._engines.values()]
        sizes = [size for sizes in needed if sizes is not None for size in sizes]
        if None not in needed:
            self._arena = self._trt.machine.empty((max([*sizes, 1]),), torch.uint8)
        for engine in self._engines.values():
            engine.open(self._arena)

    def evaluate(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with self._trt.explained(graph):
            if graph in self._entries and not self.eager:
                steps = self._steps or self._capture()
                if steps is not None:
                    return steps.run(graph, inputs)
            return self._eagerly(graph, inputs)

    def _eagerly(self, name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        graph = self.plan.graphs[name]
        made = self._constants(name)
        found = self._at.get(graph.name)
        if found is not None:
            unit, at = found
            computed = unit.graphs[at]
            results = self._engines[unit.name].run(at, [inputs[v.name] for v in unit.inputs(computed)])
            made |= {key: tensor for (key, _), tensor in zip(computed.outputs, results, strict=True)}
        # What is neither is an input that the graph hands on.
        return {key: made[key] if key in made else inputs[value.name] for key, value in graph.outputs}

    def _constants(self, name: str) -> dict[str, Tensor]:
        """Outputs that depend on nothing: by the bodies of ops, on the host, and then placed."""
        graph = self._constant.get(name)
        if graph is None:
            return {}
        known: dict[str, Tensor] = {}
        for node in graph.nodes:
            made = op.get(node.op).fn(*_operands(node, known), **node.attributes)
            known |= zip((v.name for v in node.outputs), made if isinstance(made, tuple) else (made,), strict=True)
        return {key: self.move(known[value.name], value.dtype) for key, value in graph.outputs}

    def _capture(self) -> Steps | None:
        recorder = self._trt.machine.recorder()
        if recorder is None:
            self.eager = "this device captures nothing"
            return None
        try:
            self._steps = graphs.capture(
                recorder, self._entries, self.wanted, self.weights, self._eagerly, self.backend.device
            )
        except NotCaptured as error:
            self.eager = f"not captured: {error}"
            warnings.warn(f"steps are not replayed as CUDA graphs: {error}", RuntimeWarning, stacklevel=2)
        return self._steps

    def capture(self) -> None:
        """Capture all entries now, and not when the first of them is run: for a process that is to answer at once."""
        with self._trt.explained("the graphs of its steps"):
            if self._steps is None and not self.eager and self._entries:
                self._capture()

    def execution(self) -> dict[str, Any]:
        """How steps run, as JSON values."""
        captured = [] if self._steps is None else list(self._steps.names)
        engines = {unit.name: [graph.name for graph in unit.graphs] for unit in self.units}
        arena = 0 if self._arena is None else self._arena.nbytes
        return {"graphs": captured, "eager": self.eager, "engines": engines, "workspace_bytes": arena}


def _operands(node: Node, known: Mapping[str, Tensor]) -> Iterator[Tensor | None | list[Tensor]]:
    for operand in node.inputs:
        if isinstance(operand, tuple):
            yield [known[value.name] for value in operand]
        else:
            yield None if operand is None else known[operand.name]


def _coverage(plan: Plan, backend: TrtBackend) -> Coverage:
    """Every node is in an engine, or nothing runs.

    Raises:
        UnsupportedNode: names op, shapes, dtypes and the reason.
    """
    coverage = Coverage()
    for graph in plan.graphs.values():
        for node in graph.nodes:
            reason = backend.supports(node) if node.inputs else None
            if reason is not None:
                raise UnsupportedNode(
                    f"backend 'trt' cannot run: {node}\n  reason: {reason}",
                    "engines run graphs whole, so nothing can stand in for a node; choose fp32, bf16 or fp16, or cuda",
                )
            if node.inputs:
                coverage.count(node.op, "native")
    return coverage
