"""What two backends are compared on: a graph, and where its tensors come from; as a folder it can be run again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from helios import serialize
from helios.errors import InputError
from helios.graph import Graph, Node, Rate, Value
from helios.media.storage import atomic
from helios.program import EMPTY
from helios_conformance.draws import Root, Weights, normal, uniform
from helios_conformance.session import Session

__all__ = ["Drawn", "Given", "Subject", "node_graph", "run"]

GRAPH, INPUTS, ABOUT = "graph.json", "inputs.safetensors", "about.json"


class Source(Protocol):
    """Where the tensors of a graph's inputs come from, on the host."""

    def read(self, name: str) -> Tensor: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """Tensors by name."""

    tensors: Mapping[str, Tensor]

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


class Drawn:
    """Every input of a graph drawn from a root: weights as ``Weights`` draws them, timesteps in (0, 1000), the rest
    normal, all in the dtype that the graph declares."""

    def __init__(self, graph: Graph, root: Root) -> None:
        self.values = {value.name: value for value in graph.inputs}
        self.root = root
        shapes = {v.name: v.shape for v in graph.inputs_at(Rate.WEIGHTS)}
        self._weights = Weights(shapes, root, "diff", torch.float32)

    def read(self, name: str) -> Tensor:
        value = self.values[name]
        if value.rate == Rate.WEIGHTS:
            return self._weights.read(name).to(value.dtype)
        key = self.root.key("diff", name)
        if name == "timestep":
            return uniform(key, value.shape, torch.float32, 1000.0).to(value.dtype)
        if not value.dtype.is_floating_point:
            return uniform(key, value.shape, torch.float32, 2.0).to(value.dtype)
        return normal(key, value.shape, torch.float32).to(value.dtype)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A graph and its tensors."""

    graph: Graph
    source: Source

    def read(self, name: str) -> Tensor:
        """One input on the host, in the dtype that the graph declares."""
        value = next(v for v in self.graph.inputs if v.name == name)
        return self.source.read(name).to(value.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """All inputs on the host."""
        return {v.name: self.read(v.name) for v in self.graph.inputs}

    def save(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write graph, inputs and what is known about them; ``load`` reads them. Raises StorageError."""
        folder.mkdir(parents=True, exist_ok=True)
        # Views of one another cannot be expressed in the format.
        plain = {name: tensor.detach().contiguous().clone() for name, tensor in self.tensors().items()}
        with atomic(folder / INPUTS) as part:
            safetensors.torch.save_file(plain, part)
        with atomic(folder / ABOUT) as part:
            part.write_text(json.dumps(dict(about), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        serialize.save(folder / GRAPH, {self.graph.name: self.graph})

    @staticmethod
    def load(folder: Path) -> Subject:
        """Read what ``save`` wrote. Raises GraphError for a graph that is none, InputError for inputs that do
        not fit it."""
        saved = serialize.load(folder / GRAPH)
        (graph,) = saved.graphs.values()
        try:
            tensors = safetensors.torch.load_file(folder / INPUTS)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read {folder / INPUTS}: {error}") from error
        for value in graph.inputs:
            came = tensors.get(value.name)
            if came is None or tuple(came.shape) != value.shape or came.dtype != value.dtype:
                raise InputError(f"{folder / INPUTS} holds no {value.type} named {value.name!r}")
        return Subject(graph, Given(tensors))


def node_graph(node: Node, name: str = "main") -> Graph:
    """One node as a graph, over its own operands; outputs ``o0``, ``o1`` …"""
    inputs = {value.name: value for value in node.values}
    rate = max((v.rate for v in inputs.values()), default=Rate.WEIGHTS)
    outputs = tuple(Value(v.name, v.type, rate) for v in node.outputs)
    alone = Node(node.op, node.inputs, node.attrs, outputs)
    return Graph(name, tuple(inputs.values()), (alone,), tuple((f"o{i}", v) for i, v in enumerate(outputs)))


def run(session: Session, subject: Subject) -> dict[str, Tensor]:
    """The graph's outputs by name, on the host: all its phases, then one step."""
    graph = subject.graph
    program = session.lower({graph.name: graph})
    program.load(subject)
    context = EMPTY
    for rate in (Rate.PROMPT, Rate.CHUNK):
        if names := program.input_names(rate):
            context = context | program.bind({name: subject.read(name) for name in names}, context)
    steps = [v.name for v in program.plan.graphs[graph.name].inputs_at(Rate.STEP)]
    out = program.run(graph.name, {name: subject.read(name) for name in steps}, context)
    return {name: session.to_host(tensor).clone() for name, tensor in out.items()}
