"""A video of a batch against the same video alone: what stands beside it must not change it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from helios.backend import ReferenceBackend
from helios.graph import TensorType
from helios.pipeline import Pipeline
from helios.sampler import CounterNoise
from helios_conformance import budget
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.graph_runs import Wanted, judge_kept, keep, largest
from helios_conformance.videos import Video, coverage_of, latents_only, pipeline_of

if TYPE_CHECKING:
    from helios_conformance.references import References
    from helios_conformance.session import Session

__all__ = ["Beside"]

_PROMPTS = ("a", "b")
_STEPS = (2,)
_SIDE = 32
_DRAWS = 8
"""Of the reference."""

_BATCH = Video("base", prompts=_PROMPTS, side=_SIDE, steps=_STEPS)
_ALONE = tuple(Video("base", prompts=(prompt,), side=_SIDE, steps=_STEPS) for prompt in _PROMPTS)


class Beside:
    """Two videos in one batch, and each by itself from the same noise.

    ``batch.j`` and ``alone.j`` are held to one oracle, the video j alone in float64: each within its budget of it, so
    within the sum of both of each other.
    """

    name = "beside"

    def cases(self, precision: str) -> Iterator[Case]:
        yield Case(f"beside[{precision},batch2,base]", "pipeline", self.name, precision, timeout=600.0)

    def observe(self, case: Case, session: Session) -> Observation:
        root = session.root
        pipeline = latents_only(pipeline_of("base", root, case.precision, session.backend, session.fallback))
        outputs = {**_batch(pipeline, root), **{f"alone.{j}": x for j, x in enumerate(_alone(pipeline, root))}}
        kept = {name: keep(root, case, name, x, len(outputs)) for name, x in outputs.items()}
        return Observation(kept, {}, coverage_of(pipeline))

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        right = _oracle(root, case.precision)
        oracle = {f"{how}.{j}": x for how in ("batch", "alone") for j, x in enumerate(right)}
        wanted = {name: Wanted(TensorType(_ALONE[0].latents, torch.float32), 64, chain=True) for name in oracle}
        judged, reasons = judge_kept(case, observation, root, references, oracle, wanted)
        return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        rows: dict[str, list[Errors]] = {}
        for draw in range(_DRAWS):
            one = Root(64 * root.seed + draw, root.nonce)
            right = _oracle(one, case.precision)
            pipeline = latents_only(pipeline_of("base", one, case.precision, ReferenceBackend()))
            came = {**_batch(pipeline, one), **{f"alone.{j}": x for j, x in enumerate(_alone(pipeline, one))}}
            for name, tensor in came.items():
                errors = budget.measure(tensor, right[int(name.rpartition(".")[2])])
                rows.setdefault(name, []).append(errors)
        return {name: largest(errors) for name, errors in rows.items()}


@functools.lru_cache(maxsize=8)
def _oracle(root: Root, precision: str) -> list[Tensor]:
    """Each video alone, in float64."""
    return _alone(latents_only(pipeline_of("base", root, precision)), root)


def _batch(pipeline: Pipeline, root: Root) -> dict[str, Tensor]:
    """The latents of each video of a batch, which draws its own noise."""
    latents = next(iter(pipeline.stream(_BATCH.prompt, chunks=1, **_BATCH.settings(root)))).latents
    return {f"batch.{j}": latents[j : j + 1] for j in range(len(_PROMPTS))}


def _alone(pipeline: Pipeline, root: Root) -> list[Tensor]:
    """The latents of each video made by itself, from the noise that it has in a batch: its number is part of a key."""
    made = []
    for j, video in enumerate(_ALONE):
        settings = video.settings(root)
        noise = CounterNoise(settings["seed"], first_video=j).latents(0, video.latents)
        made.append(next(iter(pipeline.stream(video.prompt, chunks=1, latents=noise, **settings))).latents)
    return made
