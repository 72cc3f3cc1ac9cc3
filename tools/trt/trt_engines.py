"""Builds every engine of tiny, mini and 14b, and says what each took: seconds, bytes on disk and on the device.

    tools/on_tensorrt.sh engines [--size tiny|mini|14b] [--tiny]

Weights are random and drawn on the device. A second run finds the engines and says how long they take to open.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator, Sequence

import running
import torch
from results import Clock, Item, Record
from rig import Rig
from setting import EngineScene, arguments, scenes, sizes

from helios.pipeline.history import CHUNK_LATENTS
from helios_conformance.realtime.sensors import device_bytes

PART = "engines"
PRECISION = {"tiny": "fp32", "mini": "bf16", "14b": "bf16"}


def main(argv: list[str] | None = None) -> int:
    """Build; the exit codes of ``running.run``."""
    args = arguments(PART, "Every engine of three sizes.", sys.argv[1:] if argv is None else argv)
    rig = Rig.on(_device(args.device), args.tiny)
    return running.run(PART, args, Clock(args.budget), lambda _: _items(rig, sizes(args)), report)


def _device(asked: str) -> str:
    """The GPU, or the host where the recorder is in TensorRT's place."""
    return asked if torch.cuda.is_available() else "cpu"


def _items(rig: Rig, wanted: Sequence[str]) -> Iterator[Item]:
    for size in wanted:
        for scene in scenes(rig, size, PRECISION[size]):
            name = f"build/{size}/{scene.way}"
            yield Item(name, "engines built and opened", size, scene.way, functools.partial(_built, scene), 1.0)


def _built(scene: EngineScene) -> Record:
    """The transformer's program as a run loads it, and the VAE's by a decoding."""
    try:
        began = time.perf_counter()
        program = scene.ready()
        transformer = time.perf_counter() - began
        codec, began = scene.pipeline.codec, time.perf_counter()
        split = codec.choose(1, CHUNK_LATENTS, scene.height, scene.width)
        scale = codec.config.scale_factor_spatial
        shape = (1, codec.config.z_dim, CHUNK_LATENTS, scene.height // scale, scene.width // scale)
        frames = codec.decode(torch.zeros(shape), split)
        scene.backend.synchronize()
        entries = {entry.name: entry for entry in scene.backend.engines.store.entries()}  # type: ignore[attr-defined]
        used = [entries[name] for name in scene.backend.engines.used]  # type: ignore[attr-defined]
        return {
            "ms_median": 1e3 * (transformer + time.perf_counter() - began),
            "transformer_s": transformer,
            "vae_s": time.perf_counter() - began,
            "engines": {entry.name: {"bytes": entry.nbytes, "build_s": entry.facts["seconds"]} for entry in used},
            "engine_bytes": sum(entry.nbytes for entry in used),
            "device_bytes": device_bytes(scene.backend),
            "execution": getattr(program, "execution", dict)(),
            "emulated": scene.backend.emulated,
            "correct": bool(frames.isfinite().all()),
        }
    finally:
        scene.release()


def report(records: Sequence[Record]) -> Iterator[str]:
    """A line a size and way."""
    yield f"{'size':6} {'weights':9} {'seconds':>8} {'engines':>8} {'GB on disk':>11} {'GB on the device':>17}"
    for r in records:
        if "engine_bytes" in r:
            device = f"{r['device_bytes'] / 1e9:.2f}" if r["device_bytes"] else "-"
            yield (
                f"{r['row']:6} {r['column']:9} {r['ms_median'] / 1e3:8.1f} {len(r['engines']):8} "
                f"{r['engine_bytes'] / 1e9:11.2f} {device:>17}"
            )
    if any(r.get("emulated") for r in records):
        yield "EMULATED: nothing of this was run on a device"


if __name__ == "__main__":
    sys.exit(main())
