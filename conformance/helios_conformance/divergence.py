"""How far a long video drifts from the oracle's when nothing holds it to it: drawn in the report, not judged.

Small differences grow from chunk to chunk through the history, on right devices too. What is required is that the run
ends, that its numbers stay finite and of the oracle's size, and that no chunk repeats another.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from helios.pipeline import Pipeline
from helios_conformance import budget
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Judged, Kept, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.graph_runs import chosen_of, keep
from helios_conformance.videos import Video, coverage_of, pipeline_of

if TYPE_CHECKING:
    from helios_conformance.references import References
    from helios_conformance.session import Session

__all__ = ["CHUNKS", "FreeRun", "section"]

CHUNKS = 44
"""A minute of video."""

_VIDEO = Video("distilled", chunks=CHUNKS)
_SIZE = 4.0
"""Factor by which a chunk's size may differ from the oracle's."""


class FreeRun:
    """44 chunks, each from the device's own history."""

    name = "free_run"

    def cases(self, precision: str) -> Iterator[Case]:
        params = {"chunks": CHUNKS}
        yield Case(f"free_run[{precision},{CHUNKS}]", "pipeline", self.name, precision, params, "full", timeout=1800.0)

    def observe(self, case: Case, session: Session) -> Observation:
        chunks, root = int(case.params["chunks"]), session.root
        pipeline = pipeline_of(_VIDEO.variant, root, case.precision, session.backend, session.fallback)
        kept, relative, psnr, digests = {}, [], [], []
        oracle = iter(_oracle(root, case.precision, chunks))
        for i, (latents, frames) in enumerate(_chunks(pipeline, root, chunks)):
            right, shown = next(oracle)
            name = f"c{i:02}"
            kept[name] = keep(root, case, name, latents, chunks)
            digests.append(kept[name].digest)
            relative.append(float((latents.double() - right).norm() / right.norm()))
            psnr.append(_psnr(frames, shown))
        facts = {"relative": relative, "psnr": psnr, "digests": digests}
        return Observation(kept, facts, coverage_of(pipeline))

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        chunks = int(case.params["chunks"])
        names = [f"c{i:02}" for i in range(chunks)]
        if sorted(observation.outputs) != names:
            return Verdict("fail", f"{len(observation.outputs)} chunks came, wanted {chunks}")
        judged: dict[str, Judged] = {}
        reasons = []
        for name, (right, _) in zip(names, _oracle(root, case.precision, chunks), strict=True):
            kept = observation.outputs[name]
            wrong, numbers = _one(root, case, name, kept, right, chunks)
            reasons += [f"{name}: {wrong}"] if wrong else []
            if numbers is not None:
                judged[name] = numbers
        if len({kept.digest for kept in observation.outputs.values()}) < chunks:
            reasons.append("chunks repeat others to the bit")
        reasons += _contradicted(observation.facts, [judged[name].errors for name in names if name in judged], chunks)
        return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        return {}


def _one(root: Root, case: Case, name: str, kept: Kept, right: Tensor, share: int) -> tuple[str, Judged | None]:
    """What is wrong with a chunk, and its numbers, which nothing bounds."""
    if misfit := kept.misfit(right.shape, torch.float32):
        return f"came as {misfit}", None
    chosen = chosen_of(root, case, name, kept, right, share)
    if chosen.shape != kept.values.shape:
        return f"{kept.values.numel()} elements are kept, its digest chooses {chosen.numel()}", None
    if not kept.finite or not bool(kept.values.isfinite().all()):
        return "holds NaN or infinity", None
    ratio = float(kept.values.double().norm() / chosen.norm())
    free = Errors(math.inf, math.inf, math.inf, 1.0, chosen.numel())
    wrong = "" if 1 / _SIZE <= ratio <= _SIZE else f"its size is {ratio:.3g} of the oracle's"
    return wrong, Judged(budget.measure(kept.values, chosen), free, None)


def _contradicted(facts: Mapping[str, Any], errors: Sequence[Errors], chunks: int) -> list[str]:
    """Curves that are not there, or not those of the kept latents, a sample: a factor of two is allowed."""
    relative, psnr = facts.get("relative"), facts.get("psnr")
    if not (_numbers(relative, chunks) and _numbers(psnr, chunks)):
        return [f"the curves of {chunks} chunks are missing"]
    assert isinstance(relative, list)
    far = [i for i, (r, e) in enumerate(zip(relative, errors, strict=False)) if not r / 2 <= e.norm <= 2 * r + 1e-9]
    return [f"the relative error of chunk {far[0]} is not that of its kept latents"] if far else []


def _numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(isinstance(x, int | float) for x in values)


def _chunks(pipeline: Pipeline, root: Root, chunks: int) -> Iterator[tuple[Tensor, Tensor]]:
    for chunk in pipeline.stream(_VIDEO.prompt, chunks=chunks, **_VIDEO.settings(root)):
        yield chunk.latents, chunk.frames


@functools.lru_cache(maxsize=1)
def _oracle(root: Root, precision: str, chunks: int) -> list[tuple[Tensor, Tensor]]:
    return list(_chunks(pipeline_of(_VIDEO.variant, root, precision), root, chunks))


def _psnr(frames: Tensor, right: Tensor) -> float:
    """In dB; 99 where they are equal."""
    error = float((frames.double() - right.double()).square().mean())
    return 99.0 if error == 0.0 else min(99.0, 10 * math.log10(255.0**2 / error))


def section(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float]] | None:
    """What the report draws: ``chunks``, and for each ``relative`` (of the latents) and ``psnr`` (of the frames, dB).

    Args:
        records: of a run, as ``record.record`` makes them.

    Returns:
        None where no free run came to its end.
    """
    for told in records:
        facts = told["facts"]
        if told["check"] == FreeRun.name and told["state"] == "pass":
            chunks = list(range(len(facts["relative"])))
            return {"chunks": chunks, "relative": facts["relative"], "psnr": facts["psnr"]}
    return None
