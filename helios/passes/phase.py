"""Split graphs into phases by rate, so that nothing is computed more often than it changes.

A node runs in the slowest phase that can compute it. Its outputs are *held* from there for the faster phases, unless
holding would cost memory and save nothing: data movement straight from inputs (a cast or a view of a weight) and
broadcasts run again where they are needed. So does the widening of a quantised weight: held wide, it would have been
quantised for nothing.

Values that cross a phase border are named by what they are: a hash over op, attributes and inputs. So the same text
keys in the graphs of three pyramid stages are one value, computed once and held once for all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

from helios import op
from helios.errors import GraphError
from helios.graph import Graph, Node, Operand, Rate, Value, format_attr, operand_values

__all__ = ["Plan", "build_plan"]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What a backend compiles: the phases that all entries share, and one step graph an entry.

    Args:
        phases: graphs at rate weights, prompt and chunk; outputs are the values held for faster phases.
        steps: by entry name; inputs are the entry's step inputs, and held values and inputs of slower rates.
    """

    phases: Mapping[Rate, Graph]
    steps: Mapping[str, Graph]

    @property
    def graphs(self) -> dict[str, Graph]:
        """All graphs by name, phases first."""
        return {rate.label: graph for rate, graph in self.phases.items()} | dict(self.steps)

    @property
    def digest(self) -> str:
        """SHA-256 over the text of all graphs."""
        return hashlib.sha256("\n".join(str(g) for g in self.graphs.values()).encode()).hexdigest()


def build_plan(graphs: Mapping[str, Graph], *, local_constants: bool = False) -> Plan:
    """Split each graph by rate and merge what they share.

    Args:
        graphs: by entry name. Inputs of one name must have one type in all of them.
        local_constants: compute a node without operands again wherever it is needed, and what only moves its data, and
            hold neither. So a constant whose size depends on an input of a phase stands in that phase.
    """
    shared = {rate: _Phase(rate.label) for rate in (Rate.WEIGHTS, Rate.PROMPT, Rate.CHUNK)}
    steps = {name: _split(name, graph, shared, local_constants) for name, graph in graphs.items()}
    plan = Plan({rate: phase.graph() for rate, phase in shared.items()}, steps)
    for graph in plan.graphs.values():
        op.verify(graph)
    return plan


class _Phase:
    """A graph that grows: nodes and inputs are entered once, by name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: dict[str, Value] = {}
        self.nodes: dict[str, Node] = {}
        self.outputs: dict[str, Value] = {}

    def input(self, value: Value) -> None:
        if self.inputs.setdefault(value.name, value) != value:
            raise GraphError(
                f"%{value.name} is {self.inputs[value.name].type} in one graph and {value.type} in another"
            )

    def graph(self) -> Graph:
        outputs = tuple(self.outputs.items())
        return Graph(self.name, tuple(self.inputs.values()), tuple(self.nodes.values()), outputs)


def _split(name: str, graph: Graph, shared: Mapping[Rate, _Phase], local_constants: bool) -> Graph:
    names = _content_names(graph)
    step = _Phase(name)
    phases = {**shared, Rate.STEP: step}
    made = {value.name: node for node in graph.nodes for value in node.outputs}
    again = _computed_again(graph, local_constants)
    where = _where(graph, again)
    for node in graph.nodes:
        for rate in sorted(where[node.outputs[0].name]):
            _enter(node, rate, phases, names, made, again)
    for output, value in graph.outputs:
        kept = names[value.name]
        if value.name not in made or (made[value.name].outputs[0].name not in again and kept.rate < Rate.STEP):
            _hold(value, Rate.STEP, phases, names, made)
        step.outputs[output] = kept
    return step.graph()


def _enter(
    node: Node,
    rate: Rate,
    phases: Mapping[Rate, _Phase],
    names: Mapping[str, Value],
    made: Mapping[str, Node],
    again: set[str],
) -> None:
    """Put a node into a phase, with what it needs from slower ones."""
    for value in node.values:
        source = made.get(value.name)
        if source is None or (source.outputs[0].name not in again and value.rate < rate):
            _hold(value, rate, phases, names, made)
    renamed = node.renamed(names)
    phases[rate].nodes.setdefault(renamed.outputs[0].name, renamed)


def _hold(
    value: Value, rate: Rate, phases: Mapping[Rate, _Phase], names: Mapping[str, Value], made: Mapping[str, Node]
) -> None:
    """Make a slower value, or an input, an input of the phase at ``rate``."""
    kept = names[value.name]
    phases[rate].input(kept)
    if value.name in made:
        phases[value.rate].outputs.setdefault(kept.name, kept)


def _where(graph: Graph, again: set[str]) -> dict[str, set[Rate]]:
    """Phases in which each node runs, by the name of its first output; nowhere if nobody needs it."""
    needed: dict[str, set[Rate]] = {value.name: {Rate.STEP} for _, value in graph.outputs}
    where: dict[str, set[Rate]] = {}
    for node in reversed(graph.nodes):
        rates = set().union(*(needed.get(v.name, set()) for v in node.outputs))
        first = node.outputs[0]
        if rates and first.name not in again:
            rates = {first.rate}
        where[first.name] = rates
        for value in node.values:
            needed.setdefault(value.name, set()).update(rates)
    return where


_WIDENS = "dequantize_rows"


def _computed_again(graph: Graph, local_constants: bool) -> set[str]:
    """First outputs of nodes that are cheaper to run again than to hold."""
    inputs = {v.name for v in graph.inputs}
    again: set[str] = set()
    for node in graph.nodes:
        if local_constants and not node.values:
            again.add(node.outputs[0].name)
            inputs.update(v.name for v in node.outputs)
            continue
        cheap = op.get(node.op).kind == "move" or node.op == _WIDENS
        if not cheap or not node.values or node.outputs[0].rate == Rate.STEP:
            continue
        from_inputs = all(v.name in inputs for v in node.values)
        grows = sum(v.type.nbytes for v in node.outputs) > sum(v.type.nbytes for v in node.values)
        if from_inputs or grows:
            again.add(node.outputs[0].name)
            inputs.update(v.name for v in node.outputs if from_inputs)
    return again


def _content_names(graph: Graph) -> dict[str, Value]:
    """Each value under its new name: inputs and step values keep theirs, slower ones are named by content."""
    digests = {v.name: _digest("input", v.name, str(v.type), v.rate.label) for v in graph.inputs}
    names = {v.name: v for v in graph.inputs}
    for node in graph.nodes:
        attrs = ",".join(f"{k}={format_attr(v)}" for k, v in node.attrs)
        base = _digest(node.op, attrs, *(_operand_digest(x, digests) for x in node.inputs))
        for i, value in enumerate(node.outputs):
            digests[value.name] = f"{base}.{i}" if i else base
            name = value.name if value.rate == Rate.STEP else f"{value.rate.label}.{digests[value.name]}"
            names[value.name] = dataclasses.replace(value, name=name)
    return names


def _operand_digest(operand: Operand, digests: Mapping[str, str]) -> str:
    return "[" + " ".join(digests[v.name] for v in operand_values([operand])) + "]"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:16]
