"""Matrix products with a bias on Helios' shapes: bf16 with and without GELU, fp8, and one kept up for 20 seconds."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import shapes
import torch
import torch.nn.functional as F
from environment import ROOT, smi
from results import Item, Record
from rig import BOUNDS, Rig, Trial, error_of, spread_of, take
from shapes import Product
from torch import Tensor

__all__ = ["bf16", "fp8", "scaled_product", "sustained"]

FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0
OURS = ROOT / "backends" / "cuda" / "helios_cuda" / "kernels" / "scaled_linear.py"


def bf16(rig: Rig) -> Iterator[Item]:
    """A square product as others quote it, then every product of a step; the first half of the FFN with its GELU."""
    side = 64 if rig.tiny else 8192
    for product in (Product("square", side, side, side, 0), *shapes.products(rig.tiny)):
        yield _item(rig, product, "addmm", _addmm, torch.bfloat16)
        if product.gelu:
            yield _item(rig, product, "GELU inside", _gelu_inside, torch.bfloat16)
            yield _item(rig, product, "GELU after", _gelu_after, torch.bfloat16)


def _addmm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x, weight.t())


def _gelu_inside(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # On CUDA this is the tanh form, as the model has it; on the CPU it is erf's, which differs by less than bf16 does.
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


def _gelu_after(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(torch.addmm(bias, x, weight.t()), approximate="tanh")


def _item(
    rig: Rig, product: Product, column: str, call: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype
) -> Item:
    def run() -> Record:
        sets = rig.sets(lambda: _operands(rig, product, dtype))
        x, weight, bias = sets[0]

        def check(out: Tensor) -> float:
            rows = spread_of(product.m)
            ref = x[rows].double() @ weight.double().t() + bias.double()
            return error_of(out[rows], F.gelu(ref, approximate="tanh") if "GELU" in column else ref)

        calls = [functools.partial(call, *s) for s in sets]
        return take(rig, Trial(calls, product.flops, _moved(product, 2), check, BOUNDS["bfloat16"]))

    return _described(product, "gemm", column, "bfloat16", run)


def _described(product: Product, group: str, column: str, dtype: str, run: Callable[[], Record]) -> Item:
    return Item(
        f"{group}/{column}/{product.row}",
        f"[{product.m}, {product.k}] × [{product.k}, {product.n}] + bias, {column}",
        product.row,
        column,
        run,
        counts={product.stage: product.count},
        fields={"shape": [product.m, product.k, product.n], "dtype": dtype},
    )


def _operands(rig: Rig, product: Product, dtype: torch.dtype) -> Sequence[Tensor]:
    weight = rig.normal(product.n, product.k, dtype=dtype, scale=product.k**-0.5)
    return rig.normal(product.m, product.k, dtype=dtype), weight, rig.normal(product.n, dtype=dtype)


def _moved(product: Product, itemsize: int) -> int:
    """Bytes: operands in ``itemsize``, bias and result in bf16."""
    return itemsize * (product.m * product.k + product.k * product.n) + 2 * product.n * (product.m + 1)


def fp8(rig: Rig) -> Iterator[Item]:
    """The products of a step on e4m3 values, shapes outermost, so that ways are compared on the same warm device.

    With a scale a row and a column: torch's with sums promoted to float32, as Helios asks for them, and without; and
    our kernel, whose figure is one of its source. Then, as a ceiling, torch's with one scale a tensor.
    """
    version = hashlib.sha256(OURS.read_bytes()).hexdigest()[:8]
    for product in shapes.products(rig.tiny):
        for column, call, by_row, of in (
            ("fp8 rows, full sum", functools.partial(scaled_product, fast=False), True, ""),
            ("fp8 rows, fast sum", functools.partial(scaled_product, fast=True), True, ""),
            ("fp8 rows, Triton", _ours, True, version),
            ("fp8 tensor", functools.partial(scaled_product, fast=True), False, ""),
        ):
            run = _fp8_run(rig, product, call, by_row)
            item = _described(product, "gemm", column, "float8_e4m3fn", run)
            yield dataclasses.replace(item, id=f"{item.id}/{of}") if of else item


def _fp8_run(rig: Rig, product: Product, call: Callable[..., Tensor], by_row: bool) -> Callable[[], Record]:
    def run() -> Record:
        rig.need_cuda("an fp8 product")
        sets = rig.sets(lambda: quantised(*_operands(rig, product, torch.bfloat16), by_row=by_row))
        x, weight, scale_x, scale_w, bias = sets[0]

        def check(out: Tensor) -> float:
            rows = spread_of(product.m)
            left = x[rows].double() * (scale_x[rows] if by_row else scale_x).double()
            return error_of(out[rows], left @ (weight.double() * scale_w.double()).t() + bias.double())

        calls = [functools.partial(call, *s) for s in sets]
        trial = Trial(calls, product.flops, _moved(product, 1), check, BOUNDS["float8_e4m3fn"], "float8_e4m3fn")
        return take(rig, trial)

    return run


def _ours(x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor) -> Tensor:
    from helios_cuda.kernels.scaled_linear import scaled_linear  # which imports Triton

    return scaled_linear(x, scale_x.view(-1), weight, scale_w.view(-1), bias, torch.bfloat16)


def quantised(x: Tensor, weight: Tensor, bias: Tensor, *, by_row: bool) -> Sequence[Tensor]:
    """e4m3 ``x`` and ``weight``, their float32 scales (of each row, ``[m, 1]`` and ``[n, 1]``, or one each), bias."""
    pairs = []
    for tensor in (x, weight):
        wide = tensor.float()
        scale = (wide.abs().amax(1, keepdim=True) if by_row else wide.abs().amax()) / LARGEST_FP8
        pairs.append(((wide / scale).to(FP8), scale))
    (x8, scale_x), (weight8, scale_w) = pairs
    return x8, weight8, scale_x, scale_w, bias


def scaled_product(x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor, *, fast: bool) -> Tensor:
    """torch's scaled product: ``x`` ``[m, k]`` rows, ``weight`` ``[n, k]``, which is its column-major right side."""
    scale_b = scale_w.reshape(1, -1) if scale_w.ndim else scale_w
    return torch._scaled_mm(
        x, weight.t(), scale_a=scale_x, scale_b=scale_b, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def sustained(rig: Rig) -> Iterator[Item]:
    """The largest product of a step over and over: what the chip holds once it is warm."""
    seconds = 0.05 if rig.tiny else 20.0
    product = max(shapes.products(rig.tiny), key=lambda p: p.flops * p.count)
    yield Item(
        f"sustained/addmm/{product.row}",
        f"[{product.m}, {product.k}] × [{product.k}, {product.n}] for {seconds:g} s",
        f"{product.row}, {seconds:g} s",
        "addmm",
        lambda: _sustain(rig, product, seconds),
        seconds=seconds + 5,
        fields={"shape": [product.m, product.k, product.n], "dtype": "bfloat16"},
    )


def _sustain(rig: Rig, product: Product, seconds: float) -> Record:
    sets = rig.sets(lambda: _operands(rig, product, torch.bfloat16))
    samples: list[dict[str, str]] = []
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(samples, stop), daemon=True)
    if rig.cuda:
        watcher.start()
    begun = time.monotonic()
    times: list[float] = []  # ms of one product, a figure for each batch of them
    while (now := time.monotonic()) - begun < seconds or not times:
        for i in range(100 if rig.cuda else 1):
            _addmm(*sets[i % len(sets)])
        if rig.cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.monotonic() - now) / (100 if rig.cuda else 1))
    stop.set()
    if rig.cuda:
        watcher.join(timeout=30)
    return _summary(rig, product, times, samples)


def _summary(rig: Rig, product: Product, times: list[float], samples: list[dict[str, str]]) -> Record:
    late = statistics.median(times[-max(1, len(times) // 4) :])
    early = statistics.median(times[1 : max(2, len(times) // 20)] or times)
    rate = product.flops / 1e9
    return {
        "ms_median": late,
        "ms_min": min(times),
        "ms_max": max(times),
        "n": len(times),
        "flops": product.flops,
        "tflops": rate / late,
        "tflops_at_first": rate / early,
        "samples": samples,
        "share_of_peak_note": rig.share(rate / late, None, "bfloat16"),
    }


def _watch(samples: list[dict[str, str]], stop: threading.Event) -> None:
    """Clocks and power, about once a second, as far as they can be read."""
    while not stop.is_set():
        samples.append(smi("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active"))
        stop.wait(1.0)
