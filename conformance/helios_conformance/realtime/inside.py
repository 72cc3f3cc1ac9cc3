"""One block of the network, and what stands before and behind all of them, in float64 on a few rows.

A row of a block depends on all others through keys and values alone. So those of one head are kept whole and everything
else on rows: each of ``JUDGED`` follows from what the device itself gave before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helios import op
from helios.graph import Graph, Node, Rate, Value
from helios.model.config import TransformerConfig
from helios.model.transformer import DenoiseShape, HistoryShape, denoise_graph
from helios.passes import prune, quantize
from helios.pipeline.history import Window
from helios.precision import PRECISIONS
from helios.program import WeightReader
from helios_conformance import budget
from helios_conformance.budget import Errors
from helios_conformance.draws import Root
from helios_conformance.golden import Call, Interpreter
from helios_conformance.realtime import golden

__all__ = ["JUDGED", "ROLES", "Pick", "Remembered", "Rows", "constants", "measure", "reference_errors", "values"]

ROLES = ("first", "before", "keys", "values", "attended", "after", "last", "velocity")
"""Hidden states before the first block, before and after the drawn one and after the last one; what attention takes and
gives in the drawn one; the velocity."""

JUDGED = ("first", "keys", "values", "attended", "after", "velocity")
"""What each is judged from: the drawn inputs; ``before`` (keys, values); ``before`` and the head's keys and values;
``before`` and ``attended``; ``last``."""

_ROWS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Pick:
    """Stage, block and head that are opened, and the root of the inputs."""

    stage: int
    block: int
    head: int
    root: Root


def values(graph: Graph, block: int) -> dict[str, Value]:
    """The values of ``ROLES``. A block has two attentions, and ends with the third of its residual additions."""
    sums = [node.outputs[0] for node in graph.nodes if node.op == "gated_add"]
    own = [node for node in graph.nodes if node.op in ("attention", "scaled_attention")][2 * block]
    first = next(node for node in graph.nodes if node.op == "layer_norm").values[0]
    before = sums[3 * block - 1] if block else first
    seen = (first, before, *_keys_and_values(graph, own), own.outputs[0], sums[3 * block + 2], sums[-1])
    return dict(zip(ROLES, (*seen, dict(graph.outputs)["velocity"]), strict=True))


def _keys_and_values(graph: Graph, attention: Node) -> tuple[Value, Value]:
    """What an attention reads, before it is quantised."""
    if attention.op == "attention":
        return attention.values[1], attention.values[2]
    rows = {node.outputs[0]: node.values[0] for node in graph.nodes if node.op == "quantize_rows"}
    return rows[attention.values[2]], rows[attention.values[4]]


def constants(graph: Graph, block: int) -> Graph:
    """The part of a graph that no block precedes: tokens, rows of modulation, text, table of positions."""
    by = {kind: [n for n in graph.nodes if n.op == kind] for kind in ("unbind", "rope", "modulate", "layer_norm")}
    name = f"blocks.{block}.attn2.to_k.weight"
    text = next(n for n in graph.nodes if n.op == "linear" and n.values[1].name == name)
    outputs = [("first", by["layer_norm"][0].values[0]), ("text", text.values[0])]
    outputs += [("table", by["rope"][2 * block + 1].values[1])]
    outputs += [(f"row.{i}", v) for i, v in enumerate(by["unbind"][block].outputs)]
    outputs += zip(("scale", "shift"), by["modulate"][-1].values[1:], strict=True)
    return prune(dataclasses.replace(graph, outputs=tuple(outputs)))[0]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows are kept: of all tokens, or of the noisy ones where the block is the last; always on both sides of
    the border between history and noise.

    Attributes:
        hidden: rows of the whole sequence, ascending.
        tokens: rows of the noisy part, for the head of the network.
        start: of the rows that the block gives: 0, or where the noise begins.
        split: where the noise begins.
    """

    hidden: tuple[int, ...]
    tokens: tuple[int, ...]
    start: int
    split: int

    @staticmethod
    def of(key: int, shapes: Mapping[str, tuple[int, ...]], chosen: Pick) -> Rows:
        """Args: key of the draw; shapes of ``ROLES``; what is opened."""
        whole, noisy = shapes["before"][1], shapes["last"][1]
        start, split = whole - shapes["after"][1], whole - noisy
        words = np.random.Philox(key=np.array([key & (2**64 - 1), key >> 64], np.uint64)).random_raw(2 * _ROWS)
        edges = [row for row in (start, split - 1, split, whole - 1) if row >= start]
        drawn = [start + int(word) % (whole - start) for word in words[:_ROWS]]
        tokens = [0, noisy - 1, *(int(word) % noisy for word in words[_ROWS:])]
        return Rows(tuple(sorted({*edges, *drawn})), tuple(sorted(set(tokens))), start, split)

    @property
    def past(self) -> int:
        """How many of the rows are history's."""
        return sum(row < self.split for row in self.hidden)

    def of_role(self, role: str) -> list[int]:
        """Rows of a tensor."""
        if role in ("last", "velocity"):
            return list(self.tokens)
        return [row - self.start for row in self.hidden] if role in ("attended", "after") else list(self.hidden)

    def count(self, role: str) -> int:
        return len(self.of_role(role))

    def take(self, role: str, tensor: Tensor) -> Tensor:
        """Rows of a tensor of one video, as a matrix."""
        matrix = _tokens(tensor) if role == "velocity" else tensor[0].flatten(1)
        return matrix[self.of_role(role)]


def _tokens(velocity: Tensor, patch: tuple[int, int, int] = (1, 2, 2)) -> Tensor:
    """The velocity ``[1, c, t, h, w]`` before ``unpatchify``, token by token."""
    t, h, w = velocity.shape[2:]
    grid = (t // patch[0], h // patch[1], w // patch[2])
    count = grid[0] * grid[1] * grid[2]
    places = torch.arange(velocity.numel(), dtype=torch.float64).reshape(1, count, -1)
    order = op.get("unpatchify").fn(places, grid=grid, patch=patch).reshape(-1).long()
    return torch.empty_like(velocity.reshape(-1)).index_copy_(0, order, velocity.reshape(-1)).reshape(count, -1)


class Remembered:
    """Weights that are drawn once, where several graphs read them."""

    def __init__(self, source: WeightReader) -> None:
        self._source = source
        self._held: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        if name not in self._held:
            self._held[name] = self._source.read(name)
        return self._held[name]


def _do(name: str, *args: Any, **attrs: Any) -> Any:
    """An op's body."""
    return op.get(name).fn(*args, **attrs)


def measure(
    graph: Graph,
    config: TransformerConfig,
    weights: WeightReader,
    given: Mapping[str, Tensor],
    chosen: Pick,
    rows: Rows,
    seen: Mapping[str, Tensor],
    heads: Mapping[str, Tensor],
) -> dict[str, Errors]:
    """Errors of the device's rows against float64.

    Args:
        graph: of the stage, in float64.
        config, weights: of the network.
        given: drawn inputs by name.
        chosen, rows: what is opened, and the rows that are kept.
        seen: matrices of rows by role.
        heads: keys and values ``[s, e]`` of the drawn head.
    """
    fixed = Interpreter({"fixed": constants(graph, chosen.block)}, weights).run(Call("fixed", "fixed", given))
    right = {"first": fixed["first"][0, list(rows.hidden)]}
    right |= _Block(config, weights, chosen, rows, fixed).rows(seen, heads)
    right["velocity"] = _head(config, weights, fixed, seen["last"])
    width = config.attention_head_dim
    came = {**seen, "attended": seen["attended"][:, chosen.head * width : (chosen.head + 1) * width]}
    return {role: budget.measure(came[role], right[role].reshape(came[role].shape)) for role in JUDGED}


def _head(config: TransformerConfig, weights: WeightReader, fixed: Mapping[str, Tensor], last: Tensor) -> Tensor:
    x = _do("layer_norm", last.double()[None], eps=config.eps, dtype=torch.float64)
    x = _do("modulate", x, fixed["scale"], fixed["shift"], dtype=torch.float64)
    return _linear(weights, x, "proj_out")[0]


def _linear(weights: WeightReader, x: Tensor, name: str) -> Tensor:
    made: Tensor = _do("linear", x, *(weights.read(f"{name}.{part}").double() for part in ("weight", "bias")))
    return made


class _Block:
    """Rows of one block, from what the device had before it."""

    def __init__(
        self, config: TransformerConfig, weights: WeightReader, chosen: Pick, rows: Rows, fixed: Mapping[str, Tensor]
    ) -> None:
        self.config, self.weights, self.head, self.table = config, weights, chosen.head, fixed["table"]
        self.name, self.at, self.text = f"blocks.{chosen.block}.", list(rows.hidden), fixed["text"]
        two = fixed["row.0"].shape[1] == 2
        self.past = rows.past
        self.split = rows.past if two else 0
        self.mods = [fixed[f"row.{i}"] if self.split else fixed[f"row.{i}"][:, -1:] for i in range(6)]

    def rows(self, seen: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.mods
        x = seen["before"].double()[None]
        h = self._adaln(x, scale, shift)
        q, k = (self._turned(h, which) for which in ("q", "k"))
        if self.config.is_amplify_history and self.past:
            k = _do("scale_history_keys", k, self._read("attn1.history_key_scale"), split=self.past)
        made = {"keys": k, "values": self._linear(h, "attn1.to_v")}
        whole = (heads[role].double()[None, :, None] for role in ("keys", "values"))
        made["attended"] = _do("attention", q[:, :, self.head : self.head + 1], *whole)
        branch = self._linear(seen["attended"].double()[None], "attn1.to_out.0")
        x = _do("gated_add", x, branch, gate, gate_split=self.split)
        x = _do("gated_add", x, self._cross(x if not self.config.guidance_cross_attn else x[:, self.past :]))
        h = self._linear(self._adaln(x, ff_scale, ff_shift), "ffn.net.0.proj")
        h = self._linear(_do("gelu", h), "ffn.net.2")
        made["after"] = _do("gated_add", x, h, ff_gate, gate_split=self.split)
        return {role: tensor[0] for role, tensor in made.items()}

    def _read(self, name: str) -> Tensor:
        return self.weights.read(self.name + name).double()

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return _linear(self.weights, x, self.name + name)

    def _adaln(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        normed = _do("layer_norm", x, eps=self.config.eps, dtype=torch.float64)
        made: Tensor = _do("modulate", normed, scale, shift, split=self.split, dtype=torch.float64)
        return made

    def _normed(self, x: Tensor, name: str, which: str) -> Tensor:
        """Queries or keys ``[1, rows, heads, e]`` before they are turned."""
        x = self._linear(x, f"{name}.to_{which}")
        x = _do("rms_norm", x, self._read(f"{name}.norm_{which}.weight"), eps=self.config.eps)
        return self._heads(x)

    def _heads(self, x: Tensor) -> Tensor:
        made: Tensor = _do("split_heads", x, heads=self.config.num_attention_heads)
        return made

    def _turned(self, x: Tensor, which: str) -> Tensor:
        made: Tensor = _do("rope", self._normed(x, "attn1", which), self.table[self.at])
        return made

    def _cross(self, x: Tensor) -> Tensor:
        if self.config.cross_attn_norm:
            weight, bias = self._read("norm2.weight"), self._read("norm2.bias")
            x = _do("layer_norm", x, weight, bias, eps=self.config.eps)
        k, v = self._normed(self.text, "attn2", "k"), self._heads(self._linear(self.text, "attn2.to_v"))
        came = _do("attention", self._normed(x, "attn2", "q"), k, v)
        return self._linear(came.flatten(2), "attn2.to_out.0")


def reference_errors(
    config: TransformerConfig, precision: str, weights: WeightReader, chosen: Pick
) -> dict[str, Errors]:
    """What the op bodies err in the working dtype, at 64×64 pixels with 64 tokens of text."""
    side = 8 >> (2 - chosen.stage)
    shape = DenoiseShape(side, side, 64, Window().indices, HistoryShape(8, 8))
    asked = PRECISIONS[precision]
    working, wide = (denoise_graph(config, shape, dtype=d) for d in (asked.dtype, torch.float64))
    working, _ = quantize(working, asked)
    graphs = {working.name: working}
    bound = golden.contexts(graphs, chosen.root)
    given = {**bound[Rate.PROMPT], **bound[Rate.CHUNK], **golden.draw(graphs, Rate.STEP, chosen.root)}
    opened = dataclasses.replace(working, outputs=tuple(values(working, chosen.block).items()))
    came = Interpreter({"opened": opened}, weights).run(Call("opened", "opened", given))
    rows = Rows.of(chosen.root.key("reference rows"), {r: tuple(x.shape) for r, x in came.items()}, chosen)
    seen = {role: rows.take(role, tensor) for role, tensor in came.items()}
    heads = {role: came[role][0, :, chosen.head] for role in ("keys", "values")}
    return measure(wide, config, weights, given, chosen, rows, seen, heads)
