"""The class of a speed: absolute, and of this very device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from helios_conformance.realtime import targets
from helios_conformance.realtime.options import LEAST_CHUNKS, LEAST_SECONDS

__all__ = ["PLAYBACK", "classify", "full_length", "percentile", "published"]

PLAYBACK = 24.0
"""Frames a second at which every published model's video plays."""


def full_length(chunks: int, seconds: float) -> bool:
    """Whether a run is long enough to be a measurement."""
    return chunks >= LEAST_CHUNKS and seconds >= LEAST_SECONDS


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: with fewer than a hundred values the 99th percentile is the largest.

    >>> percentile([3.0, 1.0, 2.0], 0.5), percentile([3.0, 1.0, 2.0], 0.99)
    (2.0, 3.0)
    """
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def published(device: str, variant: str, steps: Sequence[int], height: int, width: int) -> dict[str, Any] | None:
    """What was published for this very device, and whether it may be compared; None for a device that nobody named."""
    target = targets.find(device)
    if target is None:
        return None
    figure = target.figure(variant, steps, height, width)
    told: dict[str, Any] = {"device": target.title, "unit": target.unit, "fps": None, "others": []}
    if figure is not None:
        told |= {"fps": figure.fps, "wording": figure.wording, "verbatim": figure.verbatim, "source": figure.source}
        told |= {"why": figure.why}
    else:
        told["none"] = target.none or "no published figure with these steps and this size of picture"
    told["others"] = [
        {"fps": f.fps, "steps": list(f.steps), "wording": f.wording, "source": f.source, "why": f.why}
        for f in target.published
        if f is not figure
    ]
    return told


def classify(run: Mapping[str, Any], device: str, emulated: str, fallbacks: int) -> str:
    """``playback``, ``published``, ``measured``, or ``measured (…)`` for what is no measurement of the published size.

    Args:
        run: of the report: ``size``, ``weights``, ``variant``, ``steps``, ``height``, ``width``, ``full_length``,
            ``fps.steady``.
        device: as its driver calls it.
        emulated: what computed in the device's place, or "".
        fallbacks: nodes that torch's ops computed for the backend.
    """
    if emulated:
        return "measured (emulated)"
    if fallbacks:
        return "measured (fallback)"
    if run["weights"] != "random":
        return "measured (checkpoint)"  # nothing of what was timed was judged
    if run["size"] != "14b":
        return f"measured ({run['size']})"
    if not run["full_length"]:
        return "measured (short run)"
    if (run["height"], run["width"]) != (384, 640):
        return "measured (another picture size)"
    if run["fps"]["steady"] >= PLAYBACK:
        return "playback"
    told = published(device, run["variant"], run["steps"], run["height"], run["width"])
    reached = told is not None and told["fps"] is not None and run["fps"]["steady"] >= told["fps"]
    return "published" if reached else "measured"
