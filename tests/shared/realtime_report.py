"""A report on figures that no device made: a right run of the published size, and what surrounds it."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

from helios_conformance.draws import Root
from helios_conformance.realtime import (
    section,
    shown,
)
from helios_conformance.realtime.scene import prompt_of, seed_of

ROOT = Root(3, "nonce")
H100 = "NVIDIA H100 80GB HBM3"
ID = "realtime[bf16,distilled,1-1-1]"


def sha(*labels: object) -> str:
    return hashlib.sha256(repr(labels).encode()).hexdigest()


def told_lines(label: str, latencies: list[float], start: float = 5.0) -> list[list[Any]]:
    at, lines = start, [[start, {"event": "begin", "of": label}]]
    for i, seconds in enumerate(latencies):
        at += seconds
        chunk = {"event": "chunk", "of": label, "index": i, "frames": sha("f", i), "latents": sha("l", i)}
        lines.append([at, chunk])
    return [*lines, [at, {"event": "end", "of": label, "chunks": len(latencies)}]]


def facts(chunk: float = 2.8, chunks: int = 50, **setting: Any) -> dict[str, Any]:
    """A right run of the published size, that many seconds a chunk."""
    latencies = [1.6 * chunk, *[chunk] * (chunks - 1)]
    parts = {"text": 0.0, "history": 0.01 * chunk, "denoise": 0.7 * chunk, "decode": 0.2 * chunk}
    shots = [
        {"index": i, "seconds": s, "hash": 0.01, "frames": sha("f", i), "latents": sha("l", i), "split": dict(parts)}
        | {"rss": 3_000_000_000, "device": 40_000_000_000}
        for i, s in enumerate(latencies)
    ]
    run = {"size": "14b", "variant": "distilled", "steps": [1, 1, 1], "amplify": True, "height": 384, "width": 640}
    run |= {
        "tokens": 512,
        "batch": 1,
        "precision": "bf16",
        "weights": "random",
        "model": "",
        "text": "",
        "emulated": "",
    }
    run |= {"asked": {"chunks": 45, "seconds": 120.0}, "prompt": prompt_of(ROOT, ID), "seed": seed_of(ROOT, ID)}
    seen = shown.drawn(ROOT, ID, shots[-1]["latents"], min(chunks, 64))
    return {
        "setting": run | setting,
        "load_seconds": 90.0,
        "warmup": {"chunks": 2, "seconds": 3 * chunk},
        "chunks": shots,
        "seconds": sum(latencies),
        "drain": 0.01,
        "rehashed": [[0, sha("f", 0)], [chunks - 1, sha("f", chunks - 1)]],
        "looks": {"finite": True, "latents_std": [0.9, 1.1], "frames_std": [40.0, 60.0], "changed": 1.0}
        | {"distinct": 33, "of": chunks},
        "memory": {"host": 3_000_000_000, "device": 40_000_000_000},
        "sensors": None,
        "checked": [[i, sha("f", i), sha("l", i)] for i in (0, 1, 7, chunks - 1, seen)],
        "shown": {"chunk": seen, "frames": [sha("frame", i) for i in range(33)]},
        "vae": {"group": 9},
        "opened": None,
        "other": sha("other"),
        "profile": [
            {"entry": "denoise.2", "op": "linear", "dtype": "bfloat16", "nodes": 1}
            | {"flops": 2 * 10**14, "bytes": 10**10, "seconds": 0.4 * chunk},
            {"entry": "decode", "op": "conv3d", "dtype": "float32", "nodes": 1}
            | {"flops": 6 * 10**13, "bytes": 10**10, "seconds": 0.2 * chunk},
        ],
        "told": told_lines("timed", latencies),
    }


def ceiling(what: str, best: float, unit: str = "FLOP/s") -> dict[str, Any]:
    told = {
        "what": what,
        "shape": "",
        "dtype": "bfloat16",
        "source": "torch on cuda",
        "rate": 0.97 * best,
        "best": best,
    }
    return told | {"unit": unit, "seconds": 1.5, "windows": 10}


CEILINGS = [
    ceiling("linear", 7.5e14),
    ceiling("attention", 6e14),
    ceiling("conv3d", 3e14),
    ceiling("copy", 3e12, "B/s"),
]


def record(check_name: str, case: str, told: dict[str, Any], state: str = "pass") -> dict[str, Any]:
    one = {"id": case, "level": "realtime", "check": check_name, "precision": "bf16", "required": True, "state": state}
    return one | {"reason": "", "seconds": 1.0, "facts": told, "coverage": [["linear", 300, 20, 0, ""]], "outputs": {}}


def report(told: dict[str, Any] | None = None, device: str = H100, emulated: str = "") -> dict[str, Any]:
    cases = [
        record("realtime_ceilings", "ceilings[bf16,distilled]", {"rows": copy.deepcopy(CEILINGS)}),
        record("realtime_timed", ID, told or facts()),
    ]
    whole: dict[str, Any] = {"cases": cases, "backend": {"device": {"name": device}, "emulated": emulated}}
    whole |= {"weights": {"origin": "random"}, "scope": {"precision": "bf16"}, "coverage": []}
    whole["realtime"] = section(cases, whole["backend"])
    copied: dict[str, Any] = json.loads(json.dumps(whole, allow_nan=False))
    return copied
