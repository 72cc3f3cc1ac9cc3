"""The timed run: what is filmed and noted on the device, and how it is judged without it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from helios.graph import Rate
from helios.precision import PRECISIONS
from helios_conformance.case import Case, Judged, Kept, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.realtime import classes, clocks, golden, opened, roofline, shown, tied
from helios_conformance.realtime.film import KEPT, Reel, film, looks
from helios_conformance.realtime.scene import Scene, open_scene, prompt_of, seed_of
from helios_conformance.realtime.sensors import Sensors, allocator_peak, device_bytes, host_bytes
from helios_conformance.references import References
from helios_conformance.selection import digest
from helios_conformance.session import Session
from helios_conformance.videos import coverage_of

__all__ = ["LABEL", "judge", "observe", "setting_told"]

LABEL = "timed"

DRAIN = 0.25
"""Seconds that a device may take to become idle after the clock stopped, or a fifth of a chunk where that is more."""


def observe(case: Case, session: Session) -> Observation:
    """Load, warm up, film, and then look at what was filmed."""
    scene = open_scene(session, case.precision, case.params["variant"])
    options, steps = scene.options, case.params["steps"]
    prompt, seed = prompt_of(session.root, case.id), seed_of(session.root, case.id)
    before = {"load_seconds": _load(scene, steps), "warmup": _warm(case, session, scene)}
    with Sensors(session.backend) as sensors:
        reel = film(
            scene.stream(prompt, seed, steps),
            session.backend,
            lambda chunks, seconds: chunks >= options.chunks and seconds >= options.seconds,
            session.tell,
            LABEL,
        )
        drain = _drain(session, scene, steps)
    facts: dict[str, Any] = {
        "setting": setting_told(case, session, scene) | {"prompt": prompt, "seed": seed},
        **before,
        "chunks": reel.shots,
        "seconds": reel.seconds,
        "drain": drain,
        "looks": looks(reel),
        "memory": _memory(session, reel),
        "sensors": sensors.told(),
    }
    return _tie(case, session, scene, reel, facts)


def _tie(case: Case, session: Session, scene: Scene, reel: Reel, facts: dict[str, Any]) -> Observation:
    """Everything after the clock: chunks made again, drawn forwards, the profile, and the network opened."""
    facts["other"] = _other(case, session, scene, facts["setting"]["seed"] + 1)
    facts["rehashed"] = [[i, digest(frames)] for i, frames in reel.frames.items()]
    request = scene.request(facts["setting"]["prompt"], facts["setting"]["seed"], case.params["steps"])
    facts["vae"] = scene.pipeline.plan(request)["vae"]
    outputs = _made_again(case, session, scene, reel, facts) | tied.forwards(case, session, scene)
    facts["profile"] = _profile(case, session, scene, facts["vae"])
    coverage = coverage_of(scene.pipeline)
    # The last thing: it frees the timed program.
    inner, facts["opened"] = opened.observe(case, session, scene, reel.shots[-1]["latents"])
    return Observation(outputs | inner, facts, coverage)


def _other(case: Case, session: Session, scene: Scene, seed: int) -> str:
    """Another video in between: whoever repeats the last result, repeats that one."""
    other = scene.stream(prompt_of(session.root, case.id, "other"), seed, case.params["steps"], 1)
    return digest(next(iter(other)).latents)


def _made_again(case: Case, session: Session, scene: Scene, reel: Reel, facts: dict[str, Any]) -> dict[str, Kept]:
    """Chunks without a clock, and what is kept of the one whose frames are judged."""
    count, setting = min(KEPT, len(reel.shots)), facts["setting"]
    seen = shown.drawn(session.root, case.id, reel.shots[-1]["latents"], count)
    picks = sorted({*tied.picked(session.root, case.id, reel.shots, count), seen})
    outputs: dict[str, Kept] = {}
    facts["checked"] = []
    for told, chunk in tied.again(scene, reel, setting["prompt"], setting["seed"], case.params["steps"], picks):
        facts["checked"].append(told)
        if chunk.index == seen:
            outputs, facts["shown"] = shown.keep(session.root, case, scene.options, chunk, facts["vae"])
    return outputs


def _profile(case: Case, session: Session, scene: Scene, vae: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of the timed program and of the decoder."""
    program = scene.pipeline.denoiser(scene.request("profile", 0, case.params["steps"])).program
    graphs = golden.graphs_of(scene.options, case.params["variant"], PRECISIONS[case.precision])
    return roofline.profile(session, scene, program, graphs, vae)


def setting_told(case: Case, session: Session, scene: Scene) -> dict[str, Any]:
    """What was run, as JSON values."""
    o, pipeline = scene.options, scene.pipeline
    return {
        "size": o.size,
        "variant": case.params["variant"],
        "steps": list(case.params["steps"]),
        "amplify": scene.request("setting", 0, case.params["steps"]).amplify,
        "height": o.height,
        "width": o.width,
        "tokens": o.tokens,
        "batch": 1,
        "precision": case.precision,
        "weights": scene.origin,
        "model": pipeline.model.name,
        "text": getattr(pipeline.text, "origin", ""),
        "emulated": session.backend.emulated,
        "asked": {"chunks": o.chunks, "seconds": o.seconds},
    }


def _load(scene: Scene, steps: Sequence[int]) -> float:
    begin = time.perf_counter()
    scene.pipeline.denoiser(scene.request("load", 0, steps))
    scene.pipeline.backend.synchronize()
    return time.perf_counter() - begin


def _warm(case: Case, session: Session, scene: Scene) -> dict[str, Any]:
    """Chunks of another video, so that the decoder is loaded and every kernel has run."""
    begin, count = time.perf_counter(), scene.options.warmup
    labels = (session.root, case.id, "warm-up")
    for chunk in scene.stream(prompt_of(*labels), seed_of(*labels), case.params["steps"], count):
        digest(chunk.frames)
    return {"chunks": count, "seconds": time.perf_counter() - begin}


def _drain(session: Session, scene: Scene, steps: Sequence[int]) -> float:
    """Seconds until the device has done one more small thing: work that was put off would come first."""
    begin = time.perf_counter()
    program = scene.pipeline.denoiser(scene.request("drain", 0, steps)).program
    name = "step.0"  # the solver's step at the coarsest stage
    inputs = golden.draw({name: program.plan.steps[name]}, Rate.STEP, session.root)
    for tensor in program.run(name, inputs).values():
        session.to_host(tensor)
    session.backend.synchronize()
    return time.perf_counter() - begin


def _memory(session: Session, reel: Reel) -> dict[str, Any]:
    """The most of host and device memory that was seen, and of torch's allocator, in bytes; None where nobody tells."""
    hosts = [s["rss"] for s in reel.shots if s["rss"] is not None]
    devices = [s["device"] for s in reel.shots if s["device"] is not None]
    now = [x for x in (host_bytes(),) if x is not None]
    used = [x for x in (device_bytes(session.backend),) if x is not None]
    told = {"host": max([*hosts, *now], default=None), "device": max([*devices, *used], default=None)}
    return told | {"allocator": allocator_peak(session.backend)}


def judge(case: Case, observation: Observation, root: Root, references: References) -> Verdict:
    """Whether the figures of this run may stand: not how good they are."""
    facts = observation.facts
    setting = facts["setting"]
    reasons = [*_of_the_case(case, setting, root), *judge_clock(facts), *_pictures(facts), *_digests(facts)]
    judged: dict[str, Judged] = {}
    if not reasons or setting["weights"] == "random":
        for found, wrong in (
            tied.judge_forwards(case, observation, setting, root, references),
            opened.judge(case, observation, setting, root, references),
            shown.judge(case, observation, setting, root, KEPT),
        ):
            judged |= found
            reasons += wrong
    return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)


def _of_the_case(case: Case, setting: Mapping[str, Any], root: Root) -> list[str]:
    """What was run is what the case names."""
    wanted = {
        "variant": case.params["variant"],
        "steps": list(case.params["steps"]),
        "precision": case.precision,
        "prompt": prompt_of(root, case.id),
        "seed": seed_of(root, case.id),
    }
    return [
        f"{name} is {setting[name]!r}, the case has {value!r}"
        for name, value in wanted.items()
        if setting[name] != value
    ]


def judge_clock(facts: Mapping[str, Any]) -> list[str]:
    """The parent's clock against the worker's, chunk digests as they arrived, and what was left to do afterwards."""
    shots = facts["chunks"]
    heard = clocks.heard(facts.get("told"), LABEL)
    if heard is None or len(heard.chunks) != len(shots):
        return ["nobody outside the worker took the time: the parent heard no chunks, or others than were noted"]
    reasons = []
    for shot, line in zip(shots, heard.chunks, strict=True):
        if (shot["frames"], shot["latents"]) != (line.get("frames"), line.get("latents")):
            reasons.append(f"chunk {shot['index']}: other digests were told when the clock stopped than were noted")
    worker = sum(s["seconds"] for s in shots)
    for seconds in (worker, facts["seconds"]):
        if wrong := clocks.disagreement(heard.seconds, seconds):
            reasons.append(wrong)
            break
    if any(sum(s["split"].values()) > 1.02 * s["seconds"] + 0.002 for s in shots):
        reasons.append("the parts of a chunk take longer than the chunk: a clock was tampered with")
    typical = classes.percentile(heard.latencies, 0.5)
    if facts["drain"] > max(DRAIN, 0.2 * typical):
        reasons.append(f"the device worked for {facts['drain']:.3f} s more after the clock had stopped")
    return reasons


def _pictures(facts: Mapping[str, Any]) -> list[str]:
    """Whether there is anything to see, and something else in each chunk."""
    seen, reasons = facts["looks"], []
    spread, pixels = seen["latents_std"][0], seen["frames_std"][0]
    if not seen["finite"]:
        reasons.append("latents are not finite")
    if spread is None or seen["latents_std"][1] is None or not 1e-3 < spread <= seen["latents_std"][1] < 1e4:
        reasons.append(f"latents are degenerate: standard deviation {seen['latents_std']}")
    if pixels is None or pixels < 0.5:
        reasons.append(f"frames are degenerate: standard deviation {seen['frames_std']} of 255 levels")
    frames = [shot["frames"] for shot in facts["chunks"]]
    if len(set(frames)) != len(frames) or len({s["latents"] for s in facts["chunks"]}) != len(frames):
        reasons.append("two chunks of the video are the same")
    if seen["changed"] < 0.5:
        reasons.append(f"only {seen['changed']:.1%} of the latents change from one chunk to another")
    if seen["distinct"] < 2:
        reasons.append("all frames of a chunk are the same picture")
    return reasons


def _digests(facts: Mapping[str, Any]) -> list[str]:
    """What was hashed under the clock against what was there later, and against chunks made without a clock."""
    shots = {s["index"]: s for s in facts["chunks"]}
    reasons = [
        f"chunk {i}: its frames changed after the clock had stopped"
        for i, told in facts["rehashed"]
        if shots[i]["frames"] != told
    ]
    checked = {i: (frames, latents) for i, frames, latents in facts["checked"]}
    if not {0, min(1, len(shots) - 1)} <= set(checked):
        reasons.append("the first chunks were not made again")
    reasons += [
        f"chunk {i}: made again without the clock it is another"
        for i, pair in checked.items()
        if pair != (shots[i]["frames"], shots[i]["latents"])
    ]
    if facts["other"] in {s["latents"] for s in shots.values()}:
        reasons.append("another prompt and seed gave a chunk of this video")
    return reasons
