"""A graph as the pieces that are run one after another: sessions, and between them the nodes that no session takes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from helios import op
from helios.graph import Graph, Node, Operand, Value

__all__ = ["Piece", "in_pieces", "run_bodies"]


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive nodes of a graph.

    Attributes:
        graph: they alone: what they read of others are its inputs, what others read of them its outputs, all by the
            names of the values.
        native: whether a session runs them; otherwise the bodies of their ops do.
    """

    graph: Graph
    native: bool


def in_pieces(graph: Graph, native: Callable[[Node], bool]) -> list[Piece]:
    """The graph cut where ``native`` changes; of a graph that is native throughout, one piece. Constants go with
    either side."""
    last: dict[str, int] = {value.name: len(graph.nodes) for _, value in graph.outputs}
    for at, node in enumerate(graph.nodes):
        for value in node.values:
            last[value.name] = max(at, last.get(value.name, 0))
    pieces: list[Piece] = []
    start = 0
    for kind, group in itertools.groupby(_kinds(graph, native)):
        stop = start + len(list(group))
        pieces.append(Piece(_part(f"{graph.name}.{len(pieces)}", graph.nodes[start:stop], stop, last), kind))
        start = stop
    return pieces


def _kinds(graph: Graph, native: Callable[[Node], bool]) -> Iterator[bool]:
    kind = next((native(node) for node in graph.nodes if node.inputs), True)
    for node in graph.nodes:
        kind = native(node) if node.inputs else kind
        yield kind


def _part(name: str, nodes: tuple[Node, ...], stop: int, last: dict[str, int]) -> Graph:
    made = {value.name for node in nodes for value in node.outputs}
    inputs = {value.name: value for node in nodes for value in node.values if value.name not in made}
    outputs = {v.name: v for node in nodes for v in node.outputs if last.get(v.name, -1) >= stop}
    return Graph(name, tuple(inputs.values()), nodes, tuple(outputs.items()))


def run_bodies(graph: Graph, given: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The outputs of a piece by the bodies of its ops."""
    env = dict(given)

    def fetch(operand: Operand) -> Tensor | list[Tensor] | None:
        if isinstance(operand, Value):
            return env[operand.name]
        return None if operand is None else [env[value.name] for value in operand]

    with torch.no_grad():
        for node in graph.nodes:
            result = op.get(node.op).fn(*map(fetch, node.inputs), **node.attributes)
            results = result if isinstance(result, tuple) else (result,)
            env |= {v.name: t.to(device) for v, t in zip(node.outputs, results, strict=True)}
    return {name: env[name] for name, _ in graph.outputs}
