"""Decoding beside denoising against decoding after it: the same videos in turns, in one process."""

from __future__ import annotations

import hashlib
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence

from film import Scene
from results import NotThereError, Record

from helios.pipeline.run import Chunk

__all__ = ["in_turns", "lines"]

WAYS = ("off", "on")
COMPARED = 4
"""Chunks of each video whose bits are compared; decoding a chunk beside the next has begun by then."""


def in_turns(scene: Scene, steps: Sequence[int], chunks: int, rounds: int = 2) -> Record:
    """Stream the same video off, on, off, on …; one of each before the clock counts.

    Args:
        scene: whose backend has the option ``overlap``.
        steps: of each stage.
        chunks: of a video that are waited for, three at least; the first two are not among the steady ones.
        rounds: of both ways.

    Raises:
        NotThereError: the backend has no such option.
    """
    backend = scene.backend
    if "overlap" not in backend.options:
        raise NotThereError(f"backend {backend.name!r} has no option overlap")
    scene.ready()
    kept = backend.chosen
    laps: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    bits: set[str] = set()
    try:
        for turn, way in enumerate(WAYS * (rounds + 1)):
            backend.chosen = {**kept, "overlap": way}
            taken, digest = _streamed(scene, steps, chunks)
            bits.add(digest)
            if turn >= len(WAYS):
                laps[way].append(taken)
    finally:
        backend.chosen = kept
    return _record(laps, len(bits) == 1, steps)


def _streamed(scene: Scene, steps: Sequence[int], chunks: int) -> tuple[list[float], str]:
    """Seconds from chunk to chunk, steady ones; and a digest of the first."""
    stamps, sha = [], hashlib.sha256()
    for chunk in scene.pipeline.run(scene.request(steps)):
        stamps.append(time.perf_counter())
        if len(stamps) <= COMPARED:
            sha.update(_bytes(chunk))
        if len(stamps) == chunks:
            break
    return [later - earlier for earlier, later in itertools.pairwise(stamps)][1:], sha.hexdigest()


def _bytes(chunk: Chunk) -> bytes:
    return chunk.frames.numpy().tobytes() + chunk.latents.numpy().tobytes()


def _record(laps: dict[str, list[list[float]]], same: bool, steps: Sequence[int]) -> Record:
    means = {way: [statistics.fmean(taken) for taken in turns] for way, turns in laps.items()}
    seconds = {way: statistics.fmean(turns) for way, turns in means.items()}
    apart = min(means["off"]) > max(means["on"]) or min(means["on"]) > max(means["off"])
    record = {
        "steps": list(steps),
        "ms_median": 1e3 * min(seconds.values()),
        "chunk_s": means,
        "gain": seconds["off"] / seconds["on"] - 1.0,
        "faster": min(seconds, key=lambda way: seconds[way]) if apart else "neither",
        "correct": same,
    }
    return record if same else {**record, "why": "other bits beside than after one another"}


def lines(record: Record) -> Iterator[str]:
    """What came of it, in words."""
    fps = {way: 33 / statistics.fmean(turns) for way, turns in record["chunk_s"].items()}
    faster = {"on": "overlap=on is faster", "off": "overlap=off is faster", "neither": "no more than turns differ"}
    yield (
        f"{record['row']} {record['steps']}: decoded beside the next chunk {fps['on']:.2f} FPS, after one another "
        f"{fps['off']:.2f}: {100 * record['gain']:+.1f} %, {faster[record['faster']]}"
    )
