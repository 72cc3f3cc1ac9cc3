"""The report's section on real time, made from the records of the level's cases and nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from helios.errors import HeliosError
from helios.pipeline.request import frames_of_chunks
from helios_conformance.realtime import classes, clocks, roofline, soak, targets, varied
from helios_conformance.realtime.film import SPLIT
from helios_conformance.realtime.options import LEAST_CHUNKS, LEAST_SECONDS
from helios_conformance.realtime.timed import LABEL

__all__ = ["MALFORMED", "REFUSED", "judged_network", "remarks", "section", "shortcomings"]

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, HeliosError)
"""What anything but this suite's own facts makes the reading of them raise."""

FAR_BELOW = 0.35
"""Part of the data sheet below which the remark says what may be behind it. Nothing is refused for it."""

REFUSED = "refused"
"""The class of a run whose case did not pass: its figures may not stand."""


def section(records: Iterable[Mapping[str, Any]], backend: Mapping[str, Any]) -> dict[str, Any] | None:
    """The section, or None where no timed run was made.

    Args:
        records: of all cases, as ``record.record`` gives them, ``facts["told"]`` among their facts.
        backend: of the report: ``device`` with its ``name``, and ``emulated``.

    Returns:
        the fields of the first timed run, beside ``ceilings``, ``datasheet``, ``varied``, ``soak``, and ``runs`` with
        all of them. A run has ``case``, ``state``, its setting, ``chunks``, ``seconds`` and ``fps`` and ``latency`` by
        the parent's clock, ``split`` of a steady chunk, ``class``, ``published``, ``roofline``, ``clocks``, ``memory``,
        ``parent_clock``, ``least_seconds`` (what the ceilings allow) and ``full_length``.
    """
    by_check: dict[str, list[Mapping[str, Any]]] = {}
    for one in records:
        if one["level"] == "realtime":
            by_check.setdefault(one["check"], []).append(one)
    ceilings = [row for one in by_check.get("realtime_ceilings", ()) for row in one["facts"].get("rows", ())]
    timed = by_check.get("realtime_timed", ())
    runs = [made for one in timed if (made := _run(one, backend, ceilings)) is not None]
    if not runs:
        return None
    target = targets.find(_device(backend))
    shared = {
        "ceilings": ceilings,
        "datasheet": target.datasheet() if target else None,
        "varied": _first(by_check.get("realtime_varied", ()), varied.summary, "turns"),
        "soak": _first(by_check.get("realtime_soak", ()), soak.summary, "chunks"),
    }
    return {**runs[0], **shared, "runs": runs}


def _device(backend: Mapping[str, Any]) -> str:
    device = backend.get("device")
    return str(device.get("name", "")) if isinstance(device, Mapping) else str(device or "")


def _first(found: Sequence[Mapping[str, Any]], make: Any, needed: str) -> dict[str, Any] | None:
    """The summary of the first record that has what it needs, with its state."""
    for one in found:
        try:
            made = make(one["facts"]) if needed in one["facts"] else None
        except MALFORMED:
            made = None
        if made is not None:
            return {"case": one["id"], "state": one["state"], **made}
    return None


def _run(
    one: Mapping[str, Any], backend: Mapping[str, Any], ceilings: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    facts = one["facts"]
    heard = clocks.heard(facts.get("told"), LABEL)
    if heard is None or "setting" not in facts:
        return None
    try:
        return _made(one, heard, backend, ceilings)
    except MALFORMED:  # whoever shares the worker's process can write what it likes; what it wrote is no run
        return None


def _made(
    one: Mapping[str, Any],
    heard: clocks.Heard,
    backend: Mapping[str, Any],
    ceilings: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    facts = one["facts"]
    shots, setting = facts["chunks"], facts["setting"]
    run = {"case": one["id"], "state": one["state"], **setting, "vae": facts["vae"].get("precision", "fp32")}
    run |= {"chunks": len(heard.arrivals), "seconds": heard.seconds, "warmup": facts["warmup"]}
    run |= {"load_seconds": facts["load_seconds"], "split": _split(shots), **_speed(heard, setting["batch"])}
    run |= {"clocks": facts["sensors"], "memory": facts["memory"], "parent_clock": _clocks(heard, facts)}
    run["full_length"] = classes.full_length(run["chunks"], run["seconds"])
    run["coverage"] = {"nodes": sum(sum(row[1:4]) for row in one["coverage"])}
    run["coverage"]["fallback"] = sum(row[3] for row in one["coverage"])
    return run | _judged(run, one, backend, ceilings)


def _speed(heard: clocks.Heard, batch: int) -> dict[str, Any]:
    """Frames a second and latency by the parent's clock; steady is every chunk but the first."""
    latencies = heard.latencies
    steady = latencies[1:] or latencies
    frames = batch * frames_of_chunks(1)
    fps = {
        "steady": frames * len(steady) / max(sum(steady), 1e-9),
        "first_chunk": frames / max(latencies[0], 1e-9),
        "wall": frames * len(latencies) / max(heard.seconds, 1e-9),
    }
    p50, p99 = (classes.percentile(steady, share) for share in (0.5, 0.99))
    return {"fps": fps, "latency": {"p50": p50, "p99": p99, "first": latencies[0], "chunks": latencies}}


def _split(shots: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean seconds of each part of a steady chunk, by the worker's clock; ``hash`` is what the digests took."""
    steady = shots[1:] or shots
    parts = {name: statistics.fmean(s["split"][name] for s in steady) for name in SPLIT}
    return parts | {"hash": statistics.fmean(s["hash"] for s in steady)}


def _clocks(heard: clocks.Heard, facts: Mapping[str, Any]) -> dict[str, Any]:
    worker = facts["seconds"]
    told = {"seconds": heard.seconds, "worker_seconds": worker, "difference": heard.seconds - worker}
    return told | {"drain": facts["drain"]}


def _judged(
    run: Mapping[str, Any],
    one: Mapping[str, Any],
    backend: Mapping[str, Any],
    ceilings: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The class and what stands beside it."""
    device, steps = _device(backend), run["steps"]
    emulated = str(backend.get("emulated") or run["emulated"] or "")
    passed = one["state"] == "pass"
    found = classes.classify(run, device, emulated, run["coverage"]["fallback"]) if passed else REFUSED
    shape = (run["size"], run["variant"], run["height"], run["width"], run["tokens"], tuple(steps))
    return {
        "class": found,
        "published": classes.published(device, run["variant"], steps, run["height"], run["width"]),
        "roofline": roofline.rows(one["facts"].get("profile", ()), ceilings, steps, run["latency"]["p50"]),
        "least_seconds": roofline.least_seconds(roofline.chunk_flops(*shape), ceilings) * run["batch"],
    }


def judged_network(told: Mapping[str, Any]) -> str:
    """How much of the timed network was judged, as a sentence. Whatever the section holds, nothing is raised."""
    try:
        drawn = all(run["weights"] == "random" for run in told["runs"])
    except MALFORMED:
        return "How much of the timed network was judged, the section on real time does not say."
    if drawn:
        return "Of the timed network one drawn block of one stage is judged a case, not every block."
    return (
        "With weights of a checkpoint nothing of the timed network is judged: not that it ran all its layers, nor that "
        "its frames follow from its latents."
    )


def remarks(told: Mapping[str, Any] | None) -> list[str]:
    """How far the measured ceilings are from the data sheet of the device's name, a sentence; empty where none is known
    or nothing was measured. Whatever the section holds, nothing is raised."""
    try:
        sheet = told["datasheet"] if told else None
        if not told or not sheet:
            return []
        peaks = {"FLOP/s": sheet["bf16"], "B/s": sheet["bandwidth"]}
        rows = [row for row in told["ceilings"] if row["what"] in ("linear", "copy") and _comparable(row)]
        parts = [f"of {row['what']} {100 * row['best'] / peaks[row['unit']]:.0f} %" for row in rows]
        least = min((row["best"] / peaks[row["unit"]] for row in rows), default=1.0)
    except MALFORMED:
        return ["The section on real time is malformed."]
    if not parts:
        return []
    odd = ": a slower device under that name would look so" if least < FAR_BELOW else ""
    of = f"of what the data sheet gives for {sheet['device']}{odd}"
    return [f"The device is named by its host; its measured ceilings are {' and '.join(parts)} {of}."]


def _comparable(row: Mapping[str, Any]) -> bool:
    """Whether a ceiling was measured, and in what the data sheet speaks of."""
    return bool(row["best"]) and (row["unit"] == "B/s" or row["dtype"] == "bfloat16")


def shortcomings(told: Mapping[str, Any] | None) -> list[str]:
    """Why a section is no full measurement of the published size, a sentence each; empty where it is one. Whatever it
    holds, nothing is raised."""
    if told is None:
        return ["no timed run was made"]
    try:
        found = [f"{run['case']}: {line}" for run in told["runs"] for line in _short(run)]
        found += [] if told["varied"] is not None else ["repeated and varied prompts were not compared"]
        return found + ([] if told["ceilings"] else ["no ceiling was measured"])
    except MALFORMED:
        return ["the section on real time is malformed"]


def _short(run: Mapping[str, Any]) -> Iterable[str]:
    if run["state"] != "pass":
        yield "the case did not pass, so its figures may not stand"
    if run["weights"] != "random":
        yield "with weights of a checkpoint nothing of the timed network is judged: time random weights to certify"
    if run["size"] != "14b":
        yield f"size {run['size']} is not the published one"
    if (run["height"], run["width"]) != (384, 640):
        yield f"{run['height']}×{run['width']} pixels are not the published 384×640"
    if not run["full_length"]:
        rule = f"{LEAST_CHUNKS} and {LEAST_SECONDS:.0f} s"
        yield f"{run['chunks']} chunks in {run['seconds']:.0f} s are less than the rule of {rule}"
    if run["class"] in ("measured (emulated)", "measured (fallback)"):
        yield f"it is {run['class']}"
