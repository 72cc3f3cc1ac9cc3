"""The ceilings of a device on Helios' shapes, measured: matrix products, attention, convolution, copies.

Each is measured through torch on the backend's device, where torch addresses it, and through the backend's own kernels
as graphs of one node. Sustained: random normals, a second or more of work, the device waited for at the end of each
window. The median window is the rate; the best one bounds what the timed run may claim.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helios import op
from helios.backend import Backend
from helios.errors import HeliosError
from helios.fit.costs import LATENT_FRAMES, Setting, stage_graphs
from helios.graph import Graph, TensorType, Value
from helios.model.vae import decode_graph
from helios.model.vae_precision import VAE_DTYPES, choose_vae_precision
from helios_conformance import draws
from helios_conformance.one_node import OneNode
from helios_conformance.realtime.golden import setting_of
from helios_conformance.realtime.options import Options
from helios_conformance.session import Session

__all__ = ["KINDS", "Shape", "decoder", "kind_of", "measure", "shapes", "sustained"]

KINDS = ("linear", "attention", "conv3d", "copy")

_MOST = {"linear": 3, "attention": 2, "conv3d": 4}
"""Shapes of each kind, those with the most FLOPs of the model first."""

LARGEST = 4 << 30
"""Bytes of operands and result beyond which a shape is left out."""


def kind_of(name: str) -> str | None:
    """The kind of ceiling that an op's FLOPs stand under, by the op's name; None for another op.

    >>> kind_of("qkv_linear"), kind_of("attention"), kind_of("rms_norm")
    ('linear', 'attention', None)
    """
    if "attention" in name:
        return "attention"
    if "conv" in name:
        return "conv3d"
    return "linear" if "linear" in name or "patch" in name or "embed" in name else None


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """One thing to measure.

    Attributes:
        what: of ``KINDS``.
        types: of the operands; None for one that is not there.
        attrs: of the op.
        flops, moved: of one evaluation; a copy has no FLOPs.
    """

    what: str
    types: tuple[TensorType | None, ...]
    attrs: tuple[tuple[str, Any], ...]
    flops: int
    moved: int

    def __str__(self) -> str:
        dims = ["×".join(map(str, t.shape)) for t in self.types if t is not None and len(t.shape) > 1]
        return f"{' · '.join(dict.fromkeys(dims))} {self.dtype}"

    @property
    def dtype(self) -> str:
        first = self.types[0]
        assert first is not None
        return str(first.dtype).removeprefix("torch.")


def shapes(options: Options, variant: str, precision: str, decoding: torch.dtype = torch.float32) -> list[Shape]:
    """The shapes of the size under test that have the most FLOPs, and a copy of its widest activation.

    ``decoding``: of the VAE, whose convolutions bound what a run in that dtype may claim.
    """
    setting = dataclasses.replace(setting_of(options, variant, precision), decoding=decoding)
    found: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0])
    # Decoders are cut into groups of latents, as memory allows: the least group and the whole are both measured.
    for graph in (*stage_graphs(setting).values(), decoder(setting, 1), decoder(setting)):
        for node in graph.nodes:
            if node.op in _MOST:
                key = (node.op, tuple(None if x is None else _type(x) for x in node.inputs), node.attrs)
                cost = op.cost(node)
                if cost.bytes > LARGEST:
                    continue
                found[key][0] += cost.flops
                found[key][1:] = [cost.flops, cost.bytes]
    made = []
    for what, most in _MOST.items():
        ranked = sorted((k for k in found if k[0] == what), key=lambda k: -found[k][0])
        made += [Shape(key[0], key[1], key[2], found[key][1], found[key][2]) for key in ranked[:most]]
    return [*made, _copy(setting)]


def _type(operand: Any) -> TensorType:
    assert isinstance(operand, Value)
    return operand.type


def decoder(setting: Setting, latents: int = LATENT_FRAMES) -> Graph:
    """The decoder of one chunk in one pass, or of a group of latents after the first."""
    whole = latents == LATENT_FRAMES
    return decode_graph(
        setting.size.vae,
        batch=setting.batch,
        latents=latents,
        height=setting.height,
        width=setting.width,
        dtype=setting.decoding,
        first=whole,
        caches=not whole,
    )


def _copy(setting: Setting) -> Shape:
    """Residual streams of the last stage, as many as make 64 MiB at least, so that no cache holds them."""
    stage = stage_graphs(setting, [setting.stages - 1])
    widest = max((v.type for g in stage.values() for n in g.nodes for v in n.outputs), key=lambda t: t.nbytes)
    times = max(1, math.ceil((64 << 20) / widest.nbytes))
    type_ = TensorType((times, math.prod(widest.shape)), widest.dtype)
    return Shape("copy", (type_, type_), (), 0, 2 * type_.nbytes)


def measure(session: Session, precision: str, variant: str) -> list[dict[str, Any]]:
    """Every ceiling, one row a shape and a way to reach it.

    Rows have ``what``, ``shape``, ``dtype``, ``rate`` (median window) and ``best``, ``unit`` (``FLOP/s`` or ``B/s``),
    ``seconds`` and ``windows`` of work, and ``source``. A way that is closed has ``rate`` None and ``why``.
    """
    options = Options.of(session.options)
    decoding = VAE_DTYPES[choose_vae_precision(None, precision, session.backend)]
    rows = []
    for shape in shapes(options, variant, precision, decoding):
        tensors = [None if t is None else _random(session, shape, i, t) for i, t in enumerate(shape.types)]
        for source, make in (
            (f"torch on {session.backend.device}", _through_torch),
            ("the backend's own kernel", _through_kernel),
        ):
            told: dict[str, Any] = {"what": shape.what, "shape": str(shape), "dtype": shape.dtype, "source": source}
            rows.append(told | _row(session, shape, make, tensors, options.ceiling))
    return rows


def _random(session: Session, shape: Shape, index: int, type_: TensorType) -> Tensor:
    drawn = draws.normal(session.root.key("ceiling", shape.what, index), type_.shape, type_.dtype)
    if index and shape.what in ("linear", "conv3d") and len(type_.shape) > 1:
        drawn = drawn * math.prod(type_.shape[1:]) ** -0.5  # weights of the model's own scale: speed depends on values
    return drawn.to(session.backend.device)


Way = Callable[[Session, Shape, list[Tensor | None]], tuple[Callable[[], Any], int]]


def _row(session: Session, shape: Shape, make: Way, tensors: list[Tensor | None], budget: float) -> dict[str, Any]:
    unit = "FLOP/s" if shape.flops else "B/s"
    try:
        with torch.no_grad(), _no_tf32(session.backend):
            call, work = make(session, shape, tensors)
            windows = sustained(call, session.backend, budget)
    except (HeliosError, RuntimeError, NotImplementedError) as error:
        return {"rate": None, "best": None, "unit": unit, "why": f"{type(error).__name__}: {error}"[:300]}
    rates = [work * calls / seconds for calls, seconds in windows]
    seconds = sum(seconds for _, seconds in windows)
    told = {"rate": statistics.median(rates), "best": max(rates), "unit": unit}
    return told | {"seconds": seconds, "windows": len(windows)}


@contextlib.contextmanager
def _no_tf32(backend: Backend) -> Iterator[None]:
    """torch's convolutions take TF32 for float32 unless told not to; the budgets of this suite refuse it."""
    if backend.device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def _through_torch(session: Session, shape: Shape, tensors: list[Tensor | None]) -> tuple[Callable[[], Any], int]:
    """torch's own op on the device, and the FLOPs or bytes of a call."""
    x, y, z = (*tensors, None, None)[:3]
    attrs = dict(shape.attrs)
    assert x is not None
    assert y is not None
    if shape.what == "copy":
        return lambda: y.copy_(x), shape.moved
    if shape.what == "linear":
        return lambda: F.linear(x, y, z), shape.flops
    if shape.what == "conv3d":
        return lambda: F.conv3d(x, y, z, stride=attrs["stride"], padding=attrs["padding"]), shape.flops
    assert z is not None
    q, k, v = (t.transpose(1, 2).contiguous() for t in (x, y, z))
    return lambda: F.scaled_dot_product_attention(q, k, v, scale=attrs["scale"]), shape.flops


def _through_kernel(session: Session, shape: Shape, tensors: list[Tensor | None]) -> tuple[Callable[[], Any], int]:
    """A program of one node, weights packed as the backend packs them. Of copies there is the sum of two streams."""
    name = "add" if shape.what == "copy" else shape.what
    node = OneNode.of(name, list(shape.types), dict(shape.attrs))
    program = node.load(session, tensors)
    moved = 3 * shape.moved // 2  # an add reads two
    return lambda: node.run(program, tensors), shape.flops or moved


def sustained(call: Callable[[], Any], backend: Backend, budget: float) -> list[tuple[int, float]]:
    """Calls and seconds of each window, after one call to warm up.

    Windows take a tenth of the budget, or one call where that takes longer; there are enough for the budget, and three
    unless three take several times as long.
    """
    once = _window(call, backend, 1)
    once = min(once, _window(call, backend, 1)) if once < budget else once
    calls = max(1, math.ceil(budget / 10 / max(once, 1e-7)))
    windows: list[tuple[int, float]] = []
    spent = 0.0
    while spent < budget or (len(windows) < 3 and spent < 3 * budget):
        seconds = _window(call, backend, calls)
        windows.append((calls, seconds))
        spent += seconds
    return windows


def _window(call: Callable[[], Any], backend: Backend, calls: int) -> float:
    backend.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    backend.synchronize()
    return max(time.perf_counter() - begin, 1e-9)
