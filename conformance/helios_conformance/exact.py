"""What must be the same to the bit: runs of one pipeline compared by the digests of their latents and frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from helios.graph import TensorType
from helios.pipeline import Chunk, Pipeline
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Observation, Suite, Verdict
from helios_conformance.draws import Root
from helios_conformance.graph_runs import Wanted, judge_kept, keep
from helios_conformance.selection import digest
from helios_conformance.videos import (
    Video,
    coverage_of,
    first_chunk_errors,
    golden_video,
    pipeline_of,
    state_through_bytes,
)

if TYPE_CHECKING:
    from helios_conformance.references import References
    from helios_conformance.session import Session

__all__ = ["Rule", "Run", "Same", "Scenario", "scenarios"]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a scenario.

    Attributes:
        name: of it.
        video: what it makes.
        after: run and chunk whose state it starts from; ``None``: the beginning.
        fresh: on a pipeline of its own, from a state that went through bytes.
    """

    name: str
    video: Video
    after: tuple[str, int] | None = None
    fresh: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
    """Whether a chunk of one run is, or is not, that chunk of another, to the bit."""

    one: str
    other: str
    chunk: int
    equal: bool = True


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Runs in their order on one pipeline, and what must hold between them."""

    runs: tuple[Run, ...]
    rules: tuple[Rule, ...]


def _twice(video: Video) -> Scenario:
    other = dataclasses.replace(video, chunks=1, more=(*video.more, ("seed", 12345)))
    runs = (Run("one", video), Run("two", video), Run("other_seed", other))
    same = (Rule("one", "two", i) for i in range(video.chunks))
    return Scenario(runs, (*same, Rule("one", "other_seed", 0, equal=False)))


def _isolation(video: Video) -> Scenario:
    other = dataclasses.replace(video, prompts=("b",))
    runs = (Run("a", video), Run("b", other), Run("again", video))
    return Scenario(runs, (Rule("a", "again", 0), Rule("a", "b", 0, equal=False)))


def _resume(video: Video) -> Scenario:
    runs = (Run("whole", video), Run("rest", video, ("whole", 0), fresh=True))
    return Scenario(runs, tuple(Rule("whole", "rest", i) for i in range(1, video.chunks)))


def _switch(video: Video) -> Scenario:
    """The prompt changes at chunk 1, at once: before, the run of the first prompt; after, one that branched off."""
    script = dataclasses.replace(video, schedule=(("a", 1), ("b", 2)), more=(("interpolation_steps", 0),))
    branch = dataclasses.replace(video, prompts=("b",))
    runs = (Run("plain", video), Run("script", script), Run("branch", branch, ("plain", 0)))
    after = (Rule("script", "branch", i) for i in (1, 2))
    return Scenario(runs, (Rule("script", "plain", 0), *after, Rule("script", "plain", 1, equal=False)))


def _blend(video: Video) -> Scenario:
    """The new prompt takes over within three chunks, the first of which still has all of the old one."""
    script = dataclasses.replace(video, schedule=(("a", 1), ("b", 2)), more=(("interpolation_steps", 3),))
    rules = (Rule("script", "plain", 0), Rule("script", "plain", 1), Rule("script", "plain", 2, equal=False))
    return Scenario((Run("plain", video), Run("script", script)), rules)


def scenarios() -> Mapping[str, Scenario]:
    """By what stands in the id; those that begin with ``distilled`` or ``mid`` belong to the full suite."""
    base = Video("base", side=32, steps=(2,))
    three = dataclasses.replace(base, chunks=3)
    distilled, mid = Video("distilled"), Video("mid", steps=(1, 1, 1))
    return {
        "seed_twice": _twice(dataclasses.replace(base, chunks=2)),
        "prompts_a_b_a": _isolation(base),
        "resume": _resume(three),
        "switch": _switch(three),
        "blend": _blend(three),
        "batch2_twice": _twice(dataclasses.replace(base, prompts=("a", "b"))),
        "image_twice": _twice(dataclasses.replace(base, start="image")),
        "distilled_seed_twice": _twice(dataclasses.replace(distilled, chunks=2)),
        "distilled_prompts_a_b_a": _isolation(distilled),
        "distilled_resume": _resume(dataclasses.replace(distilled, chunks=3)),
        "distilled_switch": _switch(dataclasses.replace(distilled, chunks=3)),
        "mid_prompts_a_b_a": _isolation(mid),
        "mid_video_twice": _twice(dataclasses.replace(mid, start="video")),
    }


class Same:
    """Runs that must agree to the bit, or must not. First chunks are judged by numbers too."""

    name = "same"

    def cases(self, precision: str) -> Iterator[Case]:
        for key in scenarios():
            suite: Suite = "full" if key.startswith(("distilled", "mid")) else "quick"
            params = {"scene": key}
            yield Case(f"same[{precision},{key}]", "pipeline", self.name, precision, params, suite, timeout=600.0)

    def observe(self, case: Case, session: Session) -> Observation:
        scenario, root = scenarios()[case.params["scene"]], session.root

        def fresh() -> Pipeline:
            variant = scenario.runs[0].video.variant
            return pipeline_of(variant, root, case.precision, session.backend, session.fallback)

        pipeline = fresh()
        made: dict[str, list[Chunk]] = {}
        for run in scenario.runs:
            made[run.name] = _make(fresh() if run.fresh else pipeline, run, made, root)
        facts = {name: {str(c.index): [digest(c.latents), digest(c.frames)] for c in run} for name, run in made.items()}
        begun = _begun(scenario)
        kept = {run.name: keep(root, case, run.name, made[run.name][0].latents, len(begun)) for run in begun}
        return Observation(kept, {"digests": facts}, coverage_of(pipeline))

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        scenario = scenarios()[case.params["scene"]]
        oracle, wanted = {}, {}
        for run in _begun(scenario):
            first = dataclasses.replace(run.video, chunks=1)
            oracle[run.name] = golden_video(first, root, case.precision)[0].latents
            wanted[run.name] = Wanted(TensorType(first.latents, torch.float32), 64, chain=True)
        judged, reasons = judge_kept(case, observation, root, references, oracle, wanted)
        reasons += _broken(scenario, observation.facts.get("digests"))
        reasons += _loose(observation)
        return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        scenario = scenarios()[case.params["scene"]]
        draws = 8 if case.suite == "quick" else 3
        made: dict[Video, Errors] = {}
        for run in _begun(scenario):
            if run.video not in made:
                made[run.video] = first_chunk_errors(run.video, root, case.precision, draws)
        return {run.name: made[run.video] for run in _begun(scenario)}


def _begun(scenario: Scenario) -> list[Run]:
    """Runs that start at the beginning: their first chunk depends on nothing that went before."""
    return [run for run in scenario.runs if run.after is None]


def _make(pipeline: Pipeline, run: Run, made: Mapping[str, list[Chunk]], root: Root) -> list[Chunk]:
    state = None if run.after is None else made[run.after[0]][run.after[1]].state
    if state is not None and run.fresh:
        state = state_through_bytes(state)
    settings: dict[str, Any] = run.video.settings(root)
    if not run.video.schedule:
        settings["chunks"] = run.video.chunks
    return list(pipeline.stream(run.video.prompt, state=state, **settings))


def _broken(scenario: Scenario, told: Any) -> list[str]:
    """Rules that the digests break."""
    lines = []
    for rule in scenario.rules:
        try:
            one, other = told[rule.one][str(rule.chunk)], told[rule.other][str(rule.chunk)]
        except (KeyError, TypeError):
            lines.append(f"no digests of chunk {rule.chunk} of {rule.one} and {rule.other}")
            continue
        if rule.equal and one != other:
            lines.append(f"chunk {rule.chunk} of {rule.one} and {rule.other} differ, wanted the same bits")
        elif not rule.equal and (one[0] == other[0] or one[1] == other[1]):
            lines.append(
                f"chunk {rule.chunk} of {rule.one} and {rule.other} is the same: what should change it did not"
            )
    return lines


def _loose(observation: Observation) -> list[str]:
    """Kept latents whose digest is not the one that the runs are compared by."""
    told = observation.facts.get("digests")
    lines = []
    for name, kept in observation.outputs.items():
        try:
            tied = told[name]["0"][0] == kept.digest  # type: ignore[index]
        except (KeyError, TypeError):
            tied = False
        if not tied:
            lines.append(f"{name}: the kept latents are not those that were compared")
    return lines
