"""What is bound by bytes or by launches: copies on the device and over the bus, empty kernels, eager elementwise."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import shapes
import torch
import torch.nn.functional as F
from results import Item, Record
from rig import BOUNDS, Rig, Trial, error_of, spread_of, take
from timing import Timing, measure
from torch import Tensor

__all__ = ["bus", "device_copies", "elementwise", "launches"]

MIB = 2**20


def device_copies(rig: Rig) -> Iterator[Item]:
    """From device memory to device memory; bytes read and bytes written both count."""
    for moved in (8192, 1024):
        nbytes = moved // 2 * (1024 if rig.tiny else MIB)
        row = f"{moved} {'KiB' if rig.tiny else 'MiB'} read and written"
        yield Item(
            f"copy/device/{moved}",
            f"device copy, {row}",
            row,
            "device",
            functools.partial(_copy, rig, nbytes),
            fields={"shape": [nbytes // 2], "dtype": "bfloat16"},
        )


def _copy(rig: Rig, nbytes: int) -> Record:
    source = rig.normal(nbytes // 2)
    target = torch.empty_like(source)
    # Of a copy only equality is right: the last elements, and some before.
    trial = Trial([lambda: target.copy_(source)], 0, 2 * nbytes, lambda out: error_of(out[-4096:], source[-4096:]))
    return take(rig, trial)


def bus(rig: Rig) -> Iterator[Item]:
    """Between pinned host memory and the device: a block's weights in bf16 and fp8, and the frames of a chunk."""
    weights = shapes.weights_of_block(rig.tiny)
    run = shapes.setting(rig.tiny)
    sizes = {"a block in bf16": 2 * weights, "a block in fp8": weights, "33 frames": 33 * 3 * run.height * run.width}
    for name, nbytes in sizes.items():
        for column in ("to device", "to host", "both at once"):
            yield Item(
                f"bus/{column}/{name}",
                f"pinned memory, {name}, {nbytes / 1e6:.1f} MB, {column}",
                name,
                column,
                functools.partial(_bus, rig, nbytes, column),
                seconds=8.0,
                fields={"shape": [nbytes], "dtype": "uint8"},
            )


def _bus(rig: Rig, nbytes: int, column: str) -> Record:
    rig.need_cuda("a copy over the bus")
    up, down = (torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=rig.device) for _ in range(2))
    host_up, host_down = (torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    host_up.copy_(down.flip(0))
    side = torch.cuda.Stream()

    def both() -> Tensor:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            host_down.copy_(down, non_blocking=True)
        up.copy_(host_up, non_blocking=True)
        torch.cuda.current_stream().wait_stream(side)
        return up

    calls: dict[str, Callable[[], Tensor]] = {
        "to device": lambda: up.copy_(host_up, non_blocking=True),
        "to host": lambda: host_down.copy_(down, non_blocking=True),
        "both at once": both,
    }

    def check(_: Tensor) -> float:
        torch.cuda.synchronize()
        pairs = {"to device": [(up, host_up)], "to host": [(host_down, down)]}
        wanted = pairs.get(column, [pair for both_ in pairs.values() for pair in both_])
        return max(error_of(out[-4096:].cpu(), source[-4096:].cpu()) for out, source in wanted)

    return take(rig, Trial([calls[column]], 0, nbytes * (2 if column == "both at once" else 1), check))


def launches(rig: Rig) -> Iterator[Item]:
    """The cost of a kernel that does nothing to speak of, one after the other, and as a node of a CUDA graph."""
    count = 50 if rig.tiny else 1000
    for column, run in (("eager", _eager), ("host alone", _host), ("node of a graph", _graph)):
        yield Item(
            f"launch/{column}/{count}",
            f"one of {count} kernels on one number each, {column}",
            f"one of {count} launches",
            column,
            functools.partial(run, rig, count),
            fields={"shape": [1], "dtype": "float32"},
        )


def _adds(x: Tensor, count: int) -> Tensor:
    for _ in range(count):
        x.add_(1.0)
    return x


def _each(timing: Timing, count: int) -> Record:
    each = Timing(timing.median / count, timing.least / count, timing.most / count, timing.n)
    return {**each.record(), "microseconds": 1e3 * each.median}


def _eager(rig: Rig, count: int) -> Record:
    x = rig.normal(1, dtype=torch.float32)
    return _each(measure([lambda: _adds(x, count)], rig.device, rig.seconds), count)


def _host(rig: Rig, count: int) -> Record:
    """What the host needs for a launch while the device keeps up."""
    x = rig.normal(1, dtype=torch.float32)
    times = []
    for _ in range(12):
        if rig.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        _adds(x, count)
        times.append(1e3 * (time.perf_counter() - start))
    return _each(Timing.of(times[2:]), count)


def _graph(rig: Rig, count: int) -> Record:
    rig.need_cuda("a CUDA graph")
    x = torch.zeros(1, device=rig.device)
    _adds(x, 3)  # the kernel has to be loaded before a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _adds(x, count)
    before = x.item()
    graph.replay()
    right = x.item() == before + count
    return {**_each(measure([graph.replay], rig.device, rig.seconds), count), "correct": right}


def elementwise(rig: Rig) -> Iterator[Item]:
    """Eager chains at the tokens of the finest stage, over the bytes that one pass would move."""
    product = shapes.products(rig.tiny)[0]
    for name, run in (("adaln", _adaln), ("gated_add", _gated_add)):
        yield Item(
            f"elementwise/{name}/{product.m}x{product.k}",
            f"{name} at [{product.m}, {product.k}], a chain of torch's own; the rate counts one pass's bytes",
            f"{name} {product.m}×{product.k}",
            "eager",
            functools.partial(run, rig, product.m, product.k),
            fields={"shape": [product.m, product.k], "dtype": "bfloat16"},
        )


def _adaln(rig: Rig, tokens: int, width: int) -> Record:
    """LayerNorm without parameters and a modulation, in float32; reads and writes bf16."""

    def chain(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (F.layer_norm(x.float(), (width,), eps=1e-6) * (1 + scale) + shift).to(x.dtype)

    sets = rig.sets(lambda: (rig.normal(tokens, width), *(rig.normal(width, dtype=torch.float32) for _ in range(2))))
    x, scale, shift = sets[0]

    def check(out: Tensor) -> float:
        rows = spread_of(tokens)
        ref = F.layer_norm(x[rows].double(), (width,), eps=1e-6) * (1 + scale.double()) + shift.double()
        return error_of(out[rows], ref)

    calls = [functools.partial(chain, *s) for s in sets]
    return take(rig, Trial(calls, 0, 4 * tokens * width, check, BOUNDS["bfloat16"]))


def _gated_add(rig: Rig, tokens: int, width: int) -> Record:
    """``x + y · gate`` in float32; reads and writes bf16."""

    def chain(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return (x.float() + y.float() * gate).to(x.dtype)

    sets = rig.sets(
        lambda: (rig.normal(tokens, width), rig.normal(tokens, width), rig.normal(width, dtype=torch.float32))
    )
    x, y, gate = sets[0]

    def check(out: Tensor) -> float:
        rows = spread_of(tokens)
        return error_of(out[rows], x[rows].double() + y[rows].double() * gate.double())

    calls = [functools.partial(chain, *s) for s in sets]
    return take(rig, Trial(calls, 0, 6 * tokens * width, check, BOUNDS["bfloat16"]))
