"""The parent's clock beside the worker's: what was told, when it arrived, and whether the two agree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["SLACK", "SLACK_SHARE", "Heard", "disagreement", "heard"]

SLACK, SLACK_SHARE = 0.25, 0.02
"""Seconds, and share of the whole, by which two clocks of one machine may differ over a run: what a line takes through
a pipe to a parent that is busy, at both ends."""


@dataclasses.dataclass(frozen=True, slots=True)
class Heard:
    """One video by the parent's clock.

    Attributes:
        begin: seconds since the case was sent.
        arrivals: of each chunk, likewise.
        chunks: what was told of each.
        end: the line after the last, or None.
    """

    begin: float
    arrivals: tuple[float, ...]
    chunks: tuple[Mapping[str, Any], ...]
    end: float | None

    @property
    def latencies(self) -> list[float]:
        """Seconds from chunk to chunk, from the request to the first one."""
        return [now - before for before, now in zip((self.begin, *self.arrivals), self.arrivals, strict=False)]

    @property
    def seconds(self) -> float:
        """From the request to the last chunk."""
        return self.arrivals[-1] - self.begin if self.arrivals else 0.0


def heard(told: Any, label: str) -> Heard | None:
    """What the parent heard of a video; None where it heard nothing, or nothing in order.

    Args:
        told: ``facts["told"]``: seconds and lines, as the parent stamped them.
        label: of the video.
    """
    lines = [(at, line) for at, line in _lines(told) if line.get("of") == label]
    begins = [at for at, line in lines if line.get("event") == "begin"]
    ends = [at for at, line in lines if line.get("event") == "end"]
    chunks = [(at, line) for at, line in lines if line.get("event") == "chunk"]
    times = [*begins, *(at for at, _ in chunks), *ends]
    in_order = len(begins) == 1 and len(ends) <= 1 and times == sorted(times) and bool(chunks)
    if not in_order or [line.get("index") for _, line in chunks] != list(range(len(chunks))):
        return None
    stamps = tuple(at for at, _ in chunks)
    return Heard(begins[0], stamps, tuple(line for _, line in chunks), ends[0] if ends else None)


def _lines(told: Any) -> list[tuple[float, Mapping[str, Any]]]:
    found: list[tuple[float, Mapping[str, Any]]] = []
    for item in told if isinstance(told, Sequence) and not isinstance(told, str) else ():
        if not (isinstance(item, Sequence) and len(item) == 2 and isinstance(item[1], Mapping)):
            return []
        at = item[0]
        if isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at) or at < 0:
            return []
        found.append((float(at), item[1]))
    return found


def disagreement(parent: float, worker: float) -> str:
    """A sentence where the worker's clock says another time than the parent's; empty where they agree."""
    if abs(parent - worker) <= SLACK + SLACK_SHARE * max(parent, worker):
        return ""
    how = "a clock was tampered with, or the device was not waited for"
    return f"the worker's clock says {worker:.3f} s, the parent's {parent:.3f} s: {how}"
