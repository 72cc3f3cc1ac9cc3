"""Drop what no output needs."""

from __future__ import annotations

from helios import op
from helios.graph import Graph

__all__ = ["prune"]


def prune(graph: Graph) -> tuple[Graph, bool]:
    """The graph without nodes and inputs that no output needs; and whether that changed it."""
    needed = {value.name for _, value in graph.outputs}
    kept = []
    for node in reversed(graph.nodes):
        if any(value.name in needed for value in node.outputs):
            kept.append(node)
            needed.update(value.name for value in node.values)
    inputs = tuple(value for value in graph.inputs if value.name in needed)
    result = Graph(graph.name, inputs, tuple(reversed(kept)), graph.outputs)
    op.verify(result)
    return result, result != graph
