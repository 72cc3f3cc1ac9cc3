"""What the plan of a chunk asks of the backend: every op with the sizes and layouts of its operands, once a form.

Layouts are those that the kernels really leave: the plan is replayed without memory, and each kernel's operands noted.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import shapes
import torch
from torch import Tensor

from helios import op
from helios.backend import Kernel
from helios.fit.costs import LATENT_FRAMES
from helios.graph import Graph, Node, Value
from helios.lower import plan_for
from helios.model.vae import decode_graph
from helios.pipeline.denoise import Layout as RunLayout
from helios.pipeline.denoise import denoise_graphs
from helios.pipeline.history import Window
from helios.precision import precision
from helios_cuda import CudaBackend, convolution, offline, scaled, tables
from helios_cuda.launch import Launch, recording

__all__ = ["Form", "Layout", "call_of", "forms", "heaviest", "launches", "plain_kernels", "plan_nodes", "saved"]

E4M3, LARGEST = torch.float8_e4m3fn, 448.0


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How an operand lies in memory: shape, strides and offset in elements, dtype."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        """That of a tensor."""
        return cls(tuple(x.shape), tuple(x.stride()), int(x.storage_offset()), x.dtype)

    @property
    def extent(self) -> int:
        """Elements of memory from its beginning."""
        return self.offset + 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True) if n)

    def made(self, device: torch.device, scale: float = 1.0) -> Tensor:
        """A tensor that lies so: normal numbers by ``scale``, of e4m3 up to the largest; whole numbers are zeros."""
        memory = torch.empty(self.extent, device=device, dtype=self.dtype)
        if self.dtype == E4M3 and device.type != "meta":
            memory.copy_(torch.empty(self.extent, device=device).normal_().mul_(LARGEST / 4).clamp_(-LARGEST, LARGEST))
        elif self.dtype.is_floating_point and device.type != "meta":
            memory.normal_().mul_(scale)
        elif device.type != "meta":
            memory.zero_()
        return memory.as_strided(self.shape, self.stride, self.offset)


Operand: TypeAlias = "Layout | tuple[Layout, ...] | None"


@dataclasses.dataclass
class Form:
    """One op on operands that lie in one way.

    Attributes:
        node: one of those that have this form.
        operands: in the order of the op.
        moved: bytes that it must read and write.
        counts: how many nodes each graph has, by the graph's name.
    """

    node: Node
    operands: tuple[Operand, ...]
    moved: int
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @functools.cached_property
    def flops(self) -> int:
        """Of products and convolutions."""
        return op.cost(self.node).flops

    @property
    def dtype(self) -> torch.dtype:
        """Of its first result."""
        return self.node.outputs[0].dtype

    @property
    def name(self) -> str:
        """In tables: the op, its first operands and the dtype; a digest tells forms apart that look alike."""
        first = [x for x in self.operands if isinstance(x, Layout)][:2]
        sizes = " ".join("×".join(map(str, x.shape)) for x in first)
        dtype = str(self.dtype).removeprefix("torch.")
        told = repr((self.operands, self.node.attrs))
        return f"{self.node.op} {sizes} {dtype} {hashlib.sha256(told.encode()).hexdigest()[:4]}"

    def made(self, device: torch.device) -> list[Any]:
        """Operands: matrices and kernels of the scale that keeps their results near one; positive scales of rows."""
        names = [operand.name for operand in op.get(self.node.op).operands]
        numbers = any(isinstance(x, Layout) and x.dtype == E4M3 for x in self.operands)

        def one(name: str, layout: Operand) -> Any:
            if isinstance(layout, tuple):
                return [x.made(device) for x in layout]
            if layout is None:
                return None
            if numbers and name.endswith("scale"):
                return layout.made(device, 4 / LARGEST).abs_()
            weight = name.startswith("w") and len(layout.shape) > 1
            return layout.made(device, math.prod(layout.shape[1:]) ** -0.5 if weight else 1.0)

        return [one(name, layout) for name, layout in zip(names, self.operands, strict=False)]


def plan_nodes(tiny: bool, vae: torch.dtype = torch.bfloat16, name: str = "bf16") -> Mapping[str, Graph]:
    """The graphs of a chunk as the CUDA backend gets them, by name; the decoder's, ``decode``, in the dtype ``vae``.

    Args:
        name: of the transformer's precision; a quantised one has no graph of the decoder beside that of its dtype.
    """
    setting, of = shapes.setting(tiny), precision(name)
    variant = setting.variant
    layout = RunLayout(setting.batch, *setting.latent, setting.text_tokens, Window())
    graphs = denoise_graphs(setting.size.transformer, variant.scheduler, variant.pipeline, layout, of)
    sizes = {"batch": setting.batch, "height": setting.height, "width": setting.width}
    if not of.quantised:
        graphs["decode"] = decode_graph(
            setting.size.vae, latents=LATENT_FRAMES, dtype=vae, first=True, caches=False, **sizes
        )
    plan = plan_for(graphs, CudaBackend())
    return {name: graph for name, graph in plan.graphs.items() if name not in ("weights", "prompt")}


def plain_kernels() -> dict[str, Kernel]:
    """The backend's kernels, with convolutions and products of e4m3 numbers always by our own: a replay must choose and
    record nothing."""
    kernels = dict(CudaBackend().kernels)
    kernels |= {name: _unrecorded(kernels[name]) for name in scaled.OPS}
    conv = convolution.KERNELS["conv3d"]

    def run(w: Any, x: Tensor, *, stride: tuple[int, int, int], padding: tuple[int, int, int]) -> Any:
        return convolution.VARIANTS[0].run(x, w, stride, padding)

    return {**kernels, "conv3d": Kernel(run, conv.prepare, conv.weights)}


def _unrecorded(kernel: Kernel) -> Kernel:
    def run(*operands: Any, **attributes: Any) -> Any:
        known, scaled.CHOICES.record = scaled.CHOICES.record, {}
        try:
            return kernel.run(*operands, **attributes)
        finally:
            scaled.CHOICES.record = known

    return Kernel(run, kernel.prepare, kernel.weights)


def forms(graphs: Mapping[str, Graph], architecture: str) -> list[Form]:
    """Every form of some graphs that moves or computes anything, with how often each graph has it."""
    found: dict[str, Form] = {}
    seen: list[tuple[Operand, ...]] = []
    kernels = plain_kernels()
    spies = {name: _spy(name, kernel, seen) for name, kernel in kernels.items()}
    with tables.assumed(architecture):
        for graph_name, graph in graphs.items():
            for ran in offline.replay(graph, spies):
                if ran.node.inputs and (ran.moved or op.cost(ran.node).flops):
                    form = Form(ran.node, seen[-1], ran.moved - saved(ran.node, kernels[ran.node.op].weights))
                    found.setdefault(form.name, form).counts[graph_name] += 1
                seen.clear()
    return list(found.values())


def saved(node: Node, weights: Sequence[str]) -> int:
    """Bytes that it reads less than its operands have, since matrices are held as e4m3 numbers and scales of rows.

    Args:
        weights: names of the operands that are taken at load.
    """
    if node.op not in ("packed_linear", "quantized_linear", "quantized_qkv_linear"):
        return 0
    named = zip((operand.name for operand in op.get(node.op).operands), node.inputs, strict=False)
    held = [x.type for name, x in named if name in weights and isinstance(x, Value) and len(x.shape) == 2]
    return sum(x.nbytes - math.prod(x.shape) - 4 * x.shape[0] for x in held)


def _spy(name: str, kernel: Kernel, seen: list[tuple[Operand, ...]]) -> Kernel:
    def run(*operands: Any, **attributes: Any) -> Any:
        seen.append(tuple(_layout(x) for x in operands))
        return call_of(name, kernel, operands, attributes)()

    return Kernel(run)


def _layout(x: Any) -> Operand:
    if isinstance(x, Tensor):
        return Layout.of(x)
    return None if x is None else tuple(Layout.of(one) for one in x)


def call_of(name: str, kernel: Kernel, operands: Sequence[Any], attributes: Mapping[str, Any]) -> Callable[[], Any]:
    """The kernel on these operands, what is prepared once prepared already."""
    if kernel.prepare is None:
        return functools.partial(kernel.run, *operands, **attributes)
    names = [operand.name for operand in op.get(name).operands]
    given = list(zip(names, operands, strict=False))
    handle = kernel.prepare(*(x if n in kernel.weights else None for n, x in given), **attributes)
    rest = [x for n, x in given if n not in kernel.weights]
    return functools.partial(kernel.run, handle, *rest, **attributes)


def launches(form: Form, kernel: Kernel, architecture: str) -> list[Launch]:
    """What one way to run a form launches, beside what it prepares once; nothing runs."""
    with tables.assumed(architecture), torch.no_grad():
        with recording():
            call = call_of(form.node.op, kernel, form.made(torch.device("meta")), form.node.attributes)
        with recording() as noted:
            call()
    return noted


def heaviest(found: Iterable[Form], floor: Callable[[Form], float]) -> Iterator[Form]:
    """Forms in the order of what all their nodes in a chunk take at best."""
    yield from sorted(found, key=lambda form: -floor(form) * form.counts.total())
