"""Which nodes a run at the published size has: listed once, committed as ``plan_nodes.json``, so that no run has to
build graphs of that size to know its cases.

``python -m helios_conformance.plan_list`` makes the file; ``--check`` compares it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios import precision as precisions
from helios.graph import Graph, Node, TensorType, format_attr, parse
from helios.model.presets import SIZES, VARIANTS
from helios.model.vae_run import decode_graphs, encode_graphs
from helios.model.vae_split import Split
from helios.passes import build_plan, expand, fuse, prune
from helios.pipeline.denoise import Layout, denoise_graphs
from helios.pipeline.history import Window
from helios.precision import Precision
from helios_conformance import scope
from helios_conformance.case import PRECISIONS
from helios_conformance.one_node import OneNode

__all__ = ["Shape", "committed", "sampled", "shape"]

FILE = "plan_nodes.json"
HEIGHT, WIDTH = 384, 640
FRAMES = 33
"""Of one chunk: nine latents."""
LAYERS = 3
"""Enough for a first, a middle and a last block; the others repeat the middle one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A node without its names: op, types of the operands (``None`` absent, a tuple for a list), attributes."""

    op: str
    types: tuple[Any, ...]
    attrs: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(node: Node) -> Shape:
        return Shape(node.op, tuple(_type(x) for x in node.inputs), node.attrs)

    @property
    def label(self) -> str:
        """Op and a hash of the rest: the same for as long as the node is the same."""
        attrs = ",".join(f"{k}={format_attr(v)}" for k, v in self.attrs)
        told = f"{self.op}({', '.join(map(_text, self.types))}) {{{attrs}}}"
        return f"{self.op}_{hashlib.sha256(told.encode()).hexdigest()[:6]}"

    @property
    def graph(self) -> Graph:
        """Of this node alone."""
        types = [list(t) if isinstance(t, tuple) else t for t in self.types]
        return OneNode.of(self.op, types, dict(self.attrs)).graph


@functools.cache
def committed() -> Mapping[str, Mapping[str, str]]:
    """Precision -> label -> the text of a graph of that one node."""
    nodes: dict[str, dict[str, str]] = json.loads(resources.files("helios_conformance").joinpath(FILE).read_text())
    return nodes


def shape(precision: str, label: str) -> Shape:
    """The node of that label; KeyError if there is none."""
    (node,) = parse(committed()[precision][label]).nodes
    return Shape.of(node)


@functools.cache
def listed(precision: str, layers: int = LAYERS) -> dict[str, str]:
    """Distinct nodes by label, without those that a sample of their op covers.

    A backend chooses which fused ops it gets, and cases are listed without one. So the nodes of two plans are taken: of
    core ops alone, and with every fused op of the opset.
    """
    asked = precisions.PRECISIONS[precision]
    dtype = asked.dtype
    known = {sampled(name, sample, dtype) for name in op.names() for sample in op.get(name).samples()}
    fused = [name for name in op.names() if op.get(name).kind == "fused"]
    found = {
        Shape.of(node)
        for graphs in _programs(asked, layers)
        for fusions in ([], fused)
        for graph in _lowered(graphs, fusions)
        for node in graph.nodes
        if node.inputs  # those without inputs the host computes, once
    }
    told = {node.label: str(node.graph) for node in sorted(found - known, key=lambda node: node.label)}
    working = scope.dtype_scope(precision)
    return told if working == precision else {k: v for k, v in told.items() if k not in listed(working, layers)}


def _lowered(graphs: Mapping[str, Graph], fusions: Sequence[str]) -> list[Graph]:
    written = {name: fuse(expand(prune(graph)[0])[0], fusions)[0] for name, graph in graphs.items()}
    return list(build_plan(written).graphs.values())


def _programs(precision: Precision, layers: int) -> Iterator[dict[str, Graph]]:
    """The plans of a run: the transformer with the steps of each variant, both halves of the VAE latent by latent."""
    size = SIZES["14b"]
    transformer = dataclasses.replace(size.transformer, num_layers=layers)
    factor = size.vae.scale_factor_spatial
    layout = Layout(1, HEIGHT // factor, WIDTH // factor, 512, Window())
    for variant in VARIANTS.values():
        yield denoise_graphs(transformer, variant.scheduler, variant.pipeline, layout, precision)
    video: dict[str, Any] = {
        "batch": 1,
        "height": HEIGHT,
        "width": WIDTH,
        "dtype": precision.dtype,
        "split": Split(group=1),
    }
    yield decode_graphs(size.vae, latents=9, **video)
    yield encode_graphs(size.vae, frames=FRAMES, **video)


def sampled(name: str, sample: op.Sample, dtype: torch.dtype) -> Shape:
    """The node that a sample of an op makes."""

    def type_(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple(type_(a) for a in arg)
        return None if arg is None else TensorType(arg.shape, arg.dtype or dtype)

    attrs = dict(op.get(name).attrs) | {k: op._freeze(v) for k, v in sample.attrs.items()}
    return Shape(name, tuple(type_(x) for x in sample.inputs), tuple(sorted(attrs.items())))


def _type(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(v.type for v in x)
    return None if x is None else x.type


def _text(type_: Any) -> str:
    return f"[{', '.join(map(str, type_))}]" if isinstance(type_, tuple) else str(type_)


def main(words: Sequence[str] | None = None) -> int:
    """Write the file, or compare it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m helios_conformance.plan_list", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail unless the file is up to date")
    text = json.dumps({precision: listed(precision) for precision in PRECISIONS}, indent=0) + "\n"
    file = Path(__file__).with_name(FILE)
    if parser.parse_args(words).check:
        return 0 if file.exists() and file.read_text(encoding="utf-8") == text else 1
    file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
