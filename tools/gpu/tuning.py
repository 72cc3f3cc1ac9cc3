"""Which tile each Triton kernel is fastest with, and the table of it for ``helios_cuda.tables``."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from forms import Form, call_of, launches, plain_kernels
from results import Item, Record
from rig import Rig, error_of
from speeds import QUANTISED, nbytes_of, times
from timing import measure, rotations
from torch import Tensor

from helios.backend import Kernel
from helios_cuda import scaled
from helios_cuda.kernels import KERNELS, conv_boxes
from helios_cuda.kernels.layouts import channels_last
from helios_cuda.launch import Tile, Tiled, forced

__all__ = ["Job", "items", "jobs", "report", "table", "write"]

DRAW = 1.02
"""Of two within this factor the earlier candidate stays, so that noise does not decide."""
BOUND = {
    **dict.fromkeys((torch.bfloat16, torch.float8_e4m3fn), 2.0**-6),
    torch.float16: 2.0**-9,
    torch.float32: 2.0**-12,
}
"""How far the result with one tile may be from that with the first: sums in another order, rounded again."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel and key of the tables, on the form that takes the most of a chunk there."""

    kernel: Tiled
    key: str
    form: Form
    way: Kernel
    candidates: tuple[Tile, ...]


def jobs(forms: Sequence[Form], architecture: str) -> list[Job]:
    """What there is to choose: kernels and keys with more than one candidate. Forms that launch several kernels are
    left out, for a tile is given to all launches of a call."""
    found: dict[tuple[str, str], Job] = {}
    often = {form.name: max(times(form.counts, name) for name in ("", *QUANTISED)) for form in forms}
    weight = {form.name: often[form.name] * (form.flops + form.moved) for form in forms}
    for form in sorted(forms, key=lambda form: -weight[form.name]):
        for way in _ways(form):
            noted = launches(form, way, architecture)
            named = {(launch.kernel.name, launch.key): launch.kernel for launch in noted}
            if len(named) == 1:
                (name, kernel), *_ = named.items()
                candidates = kernel.fitting(architecture)
                if name not in found and len(candidates) > 1:
                    found[name] = Job(kernel, name[1], form, way, candidates)
    return list(found.values())


def _ways(form: Form) -> Iterator[Kernel]:
    """Our own kernels of an op, whatever the backend would choose."""
    name = form.node.op
    if name == "conv3d":
        plain = plain_kernels()[name]
        yield plain
        yield Kernel(_boxes, plain.prepare, plain.weights)
    elif name in KERNELS:
        yield KERNELS[name]
    elif name in scaled.OPS:
        yield plain_kernels()[name]


def _boxes(w: Any, x: Tensor, *, stride: tuple[int, int, int], padding: tuple[int, int, int]) -> Any:
    if conv_boxes.fits(channels_last(x), w.weight, stride):
        return None  # launches nothing, so nothing is tuned
    return conv_boxes.conv3d(x, w.weight, w.bias, padding)


def told(tile: Tile) -> dict[str, Any]:
    """A tile as the tables have it."""
    return {"sizes": dict(tile.sizes), "warps": tile.warps, "stages": tile.stages}


def items(rig: Rig, found: Sequence[Job]) -> Iterator[Item]:
    """Every candidate of every job."""
    for job in found:
        for i, tile in enumerate(job.candidates):
            sizes = " ".join(f"{name}={size}" for name, size in tile.sizes.items())
            yield Item(
                f"tune/{job.kernel.name}/{job.key}/{sizes} warps={tile.warps} stages={tile.stages}",
                f"{job.form.name}",
                f"{job.kernel.name} {job.key}",
                str(i),
                functools.partial(_measure, rig, job, tile),
                seconds=12.0,
                fields={
                    "kernel": job.kernel.name,
                    "key": job.key,
                    "tile": told(tile),
                    "of": len(job.candidates),
                    "form": job.form.name,
                },
            )


def _measure(rig: Rig, job: Job, tile: Tile) -> Record:
    torch.manual_seed(0)
    first = job.form.made(rig.device)
    count = rotations(sum(map(nbytes_of, first)), rig.cache, most=4)
    sets = [first, *(job.form.made(rig.device) for _ in range(count - 1))]
    calls = [call_of(job.form.node.op, job.way, operands, job.form.node.attributes) for operands in sets]
    with torch.no_grad(), forced(job.candidates[0]):
        wanted = _tensors(calls[0]())
    with torch.no_grad(), forced(tile):
        error = max(error_of(x, y) for x, y in zip(_tensors(calls[0]()), wanted, strict=True))
        timing = measure(calls, rig.device, rig.seconds)
    bound = BOUND[wanted[0].dtype]
    return {**timing.record(), "error": error if math.isfinite(error) else str(error), "correct": error <= bound}


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def table(records: Sequence[Record], origin: str) -> dict[str, dict[str, Any]]:
    """``{kernel: {key: {"sizes", "warps", "stages", "origin"}}}`` of all keys whose candidates were all tried."""
    made: dict[str, dict[str, Any]] = {}
    for (kernel, key), found in _by_key(records).items():
        if len(found) == found[0]["of"] and all(r["status"] not in ("not measured", "failed") for r in found):
            best = _best([r for r in found if r["status"] == "measured"])
            if best is not None:
                made.setdefault(kernel, {})[key] = {**best["tile"], "origin": origin}
    return {kernel: dict(sorted(made[kernel].items())) for kernel in sorted(made)}


def _by_key(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["id"].startswith("tune/"):
            found.setdefault((record["kernel"], record["key"]), []).append(record)
    return {name: sorted(group, key=lambda r: int(r["column"])) for name, group in found.items()}


def _best(found: Sequence[Record]) -> Record | None:
    best: Record | None = None
    for record in found:
        if best is None or record["ms_median"] * DRAW < best["ms_median"]:
            best = record
    return best


def write(path: Path, made: Mapping[str, Any]) -> None:
    """A file for ``helios_cuda/tables``."""
    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def report(records: Sequence[Record]) -> Iterator[str]:
    """The best of each key, and what it gains over the candidate that runs untuned."""
    groups = _by_key(records)
    if groups:
        yield "-- tiles: the best, ms, and the gain over the first candidate"
    for (kernel, key), found in groups.items():
        tried = [r for r in found if r["status"] == "measured"]
        best, default = _best(tried), next((r for r in tried if r["column"] == "0"), None)
        if best is None:
            continue
        gain = f"{default['ms_median'] / best['ms_median']:.2f}×" if default else "-"
        name = best["id"].rsplit("/", 1)[1]
        yield f"{kernel} {key}: {name} {best['ms_median']:.4f} ms, {gain}; {len(tried)} of {best['of']} tried"
