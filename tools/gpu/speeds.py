"""How long each op takes on the forms of a chunk, against its floor; and which libraries the backend chooses there."""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from forms import Form, call_of
from rates import Rates
from results import Item, Record
from rig import Rig
from timing import measure, rotations
from torch import Tensor

from helios.errors import BackendError
from helios_cuda import CudaBackend, convolution, scaled
from helios_cuda.arithmetic import as_declared
from helios_cuda.attention_libraries import Form as AttentionForm
from helios_cuda.attention_libraries import describe

__all__ = ["QUANTISED", "STEPS", "choices", "nbytes_of", "recall", "report", "speeds", "times"]

STEPS = {
    **dict.fromkeys(("chunk", "shrink", "enter.1", "enter.2", "decode"), 1),
    **{f"{kind}.{i}": 1 for kind in ("denoise", "step") for i in range(3)},
}
"""How often a chunk at [1, 1, 1] runs each graph, without guidance."""
QUANTISED = ("fp8-attention", "fp8-weights")
"""Precisions whose denoising is measured beside that in bf16; their graphs are named ``denoise.0 fp8-weights``."""
ROWS = 25

Key: TypeAlias = "AttentionForm | convolution.Form | scaled.Form"


def times(counts: Mapping[str, int], precision: str = "") -> int:
    """Nodes in a chunk at [1, 1, 1].

    Args:
        counts: how many each graph has.
        precision: that quantises; none for bf16.
    """
    named = f" {precision}" if precision else ""
    return sum(n * counts.get(graph if graph == "decode" else graph + named, 0) for graph, n in STEPS.items())


def _key(form: Form) -> Key | None:
    """What the backend chooses a library for; None for other ops."""
    if form.node.op == "attention":
        return AttentionForm.of(*form.node.inputs[:2])  # type: ignore[arg-type]
    if form.node.op in scaled.OPS:
        return scaled.Form.of(form.node)
    return convolution.Form.of(form.node) if form.node.op == "conv3d" else None


def _kind(form: Form) -> str:
    """As plans call what is chosen."""
    return {"attention": "attention", "conv3d": "convolution"}.get(form.node.op, "scaled")


def choices(rig: Rig, backend: CudaBackend, forms: Sequence[Form]) -> Iterator[Item]:
    """Attention, convolutions, then products of e4m3 numbers: each library measured, and which is chosen."""
    keyed = {str(key): (form, key) for form in forms if (key := _key(form)) is not None}
    for name, (form, key) in sorted(keyed.items(), key=lambda entry: entry[1][0].node.op):
        kind = _kind(form)
        yield Item(
            f"choice/{kind}/{name}",
            "which library",
            name,
            kind,
            functools.partial(_choose, rig, backend, kind, key),
            seconds=15.0,
            counts=dict(form.counts),
        )


def _choose(rig: Rig, backend: CudaBackend, kind: str, key: Any) -> Record:
    rig.need_cuda("a choice by measurement")
    if kind == "attention":
        backend.attention.settle([key])
        entry = backend.attention.plan[str(key)]
        return {"chosen": entry["library"], "ms": entry["ms"], "why_not": entry["refused"], "entry": entry}
    library = scaled if kind == "scaled" else convolution
    library.settle([key], backend.device, str(describe(backend.device)))
    entry = library.CHOICES.record[str(key)]
    ms = {name: 1e3 * seconds for name, seconds in entry["seconds"].items()}
    return {"chosen": entry["variant"], "ms": ms, "why_not": entry["why_not"], "entry": entry}


def recall(backend: CudaBackend, records: Mapping[str, Record]) -> None:
    """Take what an earlier process chose; where that is not there any more, it is measured anew."""
    plan: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for record in records.values():
        if record["id"].startswith("choice/") and "entry" in record:
            plan[record["column"]][record["row"]] = record["entry"]
    with contextlib.suppress(BackendError):
        backend.use_execution_plan(plan)


def speeds(rig: Rig, backend: CudaBackend, forms: Sequence[Form], rates: Rates) -> Iterator[Item]:
    """Every form, the most expensive in a chunk first."""
    for form in forms:
        floor = rates.floor(form.node.op, form.dtype, form.flops, form.moved)
        yield Item(
            f"speed/{form.node.op}/{form.name}",
            f"{form.node.op}, the backend's kernel",
            form.name,
            form.node.op,
            functools.partial(_measure, rig, backend, form, floor, rates.source),
            seconds=6.0,
            counts=dict(form.counts),
            fields={"dtype": str(form.dtype).removeprefix("torch."), "a_chunk": times(form.counts)},
        )


def _measure(rig: Rig, backend: CudaBackend, form: Form, floor: float | None, source: str) -> Record:
    kernel = backend.kernels[form.node.op]
    _settle(backend, form)
    first = form.made(rig.device)
    count = rotations(sum(nbytes_of(x) for x in first), rig.cache, most=4)
    sets = [first, *(form.made(rig.device) for _ in range(count - 1))]
    calls = [call_of(form.node.op, kernel, operands, form.node.attributes) for operands in sets]
    with torch.no_grad(), as_declared():  # as in a program
        correct = _finite(calls[0]())
        timing = measure(calls, rig.device, rig.seconds)
    seconds = timing.median / 1e3
    record: Record = {**timing.record(), "flops": form.flops, "bytes": form.moved, "correct": correct}
    record |= {"tflops": form.flops / seconds / 1e12 if form.flops else None, "gbps": form.moved / seconds / 1e9}
    share = None if floor is None else floor / timing.median
    return record | {"floor_ms": floor, "share": share, "floor_source": source}


def _settle(backend: CudaBackend, form: Form) -> None:
    """Have a library chosen, where that was not reached in this run."""
    key: Any = _key(form)
    if backend.device.type == "cuda" and form.node.op == "attention":
        backend.attention.settle([key])
    elif backend.device.type == "cuda" and form.node.op == "conv3d":
        convolution.settle([key], backend.device, str(describe(backend.device)))
    elif backend.device.type == "cuda" and form.node.op in scaled.OPS:
        scaled.settle([key], backend.device, str(describe(backend.device)))


def nbytes_of(x: Any) -> int:
    """Of an operand; a list's are summed, an absent one has none."""
    if isinstance(x, Tensor):
        return x.nbytes
    return sum(map(nbytes_of, x)) if x else 0


def _finite(result: Any) -> bool:
    results = result if isinstance(result, tuple) else (result,)
    return all(bool(torch.isfinite(x.float() if x.itemsize == 1 else x).all()) for x in results)


def report(records: Sequence[Record]) -> Iterator[str]:
    """What takes the most of a chunk, and which libraries serve."""
    measured = [r for r in records if r["id"].startswith("speed/") and r["status"] == "measured"]
    for precision in ("", *QUANTISED):
        yield from _speed_table(measured, precision)
    yield from _sums(measured) if measured else ()
    chosen = [r for r in records if r["id"].startswith("choice/") and r["status"] == "measured"]
    if chosen:
        yield "-- libraries chosen, ms of each that is right"
    for record in chosen:
        ms = ", ".join(f"{name} {taken:.3f}" for name, taken in sorted(record["ms"].items(), key=lambda x: x[1]))
        yield f"{record['row']}: {record['chosen']} ({ms})"


def _speed_table(records: Sequence[Record], precision: str) -> Iterator[str]:
    """What takes the most in a precision; of those that quantise, only ops that bf16 does not have."""
    count: Callable[[Record], int] = lambda r: times(r["counts"], precision)  # noqa: E731
    found = [r for r in records if not precision or (count(r) and not r["a_chunk"])]
    if not found:
        return
    in_chunk: Callable[[Record], float] = lambda r: count(r) * r["ms_median"]  # noqa: E731
    what = f"ops that {precision} has beside" if precision else "ops of a chunk at [1,1,1]"
    yield f"-- {what}, single launches between events; floor: {found[0]['floor_source']}"
    yield f"{'form':58} {'n':>4} {'ms':>8} {'floor':>8} {'share':>6} {'GB/s':>6} {'TFLOP/s':>8} {'ms a chunk':>10}"
    ordered = sorted(found, key=in_chunk, reverse=True)
    for r in ordered[:ROWS]:
        floor, share = (f"{r[k]:.3f}" if r[k] is not None else "-" for k in ("floor_ms", "share"))
        tflops = f"{r['tflops']:.1f}" if r["tflops"] else ""
        figures = f"{count(r):4} {r['ms_median']:8.3f} {floor:>8} {share:>6} {r['gbps']:6.0f} {tflops:>8}"
        yield f"{r['row'][:58]:58} {figures} {in_chunk(r):10.2f}"


def _times_in(precision: str, record: Record) -> int:
    return times(record["counts"], precision)


def _sums(found: Sequence[Record]) -> Iterator[str]:
    """Of a chunk, and of its decoding in either precision: sums of single times, no measurements of a whole."""
    sums: tuple[tuple[str, Callable[[Record], int]], ...] = (
        ("a chunk, decoded in bf16", lambda r: r["a_chunk"]),
        ("   of which decoding", lambda r: r["counts"].get("decode", 0)),
        ("decoding in fp32", lambda r: r["counts"].get("decode fp32", 0)),
        *((f"a chunk in {name}, decoded in bf16", functools.partial(_times_in, name)) for name in QUANTISED),
    )
    for what, count in sums:
        rows = [(count(r), r["ms_median"], r["floor_ms"] or 0.0) for r in found]
        whole, floors = (sum(row[0] * row[i] for row in rows) for i in (1, 2))
        yield f"{what}: {whole:.1f} ms, floor {floors:.1f}, {sum(n > 0 for n, *_ in rows)} forms: a sum of single times"
