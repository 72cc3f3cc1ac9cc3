"""The long run: whether speed, memory and temperature stay where they were."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from helios.pipeline.run import Chunk
from helios_conformance.case import Case, Observation, Verdict
from helios_conformance.realtime import clocks
from helios_conformance.realtime.classes import percentile
from helios_conformance.realtime.film import film
from helios_conformance.realtime.options import Options
from helios_conformance.realtime.scene import open_scene, prompt_of, seed_of
from helios_conformance.realtime.sensors import Sensors
from helios_conformance.realtime.timed import setting_told
from helios_conformance.session import Session
from helios_conformance.videos import coverage_of

__all__ = ["GROWTH", "judge", "observe", "summary"]

LABEL = "soak"

GROWTH = 0.02
"""Share by which host or device memory may grow from the second quarter of the run to its end …"""

GROWTH_BYTES = 128 << 20
"""… beyond this many bytes: allocators round, logs grow."""


def observe(case: Case, session: Session) -> Observation:
    """Film for as long as the options say, keeping nothing but figures."""
    options = Options.of(session.options)
    scene = open_scene(session, case.precision, case.params["variant"])
    prompt, seed = prompt_of(session.root, case.id), seed_of(session.root, case.id)
    for _ in scene.stream(prompt, seed, case.params["steps"], options.warmup):
        pass
    with Sensors(session.backend, period=5.0) as sensors:
        reel = film(
            scene.stream(prompt, seed, case.params["steps"]),
            session.backend,
            lambda chunks, seconds: seconds >= options.soak,
            session.tell,
            LABEL,
            _look,
        )
    facts = {"setting": setting_told(case, session, scene), "chunks": reel.shots, "seconds": reel.seconds}
    told = facts | {"asked": options.soak, "sensors": sensors.told()}
    return Observation(facts=told, coverage=coverage_of(scene.pipeline))


def _look(chunk: Chunk) -> Mapping[str, Any]:
    finite = bool(chunk.latents.isfinite().all())
    return {"finite": finite, "std": float(chunk.latents.std()) if finite else None}


def summary(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """By the parent's clock: ``seconds``, ``chunks``, ``p50`` and ``p99`` of each quarter, their ``drift`` (last over
    first), ``memory`` growth in bytes from the second quarter on, ``temperature``; None without a long run."""
    heard = clocks.heard(facts.get("told"), LABEL)
    if "not_run" in facts or heard is None:
        return None
    quarters = _quarters(heard.latencies[1:] or heard.latencies)
    made = {name: [percentile(q, share) for q in quarters] for name, share in (("p50", 0.5), ("p99", 0.99))}
    sensors = facts.get("sensors") or {}
    return {
        "seconds": heard.seconds,
        "asked": facts["asked"],
        "chunks": len(heard.arrivals),
        **made,
        "drift": {name: values[-1] / max(values[0], 1e-9) for name, values in made.items()},
        "memory": {
            name: _growth([s[key] for s in facts["chunks"]]) for name, key in (("host", "rss"), ("device",) * 2)
        },
        "temperature": sensors.get("temperature_c"),
        "sensors": facts.get("sensors"),
    }


def _quarters(values: Sequence[float]) -> list[Sequence[float]]:
    """Four parts in order, as equal as can be; fewer of fewer than four values."""
    parts = min(4, len(values))
    edges = [len(values) * i // parts for i in range(parts + 1)]
    return [values[a:b] for a, b in itertools.pairwise(edges)]


def _growth(values: Sequence[int | None]) -> dict[str, int] | None:
    """Bytes at the end of the first quarter, at the end, and between them; None where nobody told."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    first, last = known[len(known) // 4], known[-1]
    return {"first": first, "last": last, "grown": last - first}


def judge(case: Case, observation: Observation) -> Verdict:
    """Latency over time is shown; memory, clock and pictures are judged."""
    facts = observation.facts
    told = summary(facts)
    if told is None or told["chunks"] != len(facts["chunks"]):
        return Verdict("fail", "nobody outside the worker took the time of the long run")
    reasons = [r for r in (clocks.disagreement(told["seconds"], facts["seconds"]),) if r]
    if told["seconds"] < facts["asked"] * (1 - clocks.SLACK_SHARE) - clocks.SLACK:
        reasons.append(f"the long run took {told['seconds']:.0f} s, asked were {facts['asked']:.0f} s")
    if any(not s["finite"] or not s["std"] or s["std"] < 1e-3 for s in facts["chunks"]):
        reasons.append("latents became degenerate or were not finite")
    if len({s["latents"] for s in facts["chunks"]}) != len(facts["chunks"]):
        reasons.append("two chunks of the video are the same")
    for name, grown in told["memory"].items():
        if grown is not None and grown["grown"] > GROWTH_BYTES + GROWTH * grown["first"]:
            reasons.append(f"{name} memory grew by {grown['grown'] / 1e6:.0f} MB from the second quarter to the end")
    return Verdict("fail" if reasons else "pass", "; ".join(reasons))
