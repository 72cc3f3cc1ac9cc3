"""What in a report's section on real time contradicts the rest of the report, or itself, or physics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from helios.pipeline.request import frames_of_chunks
from helios_conformance.differences import differences
from helios_conformance.realtime import classes, clocks, roofline, summary, targets
from helios_conformance.realtime.film import SPLIT

__all__ = ["check"]

HEADROOM, HEADROOM_REDUCED = 1.25, 3.0
"""Times faster than the best window of each ceiling that a run may be: ceilings and frames are measured one after the
other. Reduced sizes, which claim nothing, run on hosts that others share."""

ABOVE_PEAK = 1.1
"""Times the data sheet's dense peak that a ceiling may be: boost clocks."""


def check(told: Mapping[str, Any] | None, report: Mapping[str, Any]) -> list[str]:
    """Contradictions, a sentence each; empty where the section may stand.

    Args:
        told: the report's ``realtime``.
        report: all of it; ``cases``, ``backend`` and ``weights`` are read.

    Whatever the two hold, nothing is raised.
    """
    try:
        made = summary.section(report["cases"], report["backend"])
    except summary.MALFORMED as error:
        return [f"realtime: the cases' records are none of this suite: {type(error).__name__}: {error}"[:300]]
    if told is None or made is None:
        return [] if told is made else ["realtime: the section and the cases disagree on whether there was a timed run"]
    found: list[str] = []
    for rule in (_same, _runs, _ceilings, _weights):
        found += _guarded(rule, told, made, report)
    return found


Rule = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], list[str]]


def _guarded(rule: Rule, told: Mapping[str, Any], made: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    try:
        return rule(told, made, report)
    except summary.MALFORMED as error:
        return [f"realtime: the section is malformed: {type(error).__name__}: {error}"[:300]]


def _same(told: Mapping[str, Any], made: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """The section is what the records give."""
    paths = sorted(place for place, _ in differences(told, made, "realtime", _near))
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return [f"the section is not what its cases give: {', '.join(paths[:5])}{more}"] if paths else []


def _near(told: Any, made: Any) -> bool:
    """Whether two figures or words agree; a whole number may stand for a float."""
    if isinstance(made, bool) or isinstance(told, bool) or not isinstance(made, int | float):
        return type(told) is type(made) and bool(told == made)
    return isinstance(told, int | float) and math.isclose(told, made, rel_tol=1e-9, abs_tol=1e-12)


def _runs(told: Mapping[str, Any], made: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    found = []
    for run in told["runs"]:
        for rule in (_adds_up, _length, _parts, _clock, _class, _possible):
            found += [f"{run['case']}: {line}" for line in rule(run, told, report)]
    for one in report["cases"]:
        if one["check"] == "realtime_timed" and one["state"] == "pass":
            found += [f"{one['id']}: {line}" for line in _checked(one["facts"])]
    return found


def _adds_up(run: Mapping[str, Any], told: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """Frames a second, percentiles and seconds follow from the latencies of the chunks."""
    latencies = run["latency"]["chunks"]
    steady = latencies[1:] or latencies
    frames = run["batch"] * frames_of_chunks(1)
    wanted = {
        "chunks": (run["chunks"], len(latencies)),
        "seconds": (run["seconds"], sum(latencies)),
        "fps.steady": (run["fps"]["steady"], frames * len(steady) / max(sum(steady), 1e-9)),
        "fps.wall": (run["fps"]["wall"], frames * len(latencies) / max(sum(latencies), 1e-9)),
        "fps.first_chunk": (run["fps"]["first_chunk"], frames / max(latencies[0], 1e-9)),
        "latency.p50": (run["latency"]["p50"], classes.percentile(steady, 0.5)),
        "latency.p99": (run["latency"]["p99"], classes.percentile(steady, 0.99)),
    }
    return [
        f"{name} is {came:.6g}, the latencies of its chunks give {right:.6g}"
        for name, (came, right) in wanted.items()
        if not math.isclose(came, right, rel_tol=1e-6, abs_tol=1e-9)
    ]


def _length(run: Mapping[str, Any], told: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    full = classes.full_length(run["chunks"], run["seconds"])
    said = f"it claims full length with {run['chunks']} chunks in {run['seconds']:.1f} s; the rule is 45 and 120 s"
    return [said] if run["full_length"] and not full else []


def _parts(run: Mapping[str, Any], told: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """Text, history, denoising and decoding are not more than the chunk."""
    latencies = run["latency"]["chunks"]
    steady = latencies[1:] or latencies
    whole, parts = sum(steady) / len(steady), sum(run["split"][name] for name in SPLIT)
    negative = any(run["split"][name] < 0 for name in SPLIT) or min(latencies) <= 0
    wrong = negative or parts > (1 + clocks.SLACK_SHARE) * whole + clocks.SLACK / len(steady)
    return [f"the parts of a chunk sum to {parts:.4f} s, the chunk takes {whole:.4f} s"] if wrong else []


def _clock(run: Mapping[str, Any], told: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    clock = run["parent_clock"]
    wrong = clocks.disagreement(clock["seconds"], clock["worker_seconds"])
    return [wrong] if wrong and run["class"] != summary.REFUSED else []


def _class(run: Mapping[str, Any], told: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """The class follows from the figures; nothing emulated, nothing that torch computed, no reduced size has one."""
    backend = report["backend"]
    emulated = str(backend.get("emulated") or run["emulated"] or "")
    fallbacks = sum(row[3] for one in report["cases"] if one["id"] == run["case"] for row in one["coverage"])
    fallbacks += sum(row[3] for row in report.get("coverage") or ())
    device = backend["device"]["name"] if isinstance(backend.get("device"), Mapping) else ""
    right = classes.classify(run, device, emulated, fallbacks)
    if run["class"] == right or (run["class"] == summary.REFUSED and run["state"] != "pass"):
        return []
    return [f"it is called {run['class']!r}, its figures and its backend make it {right!r}"]


def _possible(run: Mapping[str, Any], told: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """No faster than the measured ceilings allow for the FLOPs that the shapes have."""
    shape = (run["size"], run["variant"], run["height"], run["width"], run["tokens"], tuple(run["steps"]))
    least = roofline.least_seconds(roofline.chunk_flops(*shape), told["ceilings"]) * run["batch"]
    most = run["batch"] * frames_of_chunks(1) / least if least else math.inf
    if run["fps"]["steady"] <= (HEADROOM if run["size"] == "14b" else HEADROOM_REDUCED) * most:
        return []
    return [f"{run['fps']['steady']:.2f} FPS, and the measured ceilings allow {most:.2f}"]


def _checked(facts: Mapping[str, Any]) -> list[str]:
    """The chunks under the clock are those that were made without it, and those that the parent heard of."""
    shots = {s["index"]: (s["frames"], s["latents"]) for s in facts["chunks"]}
    found = []
    if any(shots.get(i) != (frames, latents) for i, frames, latents in facts["checked"]):
        found.append("chunks of the timed run are not those of the checked run")
    heard = clocks.heard(facts.get("told"), "timed")
    if heard is None or [(c["frames"], c["latents"]) for c in heard.chunks] != list(shots.values()):
        found.append("the chunks that the parent heard of are not those of the timed run")
    return found


def _ceilings(told: Mapping[str, Any], made: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """No ceiling is above the data sheet's peak of the device."""
    backend = report["backend"]
    device = backend["device"]["name"] if isinstance(backend.get("device"), Mapping) else ""
    target = targets.find(device)
    if target is None:
        return []
    peaks = {"FLOP/s": target.peak, "B/s": target.bandwidth}
    return [
        f"the ceiling of {row['what']} ({row['source']}) is {row['best']:.3g} {row['unit']}, the data sheet of "
        f"{target.title} has {peaks[row['unit']]:.3g}"
        for row in told["ceilings"]
        if row["best"] and peaks[row["unit"]] and row["best"] > ABOVE_PEAK * peaks[row["unit"]]
    ]


def _weights(told: Mapping[str, Any], made: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """Weights and precision are those of the report."""
    found = []
    origin = (report.get("weights") or {}).get("origin")
    precision = (report.get("scope") or {}).get("precision")
    for run in told["runs"]:
        if origin is not None and run["weights"] != origin:
            found.append(f"{run['case']}: its weights are {run['weights']!r}, the report's are {origin!r}")
        if precision is not None and run["precision"] != precision:
            found.append(f"{run['case']}: its precision is {run['precision']!r}, the report's is {precision!r}")
    return found
