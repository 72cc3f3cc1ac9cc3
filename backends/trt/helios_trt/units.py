"""Which graphs of a plan become one engine, and which weights are built into it.

A pyramid has three stages: the same network at three sizes, so three step graphs that read the same weights. Three
engines with the weights built in would hold them three times. There are two ways to hold them once:

- ``profiles``: one engine for the three graphs, unified into one whose sizes are open, with an optimisation profile of
  exact sizes for each. The weights are built in; TensorRT lays them out as its kernels want them.
- ``inputs``: an engine for each graph, exact in its sizes, with the weights as inputs that lie on the device once.
  What a convolution multiplies with and adds is built in all the same, since convolutions want constants.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

from helios.errors import GraphError
from helios.graph import Graph, Node, Rate, Value, operand_values
from helios.passes import Plan, prune
from helios_trt.kinds import CONVOLUTIONS

# Named where it is called: helios.export needs onnx, which the class of the backend does not.

__all__ = ["Unit", "units_of", "without_constants"]


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """Graphs that share an engine.

    Attributes:
        name: of the first graph.
        graphs: of exact sizes; each has a profile of its own, in this order. All have inputs and outputs of the same
            number and meaning, position by position.
        baked: names of the inputs that are built in: weights, called the same in all graphs.
    """

    name: str
    graphs: tuple[Graph, ...]
    baked: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the graphs and over what is built in."""
        parts = [*(graph.digest for graph in self.graphs), *self.baked]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def inputs(self, graph: Graph) -> tuple[Value, ...]:
        """What the engine is given for one of the graphs, in its order."""
        return tuple(value for value in graph.inputs if value.name not in self.baked)

    @property
    def weight_bytes(self) -> int:
        """Of what is built in."""
        return sum(v.type.nbytes for v in self.graphs[0].inputs if v.name in self.baked)

    @property
    def plain_bytes(self) -> int:
        """Of the constants that the graphs have beside that, at most: each is in the engine, too."""
        return sum(v.type.nbytes for node in self.graphs[-1].nodes if not node.inputs for v in node.outputs)


def without_constants(graph: Graph) -> tuple[Graph, Graph]:
    """The graph without outputs that depend on no input, and a graph of these alone: those the host computes once.

    An engine whose output is a constant would be asked for nothing but to hand it out.
    """
    fed = {v.name for v in graph.inputs}
    for node in graph.nodes:
        if any(v.name in fed for v in node.values):
            fed.update(v.name for v in node.outputs)
    computed = tuple(output for output in graph.outputs if output[1].name in fed)
    constant = tuple(output for output in graph.outputs if output[1].name not in fed)
    rest, _ = prune(dataclasses.replace(graph, outputs=computed))
    alone, _ = prune(dataclasses.replace(graph, inputs=(), outputs=constant, nodes=_unfed(graph, fed)))
    return rest, alone


def _unfed(graph: Graph, fed: set[str]) -> tuple[Node, ...]:
    return tuple(node for node in graph.nodes if node.outputs[0].name not in fed)


def units_of(plan: Plan, weights: Iterable[str], way: str) -> list[Unit]:
    """The engines of a plan: of every graph that has nodes with operands.

    Args:
        weights: names of the plan's weights.
        way: ``profiles`` or ``inputs``.
    """
    known = frozenset(weights)
    phases = {rate.label: graph for rate, graph in plan.phases.items() if _computes(graph)}
    steps = {name: graph for name, graph in plan.steps.items() if _computes(graph)}
    # What the weights phase reads is read once: built in, it would be there twice.
    units = [_unit((graph,), known, way if name != Rate.WEIGHTS.label else "inputs") for name, graph in phases.items()]
    for group in _groups(steps.values(), known) if way == "profiles" else [(graph,) for graph in steps.values()]:
        units.append(_unit(group, known, way))
    return units


def _computes(graph: Graph) -> bool:
    return any(node.inputs for node in graph.nodes)


def _unit(graphs: tuple[Graph, ...], weights: frozenset[str], way: str) -> Unit:
    names = [v.name for v in graphs[0].inputs if v.name in weights]
    if way != "profiles":
        constant = _constant(graphs[0])
        names = [name for name in names if name in constant]
    return Unit(graphs[0].name, graphs, tuple(names))


def _constant(graph: Graph) -> set[str]:
    """Names of all that kernels and biases of convolutions come from."""
    wanted = {v.name for n in graph.nodes if n.op in CONVOLUTIONS for v in operand_values(n.inputs[1:])}
    for node in reversed(graph.nodes):
        if any(value.name in wanted for value in node.outputs):
            wanted.update(value.name for value in node.values)
    return wanted


def _groups(graphs: Iterable[Graph], weights: frozenset[str]) -> list[tuple[Graph, ...]]:
    """Graphs that read the same weights and can be unified; in a group the first keeps its place."""
    from helios.export.dynamic import unify

    found: dict[tuple[str, ...], list[Graph]] = {}
    for graph in graphs:
        read = tuple(v.name for v in graph.inputs if v.name in weights)
        found.setdefault(read or (graph.name,), []).append(graph)
    groups: list[tuple[Graph, ...]] = []
    for group in found.values():
        try:
            if len(group) > 1:
                unify(group)
            groups.append(tuple(group))
        except GraphError:  # not one network at several sizes: an engine for each, and the weights in each
            groups.extend((graph,) for graph in group)
    return groups
