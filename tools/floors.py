"""Count what a chunk of 14b computes and moves, and write the floor and the prediction into docs/performance.md.

    python tools/floors.py [--write | --check]

Counted on shapes, on the plan that the CUDA backend gets and in the layouts that its kernels leave their results in; no
GPU, nothing measured. ``RATES`` are the assumptions. ``--check`` ends with 1 where the document says something else.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from kernel_report import plan_graphs

from helios import op
from helios.fit.costs import LATENT_FRAMES
from helios.graph import Node, Rate
from helios.model.presets import SIZES
from helios.model.vae import frames_of
from helios_cuda import CudaBackend, offline

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- tools/floors.py --write makes what follows -->", "<!-- tools/floors.py ends -->"
Steps: TypeAlias = tuple[int, int, int]
STAGES = 3
FRAMES = frames_of(SIZES["14b"].vae, LATENT_FRAMES)
"""Of a chunk."""
PRODUCTS = ("linear", "linear_gelu", "packed_linear", "patch_embed", "qkv_linear")
E4M3_PRODUCTS = ("quantized_linear", "quantized_qkv_linear")
ATTENTIONS = ("attention", "quantized_attention")
QUANTISING = ("adaln_quantize", "dequantize_rows", "gelu_quantize", "quantize_rows")
"""What a plan in bf16 has no kernel for; norms and residuals have one either way."""
T = 1e12


@dataclasses.dataclass(frozen=True)
class Rates:
    """What is assumed of a device, per second.

    Args:
        name: in the document.
        product, attention, convolution: FLOP.
        memory: bytes.
        gap: seconds between two kernels of a graph.
        e4m3, e4m3_attention: how many times as fast products and attention of e4m3 numbers are.
    """

    name: str
    product: float
    attention: float
    convolution: float
    memory: float
    gap: float = 0.0
    e4m3: float = 2.0
    e4m3_attention: float = 2.0

    def kind(self, name: str) -> float:
        """FLOP a second of an op that multiplies."""
        if name in PRODUCTS:
            return self.product
        if name in E4M3_PRODUCTS:
            return self.product * self.e4m3
        if name in ATTENTIONS:
            return self.attention * (1.0 if name == "attention" else self.e4m3_attention)
        return self.convolution


FLOOR = Rates("floor", 790 * T, 650 * T, 790 * T, 4.3 * T)
FAST = Rates("fast", 790 * T, 650 * T, 0.7 * 790 * T, 4.3 * T, 1e-6, 2 * 0.85, 1.6)
SLOW = Rates("slow", 700 * T, 600 * T, 0.5 * 790 * T, 0.8 * 4.3 * T, 3e-6, 2 * 0.75, 1.35)
QUANTISED = ("fp8", "fp8-attention", "fp8-weights")
OVERLAP = 0.05
"""What decoding beside denoising gives at best: both saturate the tensor cores."""
TARGETS: Mapping[tuple[str, Steps], int] = {
    ("bf16", (1, 1, 1)): 28,
    ("bf16", (2, 2, 2)): 17,
    ("fp8", (1, 1, 1)): 36,
    ("fp8", (2, 2, 2)): 24,
    ("fp8-attention", (1, 1, 1)): 36,
    ("fp8-attention", (2, 2, 2)): 24,
}
"""Frames a second that a steady run shall reach on one H200, decoding included."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One node: its op, FLOP, and bytes that it reads and writes; views move none and launch nothing."""

    op: str
    flops: int
    moved: int

    def seconds(self, rates: Rates) -> float:
        """By arithmetic or by memory, whichever takes longer."""
        if not (self.flops or self.moved):
            return 0.0
        busy = self.flops / rates.kind(self.op) if self.flops else 0.0
        return max(busy, self.moved / rates.memory) + rates.gap


@functools.cache
def counted(precision: str = "bf16") -> Mapping[str, tuple[Work, ...]]:
    """The nodes of every graph of a chunk, by graph; the VAE's is the same in all precisions."""
    kernels = CudaBackend().kernels
    return {
        name: tuple(work for ran in offline.replay(graph, kernels) for work in launched(ran))
        for name, graph in plan_graphs(precision).items()
    }


def launched(ran: offline.Ran) -> Iterator[Work]:
    """What a node does, kernel by kernel where it needs more than one: weights as they are held, not as they came."""
    node, flops, moved = ran.node, op.cost(ran.node).flops, ran.moved
    if node.op in E4M3_PRODUCTS:
        moved -= sum(2 * math.prod(shape) - _held(shape) for shape in _weights(node))
    elif node.op == "packed_linear":
        for shape in _weights(node):
            yield Work("dequantize_rows", 0, _held(shape) + 2 * math.prod(shape))
    elif node.op == "quantized_attention":
        elements, rows = (sum(math.prod(v.shape[:n]) for v in node.values) for n in (4, 3))
        yield Work("quantize_rows", 0, 3 * elements + 4 * rows)
        moved -= elements - 4 * rows
    yield Work(node.op, flops, moved)


def _weights(node: Node) -> list[tuple[int, ...]]:
    """The shapes of its matrices."""
    return [v.shape for v in node.values if v.rate == Rate.WEIGHTS and len(v.shape) == 2]


def _held(shape: Sequence[int]) -> int:
    """Bytes of a quantised matrix: one an element, four a row."""
    return math.prod(shape) + 4 * shape[0]


def chunk(steps: Sequence[int], precision: str = "bf16") -> Iterator[Work]:
    """Everything of a chunk but its decoding, without guidance."""
    graphs = counted(precision)
    yield from (*graphs["chunk"], *graphs["shrink"])
    for stage, count in enumerate(steps):
        yield from graphs.get(f"enter.{stage}", ())
        for _ in range(count):
            yield from (*graphs[f"denoise.{stage}"], *graphs[f"step.{stage}"])


def seconds(work: Iterable[Work], rates: Rates) -> float:
    """Of all of it, one after the other."""
    return sum(one.seconds(rates) for one in work)


def predictions() -> Iterator[tuple[str, Steps, list[float], list[float]]]:
    """Precision, steps, and frames a second, slow and fast end: decoding afterwards, and beside the next chunk."""
    for precision, steps in TARGETS:
        work = [*chunk(steps, precision), *counted()["decode"]]
        apart = [FRAMES / seconds(work, rates) for rates in (SLOW, FAST)]
        yield precision, steps, apart, [apart[0], apart[1] * (1 + OVERLAP)]


def section() -> str:
    """What stands in the document between the marks."""
    tables = {
        "rates": _rates(),
        "steps": _ops([f"denoise.{i}" for i in range(STAGES)]),
        "decode": _decode(),
        "parts": _parts(),
        "quantised": _quantised(),
        "passes": _passes(),
        "predictions": _predictions(),
        "share": _shares(),
    }
    return TEXT % {name: "\n".join(lines) for name, lines in tables.items()}


def _rates() -> Iterator[str]:
    yield "| | products, TFLOP/s | in e4m3 | attention | in e4m3 | convolutions | memory, TB/s | between kernels |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for r in (FLOOR, FAST, SLOW):
        kinds = ("linear", "quantized_linear", "attention", "quantized_attention", "conv3d")
        rates = (f"{r.kind(name) / T:.0f}" for name in kinds)
        yield f"| {r.name} | {' | '.join(rates)} | {r.memory / T:.2f} | {r.gap * 1e6:.0f} µs |"


def _by_op(work: Iterable[Work]) -> dict[str, list[Work]]:
    found = collections.defaultdict(list)
    for one in work:
        found[one.op].append(one)
    return found


Sums: TypeAlias = tuple[int, float, float, float]


def _sums(found: Sequence[Work]) -> Sums:
    """Nodes, TFLOP, GB and milliseconds at the floor."""
    flops, moved = sum(one.flops for one in found), sum(one.moved for one in found)
    return len(found), flops / 1e12, moved / 1e9, 1e3 * seconds(found, FLOOR)


def _ops(graphs: Sequence[str]) -> Iterator[str]:
    yield "| op | nodes | TFLOP at stage 0, 1, 2 | GB at stage 0, 1, 2 | floor, ms | [1, 1, 1] | [2, 2, 2] |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    groups = [_by_op(counted()[name]) for name in graphs]
    rows = {name: [_sums(group.get(name, ())) for group in groups] for name in groups[-1]}
    shown = {name: row for name, row in rows.items() if max(x[3] for x in row) >= 0.05}
    for name, row in sorted(shown.items(), key=lambda item: -item[1][-1][3]):
        yield _row(f"`{name}`", row)
    rest = [row for name, row in rows.items() if name not in shown]
    yield _row(f"{len(rest)} others", _total(rest))
    yield _row("a step", _total(rows.values()))


def _total(rows: Iterable[Sequence[Sums]]) -> list[tuple[float, ...]]:
    """Stage by stage, over all ops."""
    return [tuple(map(sum, zip(*stage, strict=True))) for stage in zip(*rows, strict=True)]


def _row(name: str, row: Sequence[Sequence[float]]) -> str:
    flops = ", ".join(f"{x[1]:.2f}" for x in row) if any(x[1] >= 0.005 for x in row) else ""
    moved, floor = (", ".join(f"{x[i]:.2f}" for x in row) for i in (2, 3))
    total = sum(x[3] for x in row)
    return f"| {name} | {row[-1][0]:.0f} | {flops} | {moved} | {floor} | {total:.1f} | {2 * total:.1f} |"


def _decode() -> Iterator[str]:
    yield "| op | nodes | TFLOP | GB | floor, ms | predicted, ms |"
    yield "| --- | --- | --- | --- | --- | --- |"
    groups = _by_op(counted()["decode"])
    for name, found in sorted(groups.items(), key=lambda item: -seconds(item[1], FLOOR)):
        yield from [_decode_row(f"`{name}`", found)] if seconds(found, FLOOR) else []
    yield _decode_row("all", counted()["decode"])


def _decode_row(name: str, found: Sequence[Work]) -> str:
    nodes, flops, moved, floor = _sums(found)
    flop = f"{flops:.2f}" if flops >= 0.005 else ""
    return f"| {name} | {nodes} | {flop} | {moved:.2f} | {floor:.2f} | {_range(found, 1e3, '.1f')} |"


def _range(found: Sequence[Work], scale: float, format_: str) -> str:
    return "–".join(f"{scale * seconds(found, rates):{format_}}" for rates in (FAST, SLOW))


def _parts() -> Iterator[str]:
    yield "| | TFLOP | GB | floor, ms | predicted, ms |"
    yield "| --- | --- | --- | --- | --- |"
    for steps in ((1, 1, 1), (2, 2, 2)):
        work = list(chunk(steps))
        groups = {
            "products": [x for x in work if x.op in PRODUCTS],
            "attention": [x for x in work if x.op == "attention"],
            "all else": [x for x in work if x.op not in (*PRODUCTS, "attention")],
            "decoding": list(counted()["decode"]),
        }
        for name, found in {**groups, "**all**": [*work, *counted()["decode"]]}.items():
            yield _part_row(f"{list(steps)} {name}", found)


def _part_row(name: str, found: Sequence[Work]) -> str:
    _, flops, moved, floor = _sums(found)
    return f"| {name} | {flops:.1f} | {moved:.1f} | {floor:.1f} | {_range(found, 1e3, '.0f')} |"


def _quantised() -> Iterator[str]:
    """A chunk at [1, 1, 1] in each precision that quantises."""
    yield "| | TFLOP | GB | floor, ms | predicted, ms |"
    yield "| --- | --- | --- | --- | --- |"
    for precision in QUANTISED:
        work = list(chunk((1, 1, 1), precision))
        groups = {
            "products in e4m3": E4M3_PRODUCTS,
            "products in bf16": PRODUCTS,
            "attention in e4m3": ("quantized_attention",),
            "attention in bf16": ("attention",),
            "quantising and widening": QUANTISING,
        }
        parts = {name: [x for x in work if x.op in ops] for name, ops in groups.items()}
        parts["all else"] = [x for x in work if not any(x.op in ops for ops in groups.values())]
        parts = {**parts, "**all**, decoding included": [*work, *counted()["decode"]]}
        yield from (_part_row(f"{precision} {name}", found) for name, found in parts.items() if found)


def _shares() -> Iterator[str]:
    """Which part of the floor is what."""
    work = list(chunk((1, 1, 1)))
    total = seconds([*work, *counted()["decode"]], FLOOR)
    parts = {
        "products": seconds((x for x in work if x.op in PRODUCTS), FLOOR),
        "attention": seconds((x for x in work if x.op == "attention"), FLOOR),
        "convolutions": seconds((x for x in counted()["decode"] if x.op == "conv3d"), FLOOR),
    }
    told = ", ".join(f"{name} {part / total:.0%}" for name, part in parts.items())
    yield f"Of the floor at [1, 1, 1]: {told}, all else {1 - sum(parts.values()) / total:.0%}."


def _passes() -> Iterator[str]:
    """What dominates beside products, attention and convolutions."""
    work = [*chunk((1, 1, 1)), *counted()["decode"]]
    light = {name: found for name, found in _by_op(work).items() if not any(one.flops for one in found)}
    total = seconds(work, FLOOR)
    yield "| op | nodes that move something | GB | floor, ms | of the chunk's floor |"
    yield "| --- | --- | --- | --- | --- |"
    for name, found in sorted(light.items(), key=lambda item: -seconds(item[1], FLOOR))[:10]:
        nodes, _, moved, floor = _sums([one for one in found if one.moved])
        yield f"| `{name}` | {nodes} | {moved:.2f} | {floor:.2f} | {floor / 1e3 / total:.1%} |"


def _predictions() -> Iterator[str]:
    yield "| | target, FPS | ms a chunk that it allows | *prediction*, decoding after | *prediction*, decoding beside |"
    yield "| --- | --- | --- | --- | --- |"
    for precision, steps, apart, beside in predictions():
        target = TARGETS[precision, steps]
        ends = (f"{slow:.1f}–{fast:.1f}" for slow, fast in (apart, beside))
        yield f"| {precision} {list(steps)} | ≥ {target} | {1e3 * FRAMES / target:.0f} | {' | '.join(ends)} |"


TEXT = """
*Computed* by `tools/floors.py` on the lowered plan of `14b` (384×640, 512 text tokens, bf16, the fused ops of the CUDA
backend). Every time below is a floor or a *prediction*; none was measured. A node takes its FLOP or its bytes at the
rates below, whichever is longer, and nodes follow each other. Views move nothing; what a kernel reads and writes counts
once, in the layouts that the kernels really leave. *Assumptions* for one H200:

%(rates)s

Products have been seen at 790 TFLOP/s on an H200. Published for attention with heads of 128 at 8k tokens on an H100:
646 (FlashAttention 3) and 600 (cuDNN). Guesses: convolutions at 50 to 70 %% of 790; what lies between two kernels of a
CUDA graph; products in e4m3 at 75 to 85 %% of twice the rate in bf16, attention in e4m3 1.35 to 1.6
times as fast: its loop is bound by instructions, which `kernels/scaled_attention.py` counts.

A step, by op; the last two columns are the floor of all steps of a chunk, in ms:

%(steps)s

Decoding a chunk in bf16 in one pass, by kernels that make no copy of their operands (a convolution by cuDNN may):

%(decode)s

A chunk: forwards at each stage, the history's embedding, the sampler, decoding. No guidance; the prompt's keys and
values (2.2 TFLOP, once a prompt) are not in it.

%(parts)s

%(share)s

In the precisions that quantise, counted on their own plans: the first and the last block stay in bf16,
a weight is read as it is held, and what a node does in two kernels counts as two. The forwards and the sampler at
[1, 1, 1]; norms and residuals that also quantise are among all else.

%(quantised)s

### Predicted for the CUDA backend

*Prediction*: frames a second of steady chunks, decoding included, the slow and the fast end of the assumptions.
Decoding beside the next chunk's denoising is taken to give 0 to 5 %%, since both want the tensor cores.

%(predictions)s

### What is left beside products, attention and convolutions

The ten ops with the longest floor among those that only move bytes, in a chunk at [1, 1, 1]:

%(passes)s
"""


def main() -> int:
    """Print the section, write it, or compare it with the document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name}, between its marks")
    parser.add_argument("--check", action="store_true", help="end with 1 if the document says something else")
    args = parser.parse_args()
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    new = section()
    if args.write:
        DOCUMENT.write_text(f"{before}{BEGIN}{new}{END}{after}")
    elif args.check:
        print("as computed" if old == new else f"{DOCUMENT} is stale: python tools/floors.py --write")
        return int(old != new)
    else:
        print(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
