"""Which tile each kernel runs with, per architecture: small committed files, never tuned behind a user's back.

``sm_90.json`` is ``{kernel: {key: {"sizes": {…}, "warps": n, "stages": n, "origin": text}}}``. Where an architecture or
a key is missing, the kernel's first candidate runs. ``python tools/gpu/tune.py`` makes the files on a device.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from importlib import resources

import torch

__all__ = ["Tile", "architecture", "assumed", "known", "look_up", "table"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program works on, and with what.

    Args:
        sizes: of its block, by constant name.
        warps: of 32 threads.
        stages: depth of its software pipeline.
        shared: KiB of shared memory that it takes at most, where some architecture has less (see ``LEAST_SHARED``); the
            report of the kernels holds it to that.
    """

    sizes: Mapping[str, int]
    warps: int = 4
    stages: int = 2
    shared: int = 0


def known() -> list[str]:
    """Architectures with a table, such as ``sm_90``."""
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json"))


@functools.cache
def table(architecture: str) -> Mapping[str, Mapping[str, Tile]]:
    """Tiles by kernel and key; empty where nobody tuned."""
    if architecture not in known():
        return {}
    text = resources.files(__name__).joinpath(f"{architecture}.json").read_text()
    return {
        kernel: {key: Tile(row["sizes"], row["warps"], row["stages"]) for key, row in rows.items()}
        for kernel, rows in json.loads(text).items()
    }


def look_up(kernel: str, key: str, device: torch.device) -> Tile | None:
    """The tuned tile on this device, or None."""
    return table(architecture(device)).get(kernel, {}).get(key)


_assumed: contextvars.ContextVar[str] = contextvars.ContextVar("assumed", default="")


@contextlib.contextmanager
def assumed(name: str) -> Iterator[None]:
    """Within, tensors that are on no GPU count as on one of this architecture: for the offline compiler."""
    token = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(token)


def architecture(device: torch.device) -> str:
    """What a device is, such as ``sm_90``; ``""`` if it is no GPU and none is assumed."""
    return _architecture(device.index or 0) if device.type == "cuda" else _assumed.get()


@functools.cache
def _architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
