"""What Helios multiplies, read off its own graphs: every product, attention and convolution, and how often it runs."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math

import torch

from helios import op
from helios.fit.costs import LATENT_FRAMES, Setting, stage_graphs
from helios.graph import Graph, Node, Rate
from helios.model.presets import SIZES, VARIANTS
from helios.model.vae import decode_graph

__all__ = [
    "Attention",
    "Convolution",
    "Product",
    "attentions",
    "convolutions",
    "products",
    "setting",
    "weights_of_block",
]

SMALL = 5e-4
"""Products below this share of their graph's FLOPs are left out (the last projection), and those of a single row."""


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    """``[m, k] × [k, n]`` with a bias, ``count`` times in one forward of a stage; ``gelu`` where one follows.

    ``count`` is 0 for the fused q, k, v projection: the graph has three products in its place.
    """

    stage: str
    m: int
    k: int
    n: int
    count: int
    gelu: bool = False

    @property
    def flops(self) -> int:
        """Of one; the bias not counted."""
        return 2 * self.m * self.k * self.n

    @property
    def row(self) -> str:
        """Its name in tables."""
        return f"{self.m}×{self.k}→{self.n}"


@dataclasses.dataclass(frozen=True, slots=True)
class Attention:
    """``q`` queries over ``k`` keys, ``count`` times in one forward of a stage."""

    stage: str
    q: int
    k: int
    heads: int
    dim: int
    count: int

    @property
    def flops(self) -> int:
        """Of one, the softmax not counted."""
        return 4 * self.q * self.k * self.heads * self.dim

    @property
    def row(self) -> str:
        """Its name in tables."""
        return f"{self.q}×{self.k}"


@dataclasses.dataclass(frozen=True, slots=True)
class Convolution:
    """One shape of the VAE's decoder: input ``[c, t, h, w]`` with the frames of the past in it already.

    Rows and columns are padded with zeros by ``pad`` on each side, frames not at all; strides are 1.
    """

    c: int
    t: int
    h: int
    w: int
    out: int
    kernel: tuple[int, int, int]
    pad: int
    count: int

    @property
    def frames(self) -> int:
        """Of the result, whose rows and columns are the input's."""
        return self.t - self.kernel[0] + 1

    @property
    def flops(self) -> int:
        """Of one; the bias not counted."""
        return 2 * self.c * math.prod(self.kernel) * self.out * self.frames * self.h * self.w

    @property
    def row(self) -> str:
        """Its name in tables."""
        return f"{self.c}→{self.out} k{''.join(map(str, self.kernel))} {self.frames}×{self.h}×{self.w}"


def setting(tiny: bool) -> Setting:
    """The 14B model at 384×640, or the same network small enough for any CPU."""
    if tiny:
        return Setting(SIZES["tiny"], VARIANTS["distilled"], height=64, width=64, text_tokens=16)
    return Setting(SIZES["14b"], VARIANTS["distilled"])


@functools.cache
def _graphs(tiny: bool) -> dict[str, Graph]:
    """Stage graphs, the finest first: it is two thirds of the time. Where only the plumbing is tested, no other."""
    graphs = stage_graphs(setting(tiny), [2] if tiny else None)
    return {name: graphs[name] for name in sorted(graphs, reverse=True)}


def products(tiny: bool) -> list[Product]:
    """Matrix products of a step with token inputs, stage by stage, the largest share of the time first."""
    return [product for name, graph in _graphs(tiny).items() for product in _products(name, graph)]


def _products(stage: str, graph: Graph) -> list[Product]:
    nodes = [node for node in graph.nodes if node.op == "linear" and node.outputs[0].rate == Rate.STEP]
    activated = {v.name for node in graph.nodes if node.op == "gelu" for v in node.values}
    counts = collections.Counter(_product_key(node, activated) for node in nodes)
    floor = SMALL * sum(op.cost(node).flops for node in graph.nodes)
    found = [Product(stage, m, k, n, count, gelu) for (m, k, n, gelu), count in counts.items()]
    found = [product for product in found if product.m > 1 and product.flops * product.count >= floor]
    heads = [a for a in _attentions(stage, graph) if a.q == a.k]
    found += [Product(stage, a.q, a.heads * a.dim, 3 * a.heads * a.dim, 0) for a in heads]
    return sorted(found, key=lambda product: -product.flops * max(product.count, 1))


def _product_key(node: Node, activated: set[str]) -> tuple[int, int, int, bool]:
    x, weight = node.values[:2]
    return math.prod(x.shape[:-1]), weight.shape[1], weight.shape[0], node.outputs[0].name in activated


def attentions(tiny: bool) -> list[Attention]:
    """Every shape of attention, stage by stage, the largest share of the time first."""
    return [attention for name, graph in _graphs(tiny).items() for attention in _attentions(name, graph)]


def _attentions(stage: str, graph: Graph) -> list[Attention]:
    counts = collections.Counter((n.values[0].shape, n.values[1].shape) for n in graph.nodes if n.op == "attention")
    found = [Attention(stage, q[1], k[1], q[2], q[3], count) for (q, k), count in counts.items()]
    return sorted(found, key=lambda attention: -attention.flops * attention.count)


@functools.cache
def convolutions(tiny: bool) -> tuple[Convolution, ...]:
    """Every shape of convolution in the decoding of one chunk in one pass, the largest share of the time first."""
    run = setting(tiny)
    graph = decode_graph(
        run.size.vae,
        batch=1,
        latents=LATENT_FRAMES,
        height=run.height,
        width=run.width,
        dtype=torch.bfloat16,
        first=True,
        caches=False,
    )
    counts = collections.Counter(_convolution_key(node) for node in graph.nodes if node.op == "conv3d")
    found = [Convolution(*shape, out, kernel, pad, n) for (shape, out, kernel, pad), n in counts.items()]
    found.sort(key=lambda conv: -conv.flops * conv.count)
    if tiny:  # the least of each kernel: one of each kind is enough to test the plumbing
        found = list({conv.kernel: conv for conv in found}.values())
    return tuple(found)


def _convolution_key(node: Node) -> tuple[tuple[int, int, int, int], int, tuple[int, int, int], int]:
    x, weight = (value.shape for value in node.values[:2])
    attributes = node.attributes
    kernel, pad = (weight[2], weight[3], weight[4]), (kernel_pad := weight[3] // 2)
    if attributes["stride"] != (1, 1, 1) or attributes["padding"] != (0, kernel_pad, kernel_pad):
        raise ValueError(f"no variant here does {node}")
    return (x[1], x[2], x[3], x[4]), weight[0], kernel, pad


def weights_of_block(tiny: bool) -> int:
    """Elements of one transformer block's matrices: what streaming a block moves."""
    config = setting(tiny).size.transformer
    width = config.num_attention_heads * config.attention_head_dim
    return 8 * width * width + 2 * width * config.ffn_dim
