"""What a node could take at best: its FLOPs and bytes at the rates of this device, measured by *ceilings* or not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from results import Record

from helios.fit.devices import recognise

__all__ = ["Rates", "kind_of", "numbers_of", "of_device"]

GROUPS = {"gemm": "products", "attention": "attention", "vae": "convolutions"}
"""Groups of *ceilings*, by what multiplies in them."""


E4M3 = "float8_e4m3fn"


def kind_of(op: str) -> str:
    """What multiplies in an op.

    >>> kind_of("qkv_linear"), kind_of("quantized_attention"), kind_of("conv3d")
    ('products', 'attention', 'convolutions')
    """
    if op.endswith("attention"):
        return "attention"
    return "convolutions" if "conv" in op else "products"


def numbers_of(op: str, dtype: torch.dtype) -> str:
    """What numbers it multiplies.

    Args:
        dtype: of its result.

    >>> numbers_of("quantized_linear", torch.bfloat16), numbers_of("packed_linear", torch.bfloat16)
    ('float8_e4m3fn', 'bfloat16')
    """
    return E4M3 if op.startswith(("quantized_", "scaled_")) else str(dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True)
class Rates:
    """Per second.

    Attributes:
        flops: by kind and dtype.
        memory: bytes; 0 where nothing is known.
        source: whether measured or from a data sheet.
    """

    flops: Mapping[tuple[str, str], float]
    memory: float
    source: str

    def floor(self, op: str, dtype: torch.dtype, flops: int, moved: int) -> float | None:
        """Milliseconds: by arithmetic or by memory, whichever is longer; None where neither rate is known."""
        rate = self.flops.get((kind_of(op), numbers_of(op, dtype)), 0.0) if flops else 0.0
        busy = flops / rate if rate else 0.0
        wait = moved / self.memory if self.memory else 0.0
        return 1e3 * max(busy, wait) or None


def of_device(name: str, out: Path) -> Rates:
    """Of a device by name: what *ceilings* measured on it, from the log in ``out``; the data sheet for the rest."""
    found = list(_measured(name, out / "ceilings.jsonl"))
    flops = {key: rate for key, rate in _best(found).items() if rate}
    memory = max((1e9 * r["gbps"] for r in found if r["id"].startswith("copy/") and r.get("gbps")), default=0.0)
    known = recognise(name)
    if known is None:
        return Rates(flops, memory, "measured by ceilings" if found else "nothing is known of this device")
    faster = {"bfloat16": 1, "float16": 1, E4M3: 2}  # where tensor cores multiply them, twice as many
    sheet = {(kind, dtype): n * known.peak for kind in GROUPS.values() for dtype, n in faster.items() if known.peak}
    lacks = [kind for kind in GROUPS.values() if (kind, "bfloat16") not in flops] + ["memory"] * (not memory)
    source = "measured by ceilings" if not lacks else f"data sheet of {known.title} for {', '.join(lacks)}"
    return Rates({**sheet, **flops}, memory or known.bandwidth, source)


def _best(found: list[Record]) -> dict[tuple[str, str], float]:
    best: dict[tuple[str, str], float] = {}
    for record in found:
        kind = GROUPS.get(str(record["id"]).split("/", 1)[0])
        if kind and record.get("tflops"):
            key = (kind, str(record.get("dtype")))
            best[key] = max(best.get(key, 0.0), 1e12 * record["tflops"])
    return best


def _measured(name: str, log: Path) -> Iterator[dict[str, Any]]:
    """Right records of this device at real shapes."""
    here = False
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "header" in entry:
            here = entry["header"].get("device") == name and not entry["header"].get("tiny")
        elif here and entry.get("status") == "measured":
            yield entry
