"""The table of accelerators, read from ``devices.toml``: one row a device, each with its source."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from helios.errors import InputError, unknown_name

__all__ = ["Device", "Published", "find", "recognise", "table"]


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """A speed that others published: frames a second of a variant with these steps, at 384×640."""

    variant: str
    steps: tuple[int, ...]
    fps: float
    source: str


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """What is known of one accelerator.

    Attributes:
        name: for ``--device``.
        title: for people.
        backend: as it would be selected.
        match: regular expression, found in the lower-case name that its driver reports.
        memory: bytes.
        bandwidth: bytes a second.
        peak: dense bfloat16 FLOP a second; 0 where unknown.
        source: of the row.
        published: speeds on this very device.
        pcie: generation of its bus to the host; 0 where unknown.
        fp8: whether it multiplies e4m3 numbers; False where unknown.
    """

    name: str
    title: str
    backend: str
    match: str
    memory: int
    bandwidth: float
    peak: float
    source: str
    published: tuple[Published, ...] = ()
    pcie: int = 0
    fp8: bool = False


@functools.cache
def table() -> Mapping[str, Device]:
    """Every row by name, in the order of the file."""
    text = importlib.resources.files("helios.fit").joinpath("devices.toml").read_text(encoding="utf-8")
    return {name: _device(name, row) for name, row in tomllib.loads(text).items()}


def _device(name: str, row: Mapping[str, Any]) -> Device:
    return Device(
        name=name,
        title=row["title"],
        backend=row["backend"],
        match=row["match"],
        memory=int(row["memory_gib"] * 2**30),
        bandwidth=row["bandwidth_gb_s"] * 1e9,
        peak=row["bf16_tflops"] * 1e12,
        source=row["source"],
        published=tuple(
            Published(p["variant"], tuple(p["steps"]), p["fps"], p["source"]) for p in row.get("published", ())
        ),
        pcie=row.get("pcie", 0),
        fp8=row.get("fp8", False),
    )


def find(name: str) -> Device:
    """The row of that name; spaces, underscores and case do not matter.

    Raises:
        InputError: no such row; names the nearest and all.
    """
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    plain = {known.replace("-", ""): device for known, device in table().items()}
    if (device := plain.get(wanted.replace("-", ""))) is not None:
        return device
    raise InputError(unknown_name("device", name, table()), fix="leave --device out for this machine")


def recognise(reported: str) -> Device | None:
    """The row of a device by the name that its driver reports, or None.

    >>> recognise("NVIDIA H100 80GB HBM3").name, recognise("NVIDIA H100 PCIe").name, recognise("abacus")
    ('h100', 'h100-pcie', None)
    """
    name = reported.lower()
    return next((device for device in table().values() if re.search(device.match, name)), None)
