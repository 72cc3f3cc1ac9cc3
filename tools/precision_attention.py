"""What attention of e4m3 numbers costs in accuracy: error, cosine and PSNR against float64, beside bfloat16's.

    python tools/precision_attention.py [--tokens 2048] [--layers 4] [--height 16] [--width 24]

Runs on the CPU by the op bodies, which round where the kernels do. Operands are rounded to bfloat16 first, and float64
takes them as they are, so that errors are those of attention alone. The last rows have the queries, keys and values of
a network of the heads and the width of ``mini`` with random weights, at its finest stage. The largest weight is the
median over 256 queries of each head.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from precision import accuracy, scene_of
from torch import Tensor

from helios import op
from helios.graph import Node, Value
from helios_conformance.draws import Root
from helios_conformance.golden import Interpreter, golden

HEADS, WIDTH = 4, 128
LOUD = 4
"""Channels of each head that are outliers."""


class Operands(NamedTuple):
    """``[1, tokens, heads, width]`` each, in bfloat16."""

    q: Tensor
    k: Tensor
    v: Tensor


def drawn(tokens: int) -> Iterator[tuple[str, Operands]]:
    """Named draws. The deviation of the scores is 1, but where they are peaked."""
    draw = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 1, tokens, HEADS, WIDTH, generator=draw)
    loud = torch.ones(WIDTH)
    loud[:: WIDTH // LOUD] = 16.0
    shift = torch.zeros(WIDTH)
    shift[:: WIDTH // LOUD] = 16.0
    yield "normal", _rounded(q, k, v)
    yield (
        f"{LOUD} channels of q, k and v 16 times as large",
        _rounded(q * loud / loud.pow(4).mean().sqrt(), k * loud, v * loud),
    )
    yield f"{LOUD} channels of k shifted by 16, the same for all keys", _rounded(q, k + shift, v)
    yield "peaked: scores of deviation 8", _rounded(8 * q, k, v)


def _rounded(*operands: Tensor) -> Operands:
    return Operands(*(x.to(torch.bfloat16) for x in operands))


def network(layers: int, height: int, width: int) -> Iterator[tuple[str, Operands]]:
    """Operands of the self-attention of every block, in the last step of a chunk of one step a stage."""
    scene = dataclasses.replace(scene_of(layers, height, width), steps=(1, 1, 1))
    last = [call for call in golden(scene, Root(0), torch.bfloat16).calls if call.entry.startswith("denoise")][-1]
    graph = scene.graphs(torch.bfloat16)[last.entry]
    nodes = [node for node in graph.nodes if node.op == "attention" and _keys(node) > scene.tokens]
    outputs = [(f"{i}.{name}", x) for i, node in enumerate(nodes) for name, x in zip("qkv", node.values, strict=True)]
    opened = dataclasses.replace(graph, outputs=tuple(outputs))
    made = Interpreter({last.entry: opened}, scene.weights(torch.bfloat16)).run(last)
    for i in range(len(nodes)):
        yield f"random weights, block {i}", Operands(*(made[f"{i}.{name}"] for name in "qkv"))


def _keys(node: Node) -> int:
    keys = node.inputs[1]
    assert isinstance(keys, Value)
    return keys.shape[1]


def row(name: str, x: Operands) -> str:
    """A line of Markdown."""
    wide = [one.double() for one in x]
    right = op.get("attention").fn(*wide)
    scores = torch.einsum("bshd,bthd->bhst", wide[0][:, :256], wide[1]) * wide[0].shape[-1] ** -0.5
    peak = float(scores.softmax(-1).amax(-1).median())
    cells = []
    for attention in ("attention", "quantized_attention"):
        found = accuracy(op.get(attention).fn(*x), right)
        cells.append(f"{found.error:.1e}, {1 - found.cosine:.0e}, {found.psnr:.1f} dB")
    return f"| {name} | {x.q.shape[1]} × {x.k.shape[1]} | {peak:.2g} | " + " | ".join(cells) + " |"


def main(words: list[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of the draws")
    parser.add_argument("--layers", type=int, default=4, help="of the network")
    parser.add_argument("--height", type=int, default=16, help="of the latents")
    parser.add_argument("--width", type=int, default=24, help="of the latents")
    asked = parser.parse_args(words)
    out = sys.stdout.write
    out(f"{platform.machine()}, torch {torch.__version__}; ‖y − o‖ / ‖o‖, 1 − cosine, PSNR\n\n")
    out("| queries, keys, values | tokens | largest weight | bf16 | e4m3 |\n| --- | --- | --- | --- | --- |\n")
    for name, x in drawn(asked.tokens):
        out(row(name, x) + "\n")
        sys.stdout.flush()
    for name, x in network(asked.layers, asked.height, asked.width):
        out(row(name, x) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
