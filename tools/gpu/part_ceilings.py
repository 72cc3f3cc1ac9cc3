"""What this device can do on Helios' shapes with what others have written: the ceilings for our own kernels.

    tools/on_gpu.sh ceilings [--device cpu --tiny] [--budget SECONDS] [--out FOLDER]

The order is that of value: what comes late may have to wait for a second run, which goes on where the first one ended.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attends
import convs
import gemms
import moves
import torch
import totals
from environment import header, smi
from results import Clock, DeviceLostError, Item, Record, Results, run_items
from rig import Rig

PART = "ceilings"
LOST = 75
"""Exit code after which a fresh process can go on."""
STAGES = ("stage2", "stage1", "stage0")
TITLES = {
    "copy": "device copy, GB/s",
    "gemm": "products with bias, TFLOP/s",
    "sustained": "kept up, TFLOP/s",
    "attention": "attention, TFLOP/s",
    "vae": "convolutions of the VAE's decoder, TFLOP/s",
    "bus": "pinned memory, GB/s",
    "launch": "launches, microseconds each",
    "elementwise": "eager chains, GB/s of the bytes that one pass would move",
}
FRAMES = 33
MOST_TROUBLES = 20
"""Lines on what went wrong: the tables have to stay in sight at the end of a log."""


def main(argv: list[str] | None = None) -> int:
    """Measure; 1 if anything was wrong or failed, 75 if the device was lost and a fresh process should go on."""
    args = _arguments(argv)
    clock = Clock(args.budget)
    rig = Rig.on(args.device, args.tiny)
    torch.manual_seed(0)
    results = Results(args.out / f"{PART}.jsonl", header(PART, args.device, args.tiny))
    try:
        with torch.inference_mode():
            run_items(items(rig), results, clock, _show)
    except DeviceLostError as lost:
        print(f"error: the device was lost in {lost}\nfix: run the same command again: it goes on after that")
        return LOST
    text = "\n".join(report(results.header, list(results.records.values())))
    with (args.out / "tables.txt").open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    print(text)
    return 1 if totals.problems(results.records.values()) else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"tools/on_gpu.sh {PART}", description="Ceilings on Helios' shapes.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does everything run?")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which nothing more is begun")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the results")
    return parser.parse_args(argv)


def _show(record: Record) -> None:
    figure = totals.cell(record) if record["status"] == "measured" else record.get("why", record["status"])
    print(f"{record['id']}: {figure}", flush=True)


def items(rig: Rig) -> Iterator[Item]:
    """Everything, most valuable first."""
    yield Item("facts/device", "the device", "facts", "device", lambda: _facts(rig))
    yield from moves.device_copies(rig)
    yield from gemms.bf16(rig)
    yield from gemms.fp8(rig)
    yield from gemms.sustained(rig)
    yield from attends.items(rig)
    yield from convs.first_choice(rig)
    yield from moves.bus(rig)
    yield from moves.launches(rig)
    yield from moves.elementwise(rig)
    yield from convs.second_choice(rig)


def _facts(rig: Rig) -> Record:
    facts: dict[str, Any] = {"cudnn": torch.backends.cudnn.version(), "threads": torch.get_num_threads()}
    if not rig.cuda:
        return facts
    properties: Any = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    clocks = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")
    return facts | {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_total": total,
        "memory_free": free,
        "smi": smi(*clocks),
        "blas": str(torch.backends.cuda.preferred_blas_library()),
        "flash_attention_in_torch": torch.backends.cuda.is_flash_attention_available(),
    }


def report(head: Record, records: list[Record]) -> Iterator[str]:
    """The tables, the totals, and what went wrong: short, for the end of a log."""
    yield f"== {PART}: {head['device']}, torch {head['torch']}, driver {head['driver']}, commit {head['commit'][:12]}"
    for group, title in TITLES.items():
        found = [r for r in records if totals.group_of(r) == group]
        if found:
            yield from totals.table(title, found)
    yield from _totals(records)
    late = [r["id"] for r in records if r["status"] == "not measured"]
    if late:
        yield f"not measured: out of time: {len(late)}, from {late[0]} on; the same command again goes on there"
    troubles = totals.problems(records)
    yield from troubles[:MOST_TROUBLES]
    if len(troubles) > MOST_TROUBLES:
        yield f"and {len(troubles) - MOST_TROUBLES} more: see {PART}.jsonl"


def _totals(records: list[Record]) -> Iterator[str]:
    groups = {name: [r for r in records if totals.group_of(r) == name] for name in ("gemm", "attention", "vae")}
    sixteen = [c for c in dict.fromkeys(r["column"] for r in groups["attention"]) if "fp8" not in c]
    yield "-- totals: sums of single times by how often each occurs, so predictions of a whole, not measurements of it"
    chunk: list[float | None] = []
    for stage in STAGES:
        plain = totals.totals(groups["gemm"], stage, ["addmm"])
        attention = totals.totals(groups["attention"], stage, sixteen)
        chunk += [plain["ms"], attention["ms"]]
        yield _line(f"{stage}, products bf16", plain)
        rows = totals.totals(groups["gemm"], stage, ["fp8 rows, full sum", "fp8 rows, Triton"])
        yield _line(f"{stage}, products fp8 by rows, fastest", rows)
        yield _line(f"{stage}, attention bf16, fastest", attention)
    for column in dict.fromkeys(r["column"] for r in groups["vae"]):
        yield _line(f"VAE, {column}", totals.totals(groups["vae"], "vae", [column]))
    short = [c for c in dict.fromkeys(r["column"] for r in groups["vae"]) if c.endswith(("bf16", "fp16"))]
    best = totals.totals(groups["vae"], "vae", short)
    yield _line("VAE, fastest of 16 bits, shape by shape", best)
    yield from (f"   {row}: {column}" for row, column in best["choice"].items())
    times = [*chunk, best["ms"]]
    whole = sum(ms for ms in times if ms is not None)
    if None not in times:
        rate = 1e3 * FRAMES / whole
        yield f"a chunk at [1,1,1], products, attention and convolutions alone: {whole:.0f} ms, {rate:.1f} FPS at most"


def _line(name: str, total: dict[str, Any]) -> str:
    if total["ms"] is not None:
        return f"{name:44} {total['ms']:9.2f} ms {total['tflops']:7.1f} TFLOP/s"
    known = (
        f"{total['measured_ms']:9.2f} ms without {len(total['missing'])} rows"
        if total["choice"]
        else "nothing measured"
    )
    return f"{name:44} {known}"


if __name__ == "__main__":
    sys.exit(main())
