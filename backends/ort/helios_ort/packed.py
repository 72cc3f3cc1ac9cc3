"""Weights that are built into sessions: which, and one session for all graphs of one structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from helios.errors import GraphError
from helios.graph import Graph, Rate
from helios_ort.providers import CPU, Provider

if TYPE_CHECKING:
    from helios.export.dynamic import Unified

__all__ = ["Shared", "grouped"]


@dataclasses.dataclass(frozen=True, slots=True)
class Shared:
    """Graphs that one session runs.

    Attributes:
        graphs: of one structure, such as the pyramid stages of a network.
        whole: what the session is made of.
        built_in: names of the weights that are built in: those that all of them read at the same place.
    """

    graphs: tuple[Graph, ...]
    whole: Graph | Unified
    built_in: frozenset[str]


def grouped(graphs: Iterable[Graph], provider: Provider) -> list[Shared]:
    """Graphs that read weights, put together where one session can run several, so that it holds their weights once.

    Sizes are then computed inside the graph. The CPU's provider does that itself; others leave it to the CPU, and a
    node there is what must not be.
    """
    alike: dict[tuple[object, ...], list[Graph]] = {}
    for graph in graphs:
        key = _structure(graph) if provider.name == CPU else (graph.name,)
        alike.setdefault(key, []).append(graph)
    return [shared for group in alike.values() for shared in _together(group)]


def _structure(graph: Graph) -> tuple[object, ...]:
    return (len(graph.outputs), tuple(value.rate for value in graph.inputs), tuple(node.op for node in graph.nodes))


def _together(graphs: Sequence[Graph]) -> list[Shared]:
    from helios.export.dynamic import unify

    if len(graphs) > 1:
        try:
            return [Shared(tuple(graphs), unify(graphs), _common(graphs))]
        except GraphError:  # alike, but not one network at several sizes
            pass
    return [Shared((graph,), graph, _common([graph])) for graph in graphs]


def _common(graphs: Sequence[Graph]) -> frozenset[str]:
    columns = zip(*(graph.inputs for graph in graphs), strict=True)
    same = (column[0] for column in columns if all(value == column[0] for value in column))
    return frozenset(value.name for value in same if value.rate == Rate.WEIGHTS)
