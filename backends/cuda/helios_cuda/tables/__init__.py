"""Which tile each kernel runs with, per architecture: small committed files, never tuned behind a user's back.

``sm_90.json`` is ``{kernel: {key: {"sizes": {…}, "warps": n, "stages": n, "origin": text}}}``. Where an architecture or
a key is missing, the kernel's first candidate runs. ``python tools/gpu/tune.py`` makes the files on a device.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources

import torch

__all__ = ["Tile", "known", "look_up", "table"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of a program's block by constant name, its warps (of 32 threads) and the depth of its software pipeline."""

    sizes: Mapping[str, int]
    warps: int = 4
    stages: int = 2


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
    if device.type != "cuda":
        return None
    return table(_architecture(device.index or 0)).get(kernel, {}).get(key)


@functools.cache
def _architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
