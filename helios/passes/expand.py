"""Write fused ops out as their compositions, so that what is left are core ops and what a backend asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from helios import op
from helios.graph import Builder, Graph, Node, Operand, Value

__all__ = ["expand"]


def expand(graph: Graph, keep: Callable[[Node], bool] = lambda node: False) -> tuple[Graph, bool]:
    """The graph with every fused op replaced by its composition; and whether there was one.

    Args:
        graph: of any ops. Values are numbered anew, and an output of a composition may turn out to change more slowly
            than the fused op could say.
        keep: whether a fused node stays as it is.
    """
    changed = False
    while any(_wanted(node, keep) for node in graph.nodes):
        graph, changed = _once(graph, keep), True
    return graph, changed


def _wanted(node: Node, keep: Callable[[Node], bool]) -> bool:
    return op.get(node.op).kind == "fused" and not keep(node)


def _once(graph: Graph, keep: Callable[[Node], bool]) -> Graph:
    """Record the graph again, running the bodies of fused ops; they may call fused ops in turn."""
    with Builder(graph.name) as build:
        known = {v.name: build.input(v.name, v.shape, v.dtype, v.rate) for v in graph.inputs}
        for node in graph.nodes:
            values = _composed(node, known) if _wanted(node, keep) else _same(node, known, build)
            known.update(zip((v.name for v in node.outputs), values, strict=True))
        for name, value in graph.outputs:
            build.output(name, known[value.name])
    result = build.graph()
    op.verify(result)
    return result


def _same(node: Node, known: Mapping[str, Value], build: Builder) -> tuple[Value, ...]:
    renamed = node.renamed(known)
    return build.append(node.op, renamed.inputs, node.attributes, [v.type for v in node.outputs])


def _composed(node: Node, known: Mapping[str, Value]) -> tuple[Value, ...]:
    result: Any = op.get(node.op).fn(*_operands(node.renamed(known).inputs), **node.attributes)
    return result if isinstance(result, tuple) else (result,)


def _operands(inputs: tuple[Operand, ...]) -> Iterator[Any]:
    """As the body takes them: a list for an operand of many tensors."""
    return (list(x) if isinstance(x, tuple) else x for x in inputs)
