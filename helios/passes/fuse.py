"""Rewrite consecutive nodes to the fused ops that a backend wants.

A fused op's body is its composition, so the pattern is never written down a second time: it is the trace of the body.
It matches where that trace stands as consecutive nodes, operand for operand and attribute for attribute. The check is
exact: the body is traced again on the operands of the match, and must give the very nodes that it would replace.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from helios import op
from helios.errors import OpError
from helios.graph import Attr, Builder, Graph, Node, Operand, Rate, TensorType, Value, operand_values

__all__ = ["fuse"]

Accept = Callable[[Node], str | None]


def fuse(graph: Graph, fusions: Sequence[str], accept: Accept = lambda node: None) -> tuple[Graph, bool]:
    """Replace each composition of a listed fused op by one node.

    Args:
        graph: of core ops.
        fusions: names of fused ops; at each place the longest composition wins.
        accept: ``None`` for a node that may stand, or the reason why not; a refused one stays unfused.
    """
    templates = sorted((t for name in fusions for t in _templates(name)), key=lambda t: -len(t.nodes))
    last_use = _last_uses(graph)
    nodes: list[Node] = []
    at = 0
    while at < len(graph.nodes):
        for template in templates:
            window = graph.nodes[at : at + len(template.nodes)]
            fused = _match(template, window, last_use, at)
            if fused is not None and accept(fused) is None:
                nodes.append(fused)
                at += len(window)
                break
        else:
            nodes.append(graph.nodes[at])
            at += 1
    result = Graph(graph.name, graph.inputs, tuple(nodes), graph.outputs)
    op.verify(result)
    return result, len(nodes) != len(graph.nodes)


@dataclasses.dataclass(frozen=True)
class _Template:
    """One shape of a composition: with or without an optional operand, for instance."""

    op: str
    operands: tuple[Operand, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]


@functools.cache
def _templates(name: str) -> tuple[_Template, ...]:
    """The distinct compositions that the samples of a fused op give."""
    record = op.get(name)
    found: dict[str, _Template] = {}
    for sample in record.samples():
        if sample.big:
            continue
        types = [_sample_type(x) for x in sample.inputs]
        template = _trace(name, types, op._freeze(dict(record.attrs)) | dict(sample.attrs))
        shape = " ".join(n.op for n in template.nodes) + str([x is None for x in template.operands])
        found.setdefault(shape, template)
    return tuple(found.values())


def _sample_type(arg: op.ArgLike) -> TensorType | None:
    assert not isinstance(arg, tuple), "fused ops take no lists"
    return None if arg is None else TensorType(arg.shape, arg.dtype or torch.bfloat16)


def _trace(name: str, types: Sequence[TensorType | None], attrs: dict[str, Attr]) -> _Template:
    """The composition over inputs of these types, as values ``a0, a1, …`` and nodes."""
    with Builder(name) as build:
        operands = tuple(
            None if t is None else build.input(f"a{i}", t.shape, t.dtype, Rate.STEP) for i, t in enumerate(types)
        )
        result = op.get(name).fn(*operands, **attrs)
    outputs = result if isinstance(result, tuple) else (result,)
    return _Template(name, operands, build.graph().nodes, outputs)


def _last_uses(graph: Graph) -> dict[str, int]:
    """Position of the last node that reads each value; outputs of the graph are read beyond the end."""
    uses = {value.name: at for at, node in enumerate(graph.nodes) for value in node.values}
    return uses | {value.name: len(graph.nodes) for _, value in graph.outputs}


def _match(template: _Template, window: Sequence[Node], last_use: dict[str, int], at: int) -> Node | None:
    """The fused node that may stand for these nodes, or None."""
    if [n.op for n in window] != [n.op for n in template.nodes]:
        return None
    bound = _bind(template, window)
    if bound is None:
        return None
    operands = tuple(None if x is None else bound[x.name] for x in template.operands)  # type: ignore[union-attr]
    outputs = tuple(bound[v.name] for v in template.outputs)
    inner = {v.name for n in window for v in n.outputs} - {v.name for v in outputs}
    if any(last_use.get(name, -1) >= at + len(window) for name in inner):
        return None
    attrs = _attributes(template.op, window)
    fused = Node(template.op, operands, tuple(sorted(attrs.items())), outputs)
    return fused if _gives(fused, window) else None


def _bind(template: _Template, window: Sequence[Node]) -> dict[str, Value] | None:
    """Which value of the window each value of the template stands for."""
    bound: dict[str, Value] = {}
    for pattern, node in zip(template.nodes, window, strict=True):
        for want, have in zip(_slots(pattern), _slots(node), strict=False):
            if (want is None) != (have is None):
                return None
            if want is not None and have is not None and bound.setdefault(want.name, have) != have:
                return None
    return bound


def _slots(node: Node) -> Iterator[Value | None]:
    for operand in node.inputs:
        if operand is None:
            yield None
        else:
            yield from operand_values([operand])
    yield from node.outputs


def _attributes(name: str, window: Sequence[Node]) -> dict[str, Attr]:
    """The fused op's attributes, each read off the nodes that have one of that name, else its default."""
    attrs = dict(op.get(name).attrs)
    for node in window:
        attrs.update((key, value) for key, value in node.attrs if key in attrs)
    return attrs


def _gives(fused: Node, window: Sequence[Node]) -> bool:
    """Whether the body, traced on the match's own operand types and attributes, gives the window's very nodes."""
    types = tuple(None if x is None else x.type for x in fused.inputs)  # type: ignore[union-attr]
    try:
        again = _traced(fused.op, types, fused.attrs)
    except OpError:
        return False
    if [(n.op, n.attrs) for n in again.nodes] != [(n.op, n.attrs) for n in window]:
        return False
    bound = _bind(again, window)
    if bound is None:
        return False
    operands = tuple(None if x is None else bound[x.name] for x in again.operands)  # type: ignore[union-attr]
    return operands == fused.inputs and tuple(bound[v.name] for v in again.outputs) == fused.outputs


@functools.lru_cache(maxsize=4096)
def _traced(name: str, types: tuple[TensorType | None, ...], attrs: tuple[tuple[str, Attr], ...]) -> _Template:
    return _trace(name, types, dict(attrs))
