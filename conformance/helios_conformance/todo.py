"""What a backend still has to do, in the order in which to do it: by each op's share of the time of a chunk.

The chunk is a steady one of the published size: 14b, Distilled with one step a stage, 384 × 640, sampler and VAE
included. No device is asked for times. A node is taken to last as long as its FLOPs or its bytes do, whichever is
longer, on a nominal accelerator; a view costs nothing. So a share is a prediction, and good enough for an order.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios.graph import Graph, Node, TensorType
from helios.model.presets import SIZES, VARIANTS
from helios.model.vae_run import decode_graphs
from helios.model.vae_split import Split
from helios.passes import build_plan, expand, fuse, prune
from helios.pipeline.denoise import Layout, denoise_graphs
from helios.pipeline.history import Window
from helios.precision import PRECISIONS, Precision
from helios_conformance import plan_list, suite
from helios_conformance.case import Case

__all__ = ["ASSUMED", "Item", "items", "shares"]

FLOPS, BYTES = 800e12, 3e12
"""A second, of a nominal accelerator: FLOPs in 16 bits, half of them in 32 bits, and bytes of memory."""

LATENTS = 9
STEPS = 1
"""Of a chunk, and of each pyramid stage."""

ASSUMED = (
    "Share of a chunk's time (14b, distilled, steps 1,1,1, 384×640, sampler and VAE included): a prediction from FLOPs "
    "and bytes alone. Each node takes max(FLOPs / 800 TFLOP/s, bytes / 3 TB/s), at half the FLOP/s in float32, as the "
    "VAE is; a view takes nothing."
)


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """An op with required cases that did not pass.

    Attributes:
        op, kind: of the opset.
        share: of the predicted time of a chunk, 0 to 1.
        nodes: how many a chunk runs.
        largest: operand types of the node that takes longest, as ``bf16[1,8640,5120], bf16[64,5120]``; empty
            where no graph of a published run has the op.
        case: the first that did not pass; an id that ``--filter`` takes.
        state: of that case, ``unsupported`` or ``fail``.
        cases: how many did not pass.
    """

    op: str
    kind: str
    share: float
    nodes: int
    largest: str
    case: str
    state: str
    cases: int


def items(backend: Mapping[str, Any], precision: str, cases: Iterable[Mapping[str, Any]]) -> list[Item]:
    """What is to do, the largest share first.

    Args:
        backend: as a report describes it; read are its ``fusions``, the fused ops that reach it whole.
        precision: of the run.
        cases: its records; those of other levels than ops, and what no certificate needs, are passed over.
    """
    fusions = frozenset(backend.get("fusions", ()))  # who imports results says none
    known = {case.id: case for case in suite.all_cases(precision)}
    wrong: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for told in cases:
        if told["level"] == "ops" and told["required"] and told["state"] in ("unsupported", "fail"):
            name = _op_of(known[told["id"]])
            # A fused op that the backend did not ask for reaches it as core ops: those are what it lacks.
            if told["state"] == "fail" or op.get(name).kind != "fused" or name in fusions:
                wrong[name].append(told)
    found = [_item(name, told, precision, fusions) for name, told in wrong.items()]
    return sorted(found, key=lambda item: (-item.share, item.op))


def _item(name: str, told: Sequence[Mapping[str, Any]], precision: str, fusions: frozenset[str]) -> Item:
    work = shares(precision, fusions).get(name) or Work(0.0, 0, _elsewhere(name, precision))
    first = told[0]
    return Item(
        name, op.get(name).kind, work.share, work.nodes, work.largest, first["id"], str(first["state"]), len(told)
    )


def _op_of(case: Case) -> str:
    node = case.params.get("node")
    return str(case.params["op"]) if node is None else plan_list.shape(case.precision, node).op


# --- the chunk --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """All nodes of one op in a chunk: their part of its time, their number, and the operands of the slowest."""

    share: float
    nodes: int
    largest: str


@functools.cache
def shares(precision: str, fusions: frozenset[str] = frozenset()) -> dict[str, Work]:
    """Every op of the lowered plans of a chunk; those of phases that a steady chunk does not run have no nodes."""
    seconds: dict[str, float] = collections.defaultdict(float)
    nodes: collections.Counter[str] = collections.Counter()
    slowest: dict[str, tuple[float, Node]] = {}
    for graph, runs in _graphs(PRECISIONS[precision], fusions):
        for node in (n for n in graph.nodes if n.inputs):  # those without inputs the host computes, once
            took = _seconds(node)
            seconds[node.op] += runs * took
            nodes[node.op] += runs
            slowest[node.op] = max(slowest.get(node.op, (-1.0, node)), (took, node), key=lambda pair: pair[0])
    whole = sum(seconds.values())
    return {name: Work(seconds[name] / whole, nodes[name], _told(slowest[name][1])) for name in seconds}


def _graphs(precision: Precision, fusions: frozenset[str]) -> Iterator[tuple[Graph, int]]:
    """Each graph of the plans, and how often a steady chunk runs it."""
    size, variant = SIZES["14b"], VARIANTS["distilled"]
    factor = size.vae.scale_factor_spatial
    layout = Layout(1, plan_list.HEIGHT // factor, plan_list.WIDTH // factor, 512, Window())
    # The prompt and the weights stay as they are, and one branch needs no guidance.
    once = {"chunk": 1, "shrink": 1, "enter": 1, "denoise": STEPS, "step": STEPS}
    denoise = denoise_graphs(size.transformer, variant.scheduler, variant.pipeline, layout, precision)
    for name, graph in _lowered(denoise, fusions).items():
        yield graph, once.get(name.partition(".")[0], 0)
    # In float32 whatever the precision, as published.
    video: dict[str, Any] = {"batch": 1, "height": plan_list.HEIGHT, "width": plan_list.WIDTH, "dtype": torch.float32}
    decode = decode_graphs(size.vae, latents=LATENTS, split=Split(group=LATENTS), **video)
    for name, graph in _lowered(decode, fusions).items():
        yield graph, int(name in decode)


def _lowered(graphs: Mapping[str, Graph], fusions: frozenset[str]) -> dict[str, Graph]:
    """As a backend with these fusions gets them."""

    def wanted(node: Node) -> bool:
        return node.op in fusions

    written = {name: fuse(expand(prune(graph)[0], wanted)[0], sorted(fusions))[0] for name, graph in graphs.items()}
    return build_plan(written).graphs


def _seconds(node: Node) -> float:
    """The longer of its arithmetic and its traffic."""
    if op.get(node.op).kind == "move" and _is_view(plan_list.Shape.of(node)):
        return 0.0
    cost = op.cost(node)
    return max(cost.flops / (FLOPS * 2 / _width(node)), cost.bytes / BYTES)


def _width(node: Node) -> int:
    """Bytes of a number that is multiplied; nothing is faster than one of two but e4m3."""
    return 1 if node.op.startswith("scaled") else max(2, node.outputs[0].dtype.itemsize)


@functools.cache
def _is_view(shape: plan_list.Shape) -> bool:
    """Whether torch moves no data for it: every output lies in an operand's memory."""

    def meta(type_: Any) -> Any:
        if isinstance(type_, tuple):
            return [meta(t) for t in type_]
        return None if type_ is None else torch.empty(type_.shape, dtype=type_.dtype, device="meta")

    operands = [meta(t) for t in shape.types]
    result = op.get(shape.op).fn(*operands, **dict(shape.attrs))
    flat = [t for x in operands for t in (x if isinstance(x, list) else [x]) if t is not None]
    memory = {t.untyped_storage()._cdata for t in flat}
    return all(t.untyped_storage()._cdata in memory for t in (result if isinstance(result, tuple) else (result,)))


# --- what is shown of a node ------------------------------------------------------------------------------------------

_NAMES = {str(p.dtype).removeprefix("torch."): p.name for p in PRECISIONS.values() if not p.quantised}


def _told(node: Node) -> str:
    return _types(plan_list.Shape.of(node).types)


def _types(types: Sequence[Any]) -> str:
    """Operand types; a list of equal ones is counted.

    >>> small = TensorType((2, 3), torch.bfloat16)
    >>> _types([small, None, (small, small)])
    'bf16[2,3], 2×bf16[2,3]'
    """

    def one(type_: Any) -> str:
        if isinstance(type_, tuple):
            counts = collections.Counter(map(one, type_))
            return ", ".join(f"{n}×{text}" if n > 1 else text for text, n in counts.items())
        name, _, rest = str(type_).partition("[")
        return f"{_NAMES.get(name, name)}[{rest}"

    return ", ".join(one(t) for t in types if t is not None)


def _elsewhere(name: str, precision: str) -> str:
    """Operands of an op that only other variants, or the encoder, run: its largest node in a run at this size."""
    labels = (label for label in plan_list.committed()[precision] if label.rpartition("_")[0] == name)
    found = [plan_list.shape(precision, label).types for label in labels]
    found += [plan_list.sampled(name, s, PRECISIONS[precision].dtype).types for s in op.get(name).samples() if s.big]
    return _types(max(found, key=_elements)) if found else ""


def _elements(types: Iterable[Any]) -> int:
    flat = (t for x in types for t in (x if isinstance(x, tuple) else (x,)))
    return sum(math.prod(t.shape) for t in flat if isinstance(t, TensorType))
