"""Filming: a video streamed chunk by chunk, the clock of each stopped after its frames were hashed on the host."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from helios.backend import Backend
from helios.pipeline.run import Chunk
from helios.pipeline.state import RunState
from helios_conformance.realtime.sensors import device_bytes, host_bytes
from helios_conformance.selection import digest

__all__ = ["SPLIT", "Reel", "film", "frame_digests", "looks", "settled"]

SPLIT = ("text", "history", "denoise", "decode")
KEPT = 64
"""Chunks whose latents, and whose states before them, are kept for what is looked at after the clock."""
FRAMES = 4
"""Chunks whose frames are kept, to see whether the bytes were there when the clock stopped."""


@dataclasses.dataclass(eq=False)
class Reel:
    """A video that was filmed.

    Attributes:
        shots: one a chunk: ``index``, ``seconds`` by the worker's clock, ``split`` of them, ``hash`` (seconds),
            ``frames`` and ``latents`` (SHA-256), ``rss`` and ``device`` bytes or None.
        seconds: by the worker's clock, all of it.
        latents: of the first chunks, float32 ``[b, 16, 9, h/8, w/8]``.
        states: before the chunk of that index.
        frames: of some chunks, uint8 ``[b, 33, h, w, 3]``.
    """

    shots: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    latents: list[Tensor] = dataclasses.field(default_factory=list)
    states: dict[int, RunState] = dataclasses.field(default_factory=dict)
    frames: dict[int, Tensor] = dataclasses.field(default_factory=dict)


def film(
    stream: Iterator[Chunk],
    backend: Backend,
    enough: Callable[[int, float], bool],
    tell: Callable[[Mapping[str, Any]], None],
    label: str,
    each: Callable[[Chunk], Mapping[str, Any]] | None = None,
) -> Reel:
    """Film until it is enough.

    Args:
        stream: of chunks; nothing of it is computed before the clock runs.
        backend: whose memory is read.
        enough: of the number of chunks and the seconds so far.
        tell: hears of the beginning, of each chunk once its frames are hashed, and of the end.
        label: of this video in what is told.
        each: more to be noted of a chunk, when its clock has stopped.
    """
    reel = Reel()
    tell({"event": "begin", "of": label})
    begin = last = time.perf_counter()
    for chunk in stream:
        done = time.perf_counter()
        frames, latents = digest(chunk.frames), digest(chunk.latents)
        now = time.perf_counter()
        tell({"event": "chunk", "of": label, "index": chunk.index, "frames": frames, "latents": latents})
        shot = {"index": chunk.index, "seconds": now - last, "hash": now - done, "frames": frames, "latents": latents}
        shot["split"] = {name: chunk.timings[name] for name in SPLIT}
        shot |= {"rss": host_bytes(), "device": device_bytes(backend), **(each(chunk) if each else {})}
        reel.shots.append(shot)
        reel.seconds, last = now - begin, now
        _keep(reel, chunk, each is None)
        if enough(len(reel.shots), reel.seconds):
            break
    tell({"event": "end", "of": label, "chunks": len(reel.shots)})
    return reel


def _keep(reel: Reel, chunk: Chunk, states: bool) -> None:
    if states and len(reel.latents) < KEPT:
        reel.latents.append(chunk.latents)
        reel.states[chunk.index + 1] = chunk.state
    if len(reel.frames) == FRAMES:  # the first ones stay, the last one is the newest
        del reel.frames[max(reel.frames)]
    reel.frames[chunk.index] = chunk.frames


def settled(chunk: Chunk, backend: Backend, pause: float = 0.02, patience: int = 200) -> dict[str, str]:
    """Digests of a chunk once they stay the same: whatever a device says of being ready, this is what it made."""
    backend.synchronize()
    before = None
    for _ in range(patience):
        now = {"frames": digest(chunk.frames), "latents": digest(chunk.latents)}
        if now == before:
            break
        before = now
        time.sleep(pause)
    return now


def frame_digests(frames: Tensor) -> list[str]:
    """SHA-256 of each frame of ``[b, f, h, w, 3]``, over the batch."""
    return [digest(frames[:, i]) for i in range(frames.shape[1])]


def looks(reel: Reel) -> dict[str, Any]:
    """What tells a video from nothing: finite, of some spread, and every chunk and frame another.

    ``finite``; ``latents_std`` and ``frames_std``, the least and the most over the chunks that were kept (of latents,
    and of pixels in levels of 255); ``changed``, the least share of latents that differ between two chunks, one after
    the other or any from the first; ``distinct``, the least number of different frames in a chunk; ``of``, how many
    chunks' latents that is about.
    """
    latents = [x.float() for x in reel.latents]
    spreads = [float(x.std()) for x in latents]
    pixels = [float(x.float().std()) for x in reel.frames.values()]
    pairs = [*itertools.pairwise(latents), *((latents[0], x) for x in latents[2:])]
    changed = [float((a != b).double().mean()) for a, b in pairs]
    return {
        "finite": all(bool(x.isfinite().all()) for x in latents),
        "latents_std": [_number(min(spreads)), _number(max(spreads))],
        "frames_std": [_number(min(pixels)), _number(max(pixels))],
        "changed": min(changed, default=1.0),
        "distinct": min(len(set(frame_digests(x))) for x in reel.frames.values()),
        "of": len(latents),
    }


def _number(value: float) -> float | None:
    """JSON knows no NaN and no infinity; None is what fails."""
    return value if abs(value) < float("inf") else None
