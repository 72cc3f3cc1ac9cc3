"""Write a graph's products with quantised operands, as a precision says.

What is quantised is found by the names of weights: products inside the blocks, ``blocks.<i>.<part>.weight``. Each
activation is quantised once, right behind the node that makes it, so that a backend can fuse the two; a weight right
before its product, so that a kernel can take it at load. The rest of the graph stays as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from helios import op
from helios.graph import Builder, Graph, Node, Rate, Value
from helios.ops.linear import linear
from helios.ops.quantize import (
    dequantize_rows,
    quantize_rows,
    scaled_attention,
    scaled_linear,
)
from helios.precision import Precision

__all__ = ["held_bytes", "quantize", "quantized_blocks"]

_BLOCK = re.compile(r"blocks\.(\d+)\.([a-z0-9]+)\.")
_SELF = "attn1"


def quantize(graph: Graph, precision: Precision) -> tuple[Graph, bool]:
    """The graph with quantised products; and whether there is one.

    Args:
        graph: of core ops, with weights by their published names.
        precision: says which products, and whether self-attention.
    """
    blocks = quantized_blocks(graph, precision)
    if not precision.quantised or not blocks:
        return graph, False
    return _Rewriting(graph, precision, blocks).graph(), True


def quantized_blocks(graph: Graph, precision: Precision) -> frozenset[int]:
    """The blocks whose products a precision quantises: all but ``kept`` at each end, if any are left then."""
    return _chosen((v.name for v in graph.inputs_at(Rate.WEIGHTS)), precision)


def _chosen(weights: Iterable[str], precision: Precision) -> frozenset[int]:
    found = {int(m[1]) for name in weights if (m := _BLOCK.match(name))}
    kept = precision.kept if len(found) > 2 * precision.kept else 0
    return frozenset(sorted(found)[kept : len(found) - kept])


def held_bytes(shapes: Mapping[str, Sequence[int]], precision: Precision) -> int:
    """Bytes that a network's weights take once they are loaded: those of quantised products one a number and one
    float32 a row, all others the working dtype's.

    It is so on every backend that compiles plans kernel by kernel: a quantised weight is widened where it is used, see
    ``passes.phase``, whether or not by ``packed_linear``.

    Args:
        shapes: of all weights, by their published names.
        precision: in which the network is lowered.

    >>> from helios.precision import PRECISIONS
    >>> shapes = {"blocks.0.ffn.fc.weight": (6, 100), "blocks.0.ffn.fc.bias": (6,)}
    >>> [held_bytes(shapes, PRECISIONS[name]) for name in ("bf16", "fp8-weights")]
    [1212, 636]
    """
    blocks = _chosen(shapes, precision) if precision.products else frozenset()
    total = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        match = _BLOCK.match(name)
        # The blocks' only matrices are those of products: norms and biases are vectors.
        packed = match is not None and int(match[1]) in blocks and name.endswith(".weight") and len(shape) == 2
        total += count + 4 * shape[0] if packed else count * precision.dtype.itemsize
    return total


class _Rewriting:
    """One pass over the nodes in order, recording them again."""

    def __init__(self, graph: Graph, precision: Precision, blocks: frozenset[int]) -> None:
        self.source, self.precision, self.blocks = graph, precision, blocks
        self.known: dict[str, Value] = {}
        self.rows: dict[str, tuple[Value, Value]] = {}
        """Quantised activations by the name of what was quantised."""
        self.where: tuple[int, str] = (-1, "")
        """Block and part whose weights were read last: an attention has none of its own."""

    def graph(self) -> Graph:
        activations = self._activations()
        with Builder(self.source.name) as build:
            for v in self.source.inputs:
                self.known[v.name] = build.input(v.name, v.shape, v.dtype, v.rate)
            for node in self.source.nodes:
                self._enter(node, build)
                for value in node.outputs:
                    if value.name in activations:
                        self.rows[value.name] = quantize_rows(self.known[value.name])
            for name, value in self.source.outputs:
                build.output(name, self.known[value.name])
        result = build.graph()
        op.verify(result)
        return result

    def _activations(self) -> set[str]:
        """What has to be quantised as the operand of a product."""
        if self.precision.products != "e4m3":
            return set()
        inputs = {v.name for v in self.source.inputs}
        found = {_value(node, 0).name for node in self.source.nodes if self._product(node)}
        assert not found & inputs, "a block's products read what the graph makes"
        return found

    def _product(self, node: Node) -> bool:
        return (
            node.op == "linear" and (m := _BLOCK.match(_value(node, 1).name)) is not None and (int(m[1]) in self.blocks)
        )

    def _enter(self, node: Node, build: Builder) -> None:
        for value in node.values:
            if value.rate == Rate.WEIGHTS and (m := _BLOCK.match(value.name)):
                self.where = int(m[1]), m[2]
        renamed = node.renamed(self.known)
        if self.precision.products and self._product(node):
            made: Any = self._linear(node, renamed)
        elif self.precision.attention and node.op == "attention" and self._inside(_SELF):
            made = _attention(renamed)
        else:
            made = build.append(node.op, renamed.inputs, node.attributes, [v.type for v in node.outputs])
        values = made if isinstance(made, tuple) else (made,)
        self.known.update(zip((v.name for v in node.outputs), values, strict=True))

    def _inside(self, part: str) -> bool:
        return self.where[0] in self.blocks and self.where[1] == part

    def _linear(self, node: Node, renamed: Node) -> Any:
        x, weight, bias = renamed.inputs
        assert isinstance(weight, Value)
        if self.precision.products == "weights":
            return linear(x, dequantize_rows(*quantize_rows(weight), dtype=weight.dtype), bias)
        rows = self.rows[_value(node, 0).name]
        return scaled_linear(*rows, *quantize_rows(weight), bias, dtype=weight.dtype)


def _value(node: Node, at: int) -> Value:
    value = node.inputs[at]
    assert isinstance(value, Value)
    return value


def _attention(node: Node) -> Any:
    attrs: Mapping[str, Any] = node.attributes
    q, k, v = node.values
    return scaled_attention(
        *quantize_rows(q), *quantize_rows(k), *quantize_rows(v), scale=attrs["scale"], dtype=q.dtype
    )
