"""The autoencoder: each block by itself on what the oracle gives it, and whole videos group by group."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from helios.backend import PRECISIONS
from helios.graph import Graph, Node, Rate, Value
from helios.model.config import VaeConfig
from helios.model.shapes import vae_shapes
from helios.model.vae import decode_graph, encode_graph, frames_of
from helios.passes import prune
from helios_conformance.draws import Root, normal, uniform
from helios_conformance.golden import Call, Calls, Interpreter
from helios_conformance.scenes.weights import LoudWeights

__all__ = ["VAE", "VaeBlocks", "VaeVideo", "blocks_of"]

VAE = VaeConfig(base_dim=8, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
"""Every kind of block of the published network. With a base of 3 the norm of some positions is near zero, and rounding
shows a thousandfold; from 8 on it does not."""

Half = Literal["decode", "encode"]


@dataclasses.dataclass(frozen=True)
class VaeVideo:
    """A video in groups of latents; each group gets the oracle's frames of the group before it.

    Attributes:
        config: of the network.
        half: of it.
        groups: latents of each.
        height, width: of the video, in pixels.
        batch: videos.
        working: in the precision's own dtype, as some backends decode; otherwise in float32, as published, whatever the
            transformer computes in.
    """

    config: VaeConfig
    half: Half
    groups: tuple[int, ...]
    height: int
    width: int
    batch: int = 1
    working: bool = False

    forced = True

    def dtype(self, precision: str) -> torch.dtype:
        return PRECISIONS[precision] if self.working else torch.float32

    def graph(self, at: int, dtype: torch.dtype) -> Graph:
        size = {"batch": self.batch, "height": self.height, "width": self.width, "dtype": dtype}
        place = {"first": at == 0, "caches": at < len(self.groups) - 1}
        if self.half == "decode":
            return decode_graph(self.config, latents=self.groups[at], **size, **place)
        frames = frames_of(self.config, self.groups[at], first=at == 0)
        return encode_graph(self.config, frames=frames, **size, **place)

    def graphs(self, dtype: torch.dtype) -> Mapping[str, Graph]:
        return {f"group{at}": self.graph(at, dtype) for at in range(len(self.groups))}

    def weights(self, dtype: torch.dtype) -> LoudWeights:
        return LoudWeights(vae_shapes(self.config), "vae weights", dtype)

    def calls(self, root: Root, dtype: torch.dtype) -> Calls:
        caches: dict[str, Tensor] = {}
        for at in range(len(self.groups)):
            out = yield Call(f"group{at}", f"group{at}", {**self.given(root, at, dtype), **caches})
            caches = {name: x.to(dtype) for name, x in out.items() if name.startswith("cache.")}

    def given(self, root: Root, at: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Latents or frames of a group, drawn in what the graph takes."""
        (value,) = (v for v in self.graph(at, dtype).inputs_at(Rate.STEP) if not v.name.startswith("cache."))
        key = root.key("vae", value.name, at)
        if self.half == "decode":
            return {value.name: normal(key, value.shape, value.dtype)}
        return {value.name: uniform(key, value.shape, value.dtype, 2.0, -1.0)}


@dataclasses.dataclass(frozen=True)
class VaeBlocks:
    """Every block of one group by itself: an entry each, whose inputs are what the oracle has there.

    Attributes:
        video: whose group it is.
        at: number of the group; from the second on it has a past.
    """

    video: VaeVideo
    at: int = 0

    forced = False

    def dtype(self, precision: str) -> torch.dtype:
        return self.video.dtype(precision)

    def graphs(self, dtype: torch.dtype) -> Mapping[str, Graph]:
        return {block.name: block for block in blocks_of(self.video.graph(self.at, dtype))}

    def weights(self, dtype: torch.dtype) -> LoudWeights:
        return self.video.weights(dtype)

    def calls(self, root: Root, dtype: torch.dtype) -> Calls:
        values = self._values(root, dtype)
        for block in self.graphs(dtype).values():
            yield Call(block.name, block.name, {v.name: values[v.name].to(dtype) for v in block.inputs_at(Rate.STEP)})

    def _values(self, root: Root, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """What the oracle has at every border between blocks, by the names of the graph."""
        graphs = dict(self.video.graphs(torch.float64))
        whole = graphs[f"group{self.at}"]
        needed = {v.name: v for block in blocks_of(whole) for v in block.inputs_at(Rate.STEP)}
        graphs[f"group{self.at}"] = dataclasses.replace(whole, outputs=tuple(needed.items()))
        interpreter = Interpreter(graphs, self.weights(dtype))
        script = self.video.calls(root, dtype)
        call = next(script)
        for _ in range(self.at):
            call = script.send(interpreter.run(call))
        return interpreter.run(call)


_BLOCK = re.compile(r"(?:encoder\.|decoder\.)?(mid_block\.\w+\.\d+|up_blocks\.\d+\.\w+\.\d+|down_blocks\.\d+|\w+)")


def blocks_of(graph: Graph) -> list[Graph]:
    """The graph in pieces, cut where it begins to read the weights of another block.

    Each is named for its block. What a piece takes from others enters at rate step, under the name that it has in the
    whole graph; what others take from it is its output. Frames kept for the next group are nobody's output.
    """
    pieces: dict[str, list[Node]] = {}
    key = ""
    for node in graph.nodes:
        read = [v.name for v in node.values if v.name in {w.name for w in graph.inputs_at(Rate.WEIGHTS)}]
        if read:
            match = _BLOCK.match(read[0])
            assert match is not None
            key = match[1]
        pieces.setdefault(key or "start", []).append(node)
    return [_piece(graph, name, nodes) for name, nodes in pieces.items()]


def _piece(graph: Graph, name: str, nodes: list[Node]) -> Graph:
    inside = {v.name for node in nodes for v in node.outputs}
    weights = {v.name: v for v in graph.inputs_at(Rate.WEIGHTS)}
    taken = {v.name: v for node in nodes for v in node.values if v.name not in inside}
    inputs = tuple(weights.get(v.name, Value(v.name, v.type, Rate.STEP)) for v in taken.values())
    others = {v.name for node in graph.nodes if node not in nodes for v in node.values}
    others |= {v.name for out, v in graph.outputs if not out.startswith("cache.")}
    given = tuple((v.name, v) for node in nodes for v in node.outputs if v.name in others)
    return prune(Graph(name, inputs, tuple(nodes), given))[0]
