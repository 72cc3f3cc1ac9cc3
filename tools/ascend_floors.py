"""Count what a chunk of 14b launches and moves on an Ascend NPU, and write the prediction into docs/performance.md.

    python tools/ascend_floors.py [--write | --check]

The kernels of the backend run on shapes alone; every operator that they give to torch or torch_npu is counted, with
the bytes that it reads and writes. No NPU, nothing measured. ``CARDS`` and ``SHARES`` are the assumptions.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from kernel_report import plan_graphs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helios import op
from helios.backend import Kernel
from helios.fit.costs import LATENT_FRAMES
from helios.graph import Graph, Node, Value
from helios.model.presets import SIZES
from helios.model.vae import frames_of
from helios.passes import expand, fuse
from helios_ascend import AscendBackend, operators

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- tools/ascend_floors.py --write makes what follows -->", "<!-- tools/ascend_floors.py ends -->"
Steps: TypeAlias = tuple[int, int, int]
FRAMES = frames_of(SIZES["14b"].vae, LATENT_FRAMES)
PRODUCTS = ("linear", "patch_embed")
T = 1e12
BODIES, CORE, FUSED = "op bodies", "core kernels", "fused kernels"


@dataclasses.dataclass(frozen=True)
class Card:
    """What is assumed of a device: dense bfloat16 FLOP and bytes a second at their peak."""

    name: str
    peak: float
    memory: float


CARDS = (
    Card("910B, 64 GB (one device is one package)", 320 * T, 1.6 * T),
    Card("910C, one die of two (a device is a die)", 376 * T, 1.6 * T),
    Card("910B4, 32 GB (one device is one package)", 280 * T, 0.8 * T),
)


@dataclasses.dataclass(frozen=True)
class Share:
    """Parts of the peaks that are reached, and seconds that lie between two operators."""

    name: str
    product: float
    attention: float
    convolution: float
    memory: float
    gap: float


SHARES = (Share("slow", 0.60, 0.40, 0.30, 0.60, 8e-6), Share("fast", 0.80, 0.65, 0.50, 0.80, 2e-6))


@dataclasses.dataclass(frozen=True)
class Work:
    """One node: its op, FLOP of its products, and each operator's bytes, in order."""

    op: str
    flops: int
    moved: tuple[int, ...]

    def seconds(self, card: Card, share: Share) -> float:
        """Its operators one after the other; the longest of a product's is by arithmetic or by memory."""
        times = [moved / (card.memory * share.memory) for moved in self.moved]
        if self.flops:
            kind = share.attention if self.op == "attention" else share.convolution
            rate = card.peak * (share.product if self.op in PRODUCTS else kind)
            at = max(range(len(times)), key=times.__getitem__)
            times[at] = max(times[at], self.flops / rate)
        return sum(times) + share.gap * len(times)


class Launches(TorchDispatchMode):
    """Notes the bytes of every operator that computes or moves something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "_reshape_alias", "detach"))):
            self.note(args, kwargs or {}, result)
        return result

    def note(self, *things: Any) -> None:
        self.moved.append(sum(x.nbytes for x in _tensors(things)))


def _tensors(things: Any) -> Iterator[Tensor]:
    if isinstance(things, Tensor):
        yield things
    elif isinstance(things, Mapping):
        yield from _tensors(list(things.values()))
    elif isinstance(things, list | tuple):
        for thing in things:
            yield from _tensors(thing)


class Shapes:
    """``torch.ops.npu`` on shapes."""

    def __init__(self, launches: Launches) -> None:
        self._launches = launches

    def __getattr__(self, name: str) -> Any:
        def call(x: Tensor, *rest: Any, **_: Any) -> Any:
            with torch.utils._python_dispatch._disable_current_modes():
                out = [torch.empty_like(x) for _ in range(operators.TABLE[name].outputs)]
            # Sums of softmax and the like are a number a row at most; a sum that is asked for is as large as x.
            large = [out[0], out[-1]] if name == "npu_add_layer_norm" else out[:1]
            self._launches.note(x, rest, large)
            return out[0] if len(out) == 1 else tuple(out)

        return call


@contextlib.contextmanager
def on_shapes(launches: Launches) -> Iterator[None]:
    """Within, the kernels' operators take tensors of the meta device."""
    namespace: dict[str, Any] = vars(torch.ops)
    version, npu = operators.version, namespace.get("npu")
    operators.version = lambda: (2, 13)  # type: ignore[assignment]
    namespace["npu"] = Shapes(launches)
    try:
        with launches:
            yield
    finally:
        operators.version = version
        namespace.pop("npu")
        if npu is not None:
            namespace["npu"] = npu


def lowered(graph: Graph, fusions: Sequence[str]) -> Graph:
    """As this backend would get it, with these fused ops."""
    backend = AscendBackend()
    whole, _ = expand(graph, lambda node: False)
    return fuse(whole, fusions, backend.supports)[0]


@functools.cache
def counted(form: str = FUSED) -> Mapping[str, tuple[Work, ...]]:
    """The nodes of every graph of a chunk."""
    fusions = AscendBackend.fusions if form == FUSED else ()
    return {name: tuple(_graph(lowered(graph, fusions), form)) for name, graph in plan_graphs().items()}


def _graph(graph: Graph, form: str) -> Iterator[Work]:
    kernels = AscendBackend().kernels
    env: dict[str, Any] = {v.name: _meta(v) for v in graph.inputs}
    for node in graph.nodes:
        if not node.inputs:
            env.update((v.name, _meta(v)) for v in node.outputs)
            continue
        operands = [_operand(x, env) for x in node.inputs]
        kernel = kernels[node.op] if form != BODIES else Kernel(op.get(node.op).fn)
        results, moved = _launched(node, kernel, operands)
        env.update(zip((v.name for v in node.outputs), results, strict=True))
        if form == BODIES and node.op == "attention":
            moved = (sum(moved[:1]),)  # torch_npu gives torch's attention to one fused operator
        yield Work(node.op, op.cost(node).flops, moved)


def _meta(value: Value) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _operand(operand: Any, env: Mapping[str, Any]) -> Any:
    if operand is None or isinstance(operand, Value):
        return None if operand is None else env[operand.name]
    return [env[v.name] for v in operand]


def _launched(node: Node, kernel: Kernel, operands: list[Any]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """What a node gives, and the bytes of what it launches; what is prepared at load counts as nothing."""
    attrs, launches = dict(node.attrs), Launches()
    names = [o.name for o in op.get(node.op).operands]
    with on_shapes(Launches()), torch.no_grad():
        if kernel.prepare is not None:
            packed = [x if n in kernel.weights else None for n, x in zip(names, operands, strict=True)]
            rest = [x for n, x in zip(names, operands, strict=True) if n not in kernel.weights]
            operands = [kernel.prepare(*packed, **attrs), *rest]
    with on_shapes(launches), torch.no_grad():
        result = kernel.run(*operands, **attrs)
    return (result if isinstance(result, tuple) else (result,)), tuple(launches.moved)


def chunk(steps: Sequence[int], form: str = FUSED) -> Iterator[Work]:
    """Everything of a chunk, decoding included, without guidance."""
    graphs = counted(form)
    yield from (*graphs["chunk"], *graphs["shrink"], *graphs["decode"])
    for stage, count in enumerate(steps):
        yield from graphs.get(f"enter.{stage}", ())
        for _ in range(count):
            yield from (*graphs[f"denoise.{stage}"], *graphs[f"step.{stage}"])


def launches(work: Iterable[Work]) -> int:
    """Operators that the host queues."""
    return sum(len(one.moved) for one in work)


def gigabytes(work: Iterable[Work]) -> float:
    """That they read and write."""
    return sum(sum(one.moved) for one in work) / 1e9


def fps(card: Card, share: Share, steps: Steps) -> float:
    """Frames a second of steady chunks."""
    return FRAMES / sum(one.seconds(card, share) for one in chunk(steps))


def section() -> str:
    """What the document says."""
    return "\n".join([*_launch_table(), "", *_op_table(), "", *_fps_table()])


def _launch_table() -> Iterator[str]:
    yield "| a chunk, decoding included | operators [1, 1, 1] | GB | operators [2, 2, 2] | GB | one step of stage 2 |"
    yield "| --- | --- | --- | --- | --- | --- |"
    titles = {
        BODIES: "before: op bodies, torch's operators one by one",
        CORE: "kernels of core ops, nothing fused",
        FUSED: "after: with the fused ops",
    }
    for form, title in titles.items():
        cells = [f"{launches(chunk(s, form))} | {gigabytes(chunk(s, form)):.0f}" for s in ((1, 1, 1), (2, 2, 2))]
        yield f"| {title} | {' | '.join(cells)} | {launches(counted(form)['denoise.2'])} |"


def _op_table() -> Iterator[str]:
    yield "| op | nodes of a chunk [1, 1, 1] | operators | TFLOP | GB |"
    yield "| --- | --- | --- | --- | --- |"
    by_op: dict[str, list[Work]] = {}
    for one in chunk((1, 1, 1)):
        if one.moved:
            by_op.setdefault(one.op, []).append(one)
    ordered = sorted(by_op.items(), key=lambda item: (-sum(w.flops for w in item[1]), -gigabytes(item[1])))
    for name, found in ordered[:14]:
        flops = sum(one.flops for one in found) / T
        yield f"| `{name}` | {len(found)} | {launches(found)} | {flops:.1f} | {gigabytes(found):.1f} |"


def _fps_table() -> Iterator[str]:
    yield "| *prediction*, frames a second | [1, 1, 1] | [2, 2, 2] |"
    yield "| --- | --- | --- |"
    for card in CARDS:
        cells = ["–".join(f"{fps(card, share, s):.1f}" for share in SHARES) for s in ((1, 1, 1), (2, 2, 2))]
        yield f"| {card.name} | {' | '.join(cells)} |"


def main() -> int:
    """Print, write or check the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    text = DOCUMENT.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    old, ended, after = rest.partition(END)
    if not (found and ended):
        sys.exit(f"{DOCUMENT} has no place for it: {BEGIN} … {END}")
    new = f"\n{section()}\n"
    if asked.write:
        DOCUMENT.write_text(f"{before}{BEGIN}{new}{END}{after}", encoding="utf-8")
    elif not asked.check:
        print(new)
    return int(asked.check and old != new)


if __name__ == "__main__":
    sys.exit(main())
