"""Helios as fast as this device makes it: first chunk, steady chunks, their parts, and one step node by node.

    tools/on_gpu.sh realtime [--size 14b|mini|tiny] [--suite] [--device cpu --tiny] [--budget SECONDS] [--out FOLDER]

Seeded random weights, drawn on the device; a stand-in for the text encoder. ``--suite`` also runs the conformance
suite's level realtime in what is left of the time: of 14b only where that is much, since it draws weights on the host.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import overlapped
import rates
import running
import torch
from film import Scene
from results import Clock, Item, Record
from rig import Rig

PART = "realtime"
STEPS = ((1, 1, 1), (2, 2, 2))
QUANTISED = ("fp8-attention", "fp8")
"""After bf16, each with weights of its own on the device, which the ones before have left."""
MOST_CHUNKS = 45
BESIDE_CHUNKS = 9
"""Of each of six videos that compare decoding beside the next chunk with decoding before it: about a minute."""
SECONDS = 60.0
"""Of one video: what fits into eight minutes beside everything else."""
ROWS = 15


def main(argv: list[str] | None = None) -> int:
    """Measure; the exit codes of ``running.run``."""
    options = running.parser(PART, "Frames a second of the whole pipeline.")
    options.add_argument("--size", choices=("14b", "mini", "tiny"), default=None, help="14b, with --tiny tiny")
    options.add_argument("--suite", action="store_true", help="also the conformance suite's level realtime")
    args = options.parse_args(argv)
    clock = Clock(args.budget)
    rig = Rig.on(args.device, args.tiny)
    torch.manual_seed(0)
    return running.run(PART, args, clock, lambda _: _items(rig, args, clock), report)


def _items(rig: Rig, args: argparse.Namespace, clock: Clock) -> Iterator[Item]:
    size = args.size or ("tiny" if args.tiny else "14b")
    picture = (64, 64, 16) if args.tiny else (384, 640, 512)
    scene = Scene(rig, size, *picture)
    device = rates.of_device(rig.name, args.out)
    # What must be left: a process that goes on has to load the weights anew.
    need = 1.0 if args.tiny else 90.0
    yield Item(f"load/{size}", "weights drawn, packed, steps captured", size, "load", scene.load, need)
    chunks = 2 if args.tiny else MOST_CHUNKS
    for steps in STEPS:
        name = "-".join(map(str, steps))
        take = functools.partial(_film, scene, clock, steps, chunks)
        yield Item(f"film/{size}/{name}", f"a video at {list(steps)}", size, name, take, need)
    turns = functools.partial(overlapped.in_turns, scene, STEPS[0], 3 if args.tiny else BESIDE_CHUNKS)
    yield Item(f"overlap/{size}", "decoding beside denoising", size, "overlap", turns, need)
    for stage in ("denoise.2", "denoise.1", "denoise.0"):
        yield Item(
            f"step/{size}/{stage}", "one forward", size, stage, functools.partial(scene.time_step, stage), need / 3
        )
    for stage in ("denoise.2",):
        profile = functools.partial(scene.profile_step, stage, device)
        yield Item(f"profile/{size}/{stage}", "one forward by node", size, stage, profile, need / 3)
    profile = functools.partial(scene.profile_decode, device)
    yield Item(f"profile/{size}/decode", "decoding a chunk by node", size, "decode", profile, need / 3)
    yield from _quantised(scene, [Scene(rig, size, *picture, name) for name in QUANTISED], clock, chunks, need)
    if args.suite:
        yield _of_the_suite(args, clock, size)


def _quantised(before: Scene, scenes: Sequence[Scene], clock: Clock, chunks: int, need: float) -> Iterator[Item]:
    """The same videos in other precisions, and their longest forward."""
    for scene in scenes:

        def alone(run: Callable[[], Record], scene: Scene = scene) -> Record:
            for other in (before, *scenes):
                if other is not scene:
                    other.release()
            return run()

        label = f"{scene.size}/{scene.precision}"
        for steps in STEPS:
            name = "-".join(map(str, steps))
            take = functools.partial(alone, functools.partial(_film, scene, clock, steps, chunks))
            yield Item(f"film/{label}/{name}", f"a video at {list(steps)}", label, name, take, need)
        step = functools.partial(alone, functools.partial(scene.time_step, "denoise.2"))
        yield Item(f"step/{label}/denoise.2", "one forward", label, f"{scene.precision} denoise.2", step, need / 3)
    for scene in scenes:
        scene.release()


def _film(scene: Scene, clock: Clock, steps: Sequence[int], chunks: int) -> Record:
    return scene.film(steps, running.seconds_of(clock, SECONDS, 0.4), chunks)


def _of_the_suite(args: argparse.Namespace, clock: Clock, size: str) -> Item:
    """The suite's own measurement, shortened to what is left: it exercises the level, and certifies nothing."""
    import certified

    filters = ["--filter", "realtime[bf16,distilled,1-1-1]", "--suite", "full", "--size", size]
    short = [f"--set=chunks={2 if args.tiny else 10}", "--set=seconds=0", "--set=warmup=1", "--set=ceiling=0.1"]
    picture = ["--height", "64", "--width", "64"] if args.tiny else []
    run = functools.partial(certified.level, args, clock, f"realtime-{size}", [*filters, *short, *picture])
    return Item(f"suite/{size}/realtime", "the level realtime", size, "suite", run, 5.0 if args.tiny else 60.0)


def report(records: Sequence[Record]) -> Iterator[str]:
    """Latencies, then the profiles."""
    taken = [r for r in records if r["status"] in ("measured", "wrong")]
    for r in taken:
        kind = r["id"].split("/", 1)[0]
        if kind == "load":
            graphs = ", ".join(r["execution"].get("graphs", [])) or r["execution"].get("eager", "kernel by kernel")
            yield f"{r['row']}: loaded in {r['load_s']:.1f} s, {r['drawing_s']:.1f} s of it drawing; graphs: {graphs}"
            yield f"   {r['weights']}; no text encoder: a stand-in"
        if kind == "film" and "fps" in r:
            yield from _film_lines(r)
        if kind == "overlap":
            yield from overlapped.lines(r)
        if kind == "step":
            yield f"one forward, {r['column']}: {r['ms_median']:.2f} ms, {r['tflops']:.1f} TFLOP/s"
    for r in taken:
        if r["id"].startswith("profile/"):
            yield from _profile_lines(r)


def _film_lines(r: Record) -> Iterator[str]:
    parts = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in r["split_s"].items())
    arithmetic = f"{r.get('precision', 'bf16')}, VAE in {r.get('vae', 'fp32')}"
    yield (
        f"{r['row']} {r['steps']}, {arithmetic}: {r['fps']:.2f} FPS steady over {r['chunks'] - 1} chunks; "
        f"p50 {1e3 * r['p50_s']:.0f} ms, p99 {1e3 * r['p99_s']:.0f} ms; first chunk {1e3 * r['first_s']:.0f} ms"
    )
    yield f"   ms a chunk: {parts}"
    told = [f"{name} {r[name] / 2**30:.1f} GiB" for name in ("peak_allocated", "device_bytes") if r.get(name)]
    sensors = r.get("sensors") or {}
    told += [
        f"{name} {sensors[name]['mean']:.0f}" for name in ("power_w", "clock_mhz", "temperature_c") if name in sensors
    ]
    yield f"   {', '.join(told) or 'no sensors here'}"


def _profile_lines(r: Record) -> Iterator[str]:
    yield f"-- {r['column']} node by node, {r['nodes']} nodes, {r['ms_median']:.1f} ms; waited for after each"
    yield f"{'op':22} {'dtype':9} {'n':>5} {'ms':>9} {'floor':>9} {'share':>6}"
    for row in r["ops"][:ROWS]:
        share = f"{row['floor_ms'] / row['ms']:.2f}" if row["floor_ms"] and row["ms"] else "-"
        yield f"{row['op']:22} {row['dtype']:9} {row['n']:5.0f} {row['ms']:9.3f} {row['floor_ms']:9.3f} {share:>6}"


if __name__ == "__main__":
    sys.exit(main())
