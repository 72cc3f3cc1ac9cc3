"""Speed and memory on engines, for both ways of holding weights, with the cuda backend beside them.

    tools/on_tensorrt.sh speed [--size tiny|mini|14b] [--tiny]

Of each: the forward of each pyramid stage, and a video at [1,1,1]: first chunk, steady chunks, their parts with the
VAE's among them, memory. Engines are built first where they are not there yet; building is in no figure.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import running
import torch
from results import Clock, Item, Record
from rig import Rig
from setting import EngineScene, arguments, scenes, sizes

PART = "speed"
STEPS = (1, 1, 1)
SECONDS, CHUNKS = 60.0, 30
STAGES = ("denoise.2", "denoise.1", "denoise.0")


def main(argv: list[str] | None = None) -> int:
    """Measure; the exit codes of ``running.run``."""
    args = arguments(PART, "Frames a second on engines.", sys.argv[1:] if argv is None else argv)
    there = torch.cuda.is_available()
    rig = Rig.on(args.device if there else "cpu", args.tiny)
    torch.manual_seed(0)
    wanted = sizes(args)[-1:]  # the largest: what is asked for is speed
    return running.run(PART, args, Clock(args.budget), lambda _: _items(rig, wanted, there), report)


def _items(rig: Rig, wanted: Sequence[str], there: bool) -> Iterator[Item]:
    for size in wanted:
        precision = "bf16" if there else "fp32"
        for scene in scenes(rig, size, precision, "cuda" if there else "cpu"):
            yield from _of(scene, size)
            scene.release()


def _of(scene: EngineScene, size: str) -> Iterator[Item]:
    def measured(run: Callable[[], Record]) -> Record:
        return {**run(), "emulated": scene.backend.emulated}

    for stage in STAGES:
        take = functools.partial(measured, functools.partial(scene.time_step, stage))
        yield Item(f"step/{size}/{scene.label}/{stage}", "one forward", stage, scene.label, take, 1.0)
    film = functools.partial(scene.film, STEPS, SECONDS, 2 if scene.rig.tiny else CHUNKS)
    yield Item(f"film/{size}/{scene.label}", "a video", size, scene.label, functools.partial(measured, film), 1.0)


def report(records: Sequence[Record]) -> Iterator[str]:
    """Forwards, then videos."""
    yield f"{'forward':12} {'on':14} {'ms':>9}"
    for r in records:
        if r["id"].startswith("step/") and "ms_median" in r:
            yield f"{r['row']:12} {r['column']:14} {r['ms_median']:9.2f}"
    yield f"{'video':6} {'on':14} {'first s':>8} {'p50 s':>8} {'p99 s':>8} {'fps':>7} {'decode s':>9} {'GB':>7}"
    for r in records:
        if "first_s" in r:
            memory = f"{r['device_bytes'] / 1e9:.2f}" if r.get("device_bytes") else "-"
            yield (
                f"{r['row']:6} {r['column']:14} {r['first_s']:8.3f} {r['p50_s']:8.3f} {r['p99_s']:8.3f} "
                f"{r['fps']:7.2f} {r['split_s']['decode']:9.3f} {memory:>7}"
            )
    if any(r.get("emulated") for r in records):
        yield "EMULATED: nothing of this was run on a device"


if __name__ == "__main__":
    sys.exit(main())
