"""A run: what was asked for, and what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from helios_conformance.case import Level, Suite
from helios_conformance.draws import Root

__all__ = ["RunResult", "Setup", "now"]


def now() -> str:
    """This moment in UTC, ISO 8601, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What was asked for.

    Attributes:
        spec: the backend as selected, such as ``cpu`` or ``cuda:1``.
        precision: ``bf16`` or ``fp32``.
        suite: ``quick`` or ``full``.
        levels: that run, each with all that it needs.
        filters: ids; empty for all cases.
        root: of all draws.
        variant: published way to sample, for the realtime level.
        model: folder of a checkpoint, or None for random weights.
        options: JSON values: size, steps, height, width, chunks, seconds, soak …
        out: the run folder, which becomes the bundle.
    """

    spec: str
    precision: str
    suite: Suite
    levels: tuple[Level, ...]
    filters: tuple[str, ...]
    root: Root
    variant: str = "distilled"
    model: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    out: Path = Path("out/certify")


@dataclasses.dataclass
class RunResult:
    """What came of it.

    Attributes:
        setup: what was asked for.
        records: of ``record.record``, in the order in which they were finished.
        backend: as the worker tells it: name, label, class ``module:Class``, distribution and version or None,
            api_version, kind ``kernels`` or ``engine``, emulated, device (name, index, memory), precisions, threads.
        environment: of ``environment.read``.
        started, finished: UTC, ISO 8601.
        peak_rss: bytes, of ``parent`` and ``worker``.
        workers: ``started`` and ``lost``.
        problem: why the run could not take place or ended early; empty for one that ended by itself.
    """

    setup: Setup
    records: list[dict[str, Any]]
    backend: dict[str, Any]
    environment: dict[str, Any]
    started: str
    finished: str
    peak_rss: dict[str, int] = dataclasses.field(default_factory=dict)
    workers: dict[str, int] = dataclasses.field(default_factory=dict)
    problem: str = ""
