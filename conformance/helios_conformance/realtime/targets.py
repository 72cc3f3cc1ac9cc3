"""Published speeds, read from ``targets.toml``, and the peaks of data sheets, from the table of ``helios fit``."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from helios.fit import devices

__all__ = ["Figure", "Target", "find", "table"]


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """One published speed. ``wording`` is exact where ``verbatim``; what is not ``comparable`` says in ``why``."""

    fps: float
    variant: str
    steps: tuple[int, ...]
    height: int
    width: int
    wording: str
    verbatim: bool
    source: str
    comparable: bool
    why: str = ""

    def fits(self, variant: str, steps: Sequence[int], height: int, width: int) -> bool:
        """Whether a run with these settings may be compared with it."""
        same = (variant, tuple(steps), height, width) == (self.variant, self.steps, self.height, self.width)
        return self.comparable and same


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """One device.

    Attributes:
        name: of the row.
        title, unit: for people: what it is, and what one of it is.
        aliases: whole names that drivers report.
        published: what others measured; empty with the reason in ``none``.
        peak, bandwidth: dense bfloat16 FLOP a second and bytes a second of the data sheet, 0 where there is none.
        fp8: dense FLOP a second in 8 bits, 0 where there is none.
        source: of peak and bandwidth.
    """

    name: str
    title: str
    unit: str
    aliases: tuple[str, ...]
    published: tuple[Figure, ...]
    none: str
    peak: float = 0.0
    bandwidth: float = 0.0
    fp8: float = 0.0
    source: str = ""

    def figure(self, variant: str, steps: Sequence[int], height: int, width: int) -> Figure | None:
        """The published figure that a run with these settings may be compared with."""
        return next((f for f in self.published if f.fits(variant, steps, height, width)), None)

    def datasheet(self) -> dict[str, Any] | None:
        """The row as JSON values for a report; None where no data sheet is known."""
        if not self.peak:
            return None
        told = {"device": self.title, "bf16": self.peak, "bandwidth": self.bandwidth, "source": self.source}
        return told | ({"fp8": self.fp8} if self.fp8 else {})


@functools.cache
def table() -> Mapping[str, Target]:
    """Every row by name."""
    text = resources.files("helios_conformance").joinpath("targets.toml").read_text(encoding="utf-8")
    return {name: _target(name, row) for name, row in tomllib.loads(text).items()}


def _target(name: str, row: Mapping[str, Any]) -> Target:
    sheet = devices.find(row["datasheet"]) if "datasheet" in row else None
    figures = tuple(Figure(**{**f, "steps": tuple(f["steps"])}) for f in row.get("published", ()))
    return Target(
        name=name,
        title=row["title"],
        unit=row["unit"],
        aliases=tuple(row["aliases"]),
        published=figures,
        none=row.get("none", ""),
        peak=sheet.peak if sheet else 0.0,
        bandwidth=sheet.bandwidth if sheet else 0.0,
        fp8=row.get("fp8_tflops", 0) * 1e12,
        source=sheet.source if sheet else "",
    )


def find(device: str) -> Target | None:
    """The row of a device by the name that its driver reports: the whole name, in any case.

    >>> find("NVIDIA H100 80GB HBM3").name, find("NVIDIA H100 80GB HBM3 of sorts")
    ('h100', None)
    """
    wanted = " ".join(device.split()).casefold()
    return next((t for t in table().values() if wanted in (alias.casefold() for alias in t.aliases)), None)
