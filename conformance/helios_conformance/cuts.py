"""Where a graph can be cut in two: values that everything behind them depends on alone.

For programs that run whole, and so show no inner value: a prefix ends at such a value, a segment starts from one. In
the transformer these are the residual stream after each branch, so three cuts a block.
"""

from __future__ import annotations

import dataclasses
import re

from helios.graph import Graph, Node, Rate, Value
from helios.passes import prune

__all__ = ["Cut", "block_of", "blocks", "cuts", "prefix", "segment"]

_BLOCK = re.compile(r"(?:^|\.)((?:up_|down_|mid_)?blocks?\.\d+)\.")


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """A value that a graph can be cut at, the position of the node that makes it, and the block that it ends."""

    position: int
    value: Value
    block: str


def cuts(graph: Graph) -> list[Cut]:
    """All cuts in order, seen from the largest input that changes with each step; none where there is no such input.
    The graph's own outputs are not among them."""
    last = {v.name: i for i, node in enumerate(graph.nodes) for v in node.values}
    last |= {v.name: len(graph.nodes) for _, v in graph.outputs}
    own = {v.name for _, v in graph.outputs}
    live, found, block = _origin(graph), [], ""
    for i, node in enumerate(graph.nodes):
        tainted = any(v.name in live for v in node.values)
        if tainted:
            block = _entered(node, block)
            live |= {v.name for v in node.outputs}
        live = {name for name in live if last.get(name, -1) > i}
        value = _made(node, live) if tainted and len(live) == 1 else None
        if value is not None and value.name not in own:
            found.append(Cut(i, value, block))
    return found


def _origin(graph: Graph) -> set[str]:
    steps = graph.inputs_at(Rate.STEP)
    return {max(steps, key=lambda v: v.type.numel).name} if steps else set()


def _entered(node: Node, block: str) -> str:
    """The block after a node: that of its weights, none where its weights belong to none."""
    return block_of(node) if any(v.rate == Rate.WEIGHTS for v in node.values) else block


def blocks(graph: Graph) -> dict[str, str]:
    """The block of each node, by its first output: of its own weights; without any, of the next node on the way of the
    largest input that has some before a cut."""
    reached, on_way = _origin(graph), set()
    for i, node in enumerate(graph.nodes):
        if any(v.name in reached for v in node.values):
            reached |= {v.name for v in node.outputs}
            on_way.add(i)
    ends = {cut.position: cut.block for cut in cuts(graph)}
    named, following = {}, ""
    for i, node in reversed(list(enumerate(graph.nodes))):
        name = block_of(node)
        if i in on_way:
            name = following = _entered(node, ends.get(i, following))
        named[node.outputs[0].name] = name
    return named


def _made(node: Node, live: set[str]) -> Value | None:
    return next((v for v in node.outputs if v.name in live), None)


def block_of(node: Node) -> str:
    """``blocks.3`` where the node reads a weight of that block; empty where it reads none."""
    names = (_BLOCK.search(v.name) for v in node.values if v.rate == Rate.WEIGHTS)
    return next((match[1] for match in names if match), "")


def prefix(graph: Graph, end: Cut) -> Graph:
    """The graph up to a cut; its one output is ``at``."""
    return prune(Graph(graph.name, graph.inputs, graph.nodes[: end.position + 1], (("at", end.value),)))[0]


def segment(graph: Graph, start: Cut | None, end: Cut | None) -> Graph:
    """The graph between two cuts: the value of ``start`` is an input that changes with each step, the value of
    ``end`` is the output ``at``. None stands for the graph's own beginning and its own outputs."""
    nodes = graph.nodes if end is None else graph.nodes[: end.position + 1]
    outputs = graph.outputs if end is None else (("at", end.value),)
    inputs = graph.inputs
    if start is not None:
        nodes = tuple(n for n in nodes if start.value not in n.outputs)
        inputs = (*inputs, start.value)
    return prune(Graph(graph.name, inputs, nodes, outputs))[0]
