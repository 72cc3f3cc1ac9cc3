"""What a run of the level asks for; the rules of a full measurement, and what may be lowered to exercise them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from helios.errors import InputError, unknown_name
from helios.model.presets import SIZES

__all__ = ["LEAST_CHUNKS", "LEAST_SECONDS", "STEPS", "Options", "seconds_of"]

LEAST_CHUNKS = 45
"""Chunks of a full measurement: beyond a minute of video, as long as anything that is published."""

LEAST_SECONDS = 120.0
"""Of a full measurement: fast devices are as warm by then as they get within minutes."""

STEPS = ((1, 1, 1), (2, 2, 2))
"""What the published speeds mean, and what the published script does."""

_MOST = {"height": 4096, "width": 4096, "tokens": 4096, "seconds": 864000.0, "soak": 864000.0}
"""A report that is being verified may ask for anything; beyond these nothing is computed."""

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """Settings of the level.

    Attributes:
        size: of the model: ``14b``, or ``mini`` and ``tiny`` where the level itself is exercised.
        height, width: of the video in pixels.
        tokens: length of the prompt's embedding.
        chunks, seconds: of the timed run, at least; it goes on until it has both.
        warmup: chunks before the clock starts.
        ceiling: seconds of work in each measurement of a ceiling.
        pairs: turns of repeated and varied prompts.
        soak: seconds of the long run, 0 for none.
        steps: of the one timed run that is wanted; None for all.
    """

    size: str = "14b"
    height: int = 384
    width: int = 640
    tokens: int = 512
    chunks: int = LEAST_CHUNKS
    seconds: float = LEAST_SECONDS
    warmup: int = 2
    ceiling: float = 1.5
    pairs: int = 5
    soak: float = 0.0
    steps: tuple[int, ...] | None = None

    @staticmethod
    def of(given: Mapping[str, Any]) -> Options:
        """The settings among a run's options; what is absent or None has its default, names of others are left alone.

        Raises:
            InputError: a value that makes no sense, with what would.
        """
        known = {f.name: f for f in dataclasses.fields(Options)}
        named = {n: v for n, v in given.items() if n in known and v is not None}
        steps = _steps(named.pop("steps", None))
        options = Options(**{n: _value(n, v, known[n].default) for n, v in named.items()}, steps=steps)
        if options.size not in SIZES:
            raise InputError(unknown_name("size", options.size, SIZES), fix="--size mini")
        return options


def _steps(value: Any) -> tuple[int, ...] | None:
    """Steps of each stage from a list or from ``1,1,1``."""
    if value is None:
        return None
    text = value if isinstance(value, str) else ",".join(map(str, value)) if isinstance(value, list | tuple) else ""
    for steps in STEPS:
        if text.replace(" ", "").strip("[]") == ",".join(map(str, steps)):
            return steps
    raise InputError(f"steps {value!r}: what is timed is 1,1,1 or 2,2,2", fix="--steps 1,1,1")


def _value(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, str):
        return str(value)
    number = seconds_of(value) if isinstance(default, float) else value
    least, most = 0 if isinstance(default, float) else 1, _MOST.get(name, 10**6)
    if isinstance(number, bool) or not isinstance(number, int | float) or not least <= number <= most:
        raise InputError(f"{name} is {value!r}, wanted a number of at least {least} and at most {most:g}")
    if isinstance(default, int) and number != int(number):
        raise InputError(f"{name} is {value!r}, wanted a whole number")
    return float(number) if isinstance(default, float) else int(number)


def seconds_of(value: Any) -> float:
    """A duration in seconds: a number, or a text such as ``30m``, ``90s`` or ``2h``.

    >>> seconds_of("30m"), seconds_of(1.5)
    (1800.0, 1.5)

    Raises:
        InputError: neither.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h)?", value.strip()) if isinstance(value, str) else None
    if found is None:
        raise InputError(f"{value!r} is no duration", fix="write seconds, or such as 30m")
    return float(found[1]) * _UNITS[found[2] or ""]
