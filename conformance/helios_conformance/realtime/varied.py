"""Repeated and varied prompts in turns: whoever keeps results is faster on a request that comes back."""

from __future__ import annotations

import statistics
from typing import Any

from helios_conformance.case import Case, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.realtime import clocks
from helios_conformance.realtime.film import film
from helios_conformance.realtime.scene import open_scene, prompt_of, seed_of
from helios_conformance.realtime.timed import setting_told
from helios_conformance.session import Session
from helios_conformance.videos import coverage_of

__all__ = ["MOST", "judge", "observe", "summary"]

MOST = 1.10
"""Varied prompts may take that many times as long as a repeated one."""

PATIENCE = 4
"""Times as many turns are taken where the first ones differ by more: noise goes away with turns, a cache does not."""


def observe(case: Case, session: Session) -> Observation:
    """Videos of one chunk, in turns: the same request again, and one with another prompt, seed, or both."""
    scene = open_scene(session, case.precision, case.params["variant"])
    turns: list[dict[str, Any]] = []

    def shoot(kind: str, turn: int, prompt: str, seed: int) -> float:
        stream = scene.stream(prompt, seed, case.params["steps"], 1)
        reel = film(stream, session.backend, lambda n, s: True, session.tell, f"{kind} {turn}")
        turns.append({"kind": kind, "turn": turn, "seconds": reel.seconds, "latents": reel.shots[0]["latents"]})
        return reel.seconds

    same = prompt_of(session.root, case.id), seed_of(session.root, case.id)
    shoot("warm-up", 0, *same)
    ratios: list[float] = []
    pairs = scene.options.pairs
    while len(ratios) < pairs or (statistics.median(ratios) > MOST and len(ratios) < PATIENCE * pairs):
        turn = len(ratios)
        other = _request(case, session.root, turn)
        repeated = shoot("repeated", turn, *same)
        ratios.append(shoot("varied", turn, *other) / max(repeated, 1e-9))
    told = {"setting": setting_told(case, session, scene), "turns": turns}
    return Observation(facts=told, coverage=coverage_of(scene.pipeline))


def _request(case: Case, root: Root, turn: int) -> tuple[str, int]:
    """Another prompt, with the repeated seed in every other turn: a stale prompt shows there."""
    labels = (root, case.id, "varied", turn)
    return prompt_of(*labels), seed_of(root, case.id) if turn % 2 else seed_of(*labels)


def summary(facts: Any) -> dict[str, Any] | None:
    """By the parent's clock: ``repeated`` and ``varied`` median seconds, ``ratio`` (median over the turns), ``turns``;
    None where the parent heard nothing."""
    times: dict[str, list[float]] = {"repeated": [], "varied": []}
    for row in facts["turns"]:
        if row["kind"] in times:
            heard = clocks.heard(facts.get("told"), f"{row['kind']} {row['turn']}")
            if heard is None or len(heard.chunks) != 1 or heard.chunks[0].get("latents") != row["latents"]:
                return None
            times[row["kind"]].append(heard.seconds)
    if not times["repeated"] or len(times["repeated"]) != len(times["varied"]):
        return None
    ratios = [v / max(r, 1e-9) for r, v in zip(times["repeated"], times["varied"], strict=True)]
    told: dict[str, Any] = {kind: statistics.median(values) for kind, values in times.items()}
    return told | {"ratio": statistics.median(ratios), "turns": len(ratios)}


def judge(case: Case, observation: Observation) -> Verdict:
    """Equal requests give equal latents, other requests others, and neither is faster for having been seen."""
    facts = observation.facts
    told = summary(facts)
    if told is None:
        return Verdict("fail", "nobody outside the worker took the time of repeated and varied prompts")
    reasons = []
    seconds = {kind: [r["seconds"] for r in facts["turns"] if r["kind"] == kind] for kind in ("repeated", "varied")}
    for kind, values in seconds.items():
        if wrong := clocks.disagreement(told[kind] * len(values), statistics.median(values) * len(values)):
            reasons.append(f"{kind}: {wrong}")
    repeated = {r["latents"] for r in facts["turns"] if r["kind"] in ("repeated", "warm-up")}
    varied = [r["latents"] for r in facts["turns"] if r["kind"] == "varied"]
    if len(repeated) != 1:
        reasons.append("the same request gave different latents")
    if len(set(varied)) != len(varied) or repeated & set(varied):
        reasons.append("different requests gave the same latents: a prompt or a result was kept")
    if told["ratio"] > MOST:
        reasons.append(
            f"varied prompts take {told['ratio']:.2f} times as long as a repeated one, allowed is {MOST:.2f}"
        )
    return Verdict("fail" if reasons else "pass", "; ".join(reasons))
