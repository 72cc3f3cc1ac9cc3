"""The level pipeline: chunks from the oracle's states, what must be the same to the bit, and the long free run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from helios import op
from helios.backend import ReferenceBackend, select
from helios.program import EMPTY, Context, Program
from helios_conformance import divergence, execute, record, selection, suite
from helios_conformance.case import Observation
from helios_conformance.divergence import FreeRun
from helios_conformance.draws import Root
from helios_conformance.mutants.mutant import program_with
from helios_conformance.references import committed
from helios_conformance.session import Session

ROOT = Root(73)


FEW = ("video[{},text,base]", "video[{},interactive,base]", "same[{},prompts_a_b_a]", "same[{},resume]")
QUICK = [case.id for p in ("bf16", "fp32") for case in suite.choose(p, "quick", ("pipeline",))]


@pytest.mark.parametrize("case", [case.format(p) for case in FEW for p in ("bf16", "fp32")])
def test_the_cpu_backend_passes(bench: Any, case: str) -> None:
    seen, verdict = bench.run(case, select("cpu"))
    assert verdict.state == "pass", verdict.reason
    assert verdict.judged
    assert sum(kept.values.nbytes for kept in seen.outputs.values()) <= selection.BUDGET_BYTES


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in QUICK if case not in {f.format(p) for f in FEW for p in ("bf16", "fp32")}]
)
def test_the_cpu_backend_passes_every_quick_case(bench: Any, case: str) -> None:
    seen, verdict = bench.run(case, select("cpu"))
    assert verdict.state == "pass", verdict.reason
    assert sum(kept.values.nbytes for kept in seen.outputs.values()) <= selection.BUDGET_BYTES


class ReplayedVideo(Program):
    """The decoder gives the frames of its first call again."""

    _held: dict[str, Tensor] | None = None

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        if "decode" not in entry:
            return super().run(entry, inputs, context)
        self._held = self._held or super().run(entry, inputs, context)
        return dict(self._held)


class FrozenFrame(Program):
    """The last frame of a chunk is the one before, once more."""

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        out = super().run(entry, inputs, context)
        if "video" in out:
            video = out["video"]
            out["video"] = torch.cat([video[:, :, :-1], video[:, :, -2:-1]], 2)
        return out


class ShortVideo(Program):
    """The last frame of a group is not given at all."""

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        out = super().run(entry, inputs, context)
        return {name: x[:, :, :-1] if name == "video" else x for name, x in out.items()}


@pytest.mark.parametrize(
    ("mixin", "words"),
    [(ReplayedVideo, "repeat others"), (FrozenFrame, "repeat others"), (ShortVideo, "frames in all, wanted 33")],
)
def test_frames_that_are_not_made_fail(bench: Any, mixin: type[Program], words: str) -> None:
    _, verdict = bench.run("video[fp32,text,base]", program_with(mixin)(ReferenceBackend()))
    assert verdict.state == "fail"
    assert words in verdict.reason


def test_frames_are_judged_whatever_the_latents_are(bench: Any) -> None:
    """A decoder in TF32's precision changes too many levels, though each by one at most."""

    def short(x: Tensor, weight: Tensor, bias: Tensor | None = None, **attrs: Any) -> Tensor:
        cut = ((t.float().view(torch.int32) & -0x2000).view(torch.float32) for t in (x, weight))
        return op.get("conv3d").fn(*cut, bias, **attrs)  # type: ignore[no-any-return]

    _, verdict = bench.run("video[fp32,text,base]", bench.wrong("conv3d", short))
    assert verdict.state == "fail"
    assert "frames: part of the elements" in verdict.reason
    assert "latents" not in verdict.reason


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_stale_text_fails(bench: Any, precision: str) -> None:
    _, verdict = bench.run(f"same[{precision},prompts_a_b_a]", bench.mutant("text_stale"))
    assert verdict.state == "fail"
    assert "what should change it did not" in verdict.reason
    assert "b: norm" in verdict.reason  # and by numbers: the second prompt's video is the first one's


def test_a_batch_whose_videos_are_mixed_up_fails(bench: Any) -> None:
    def swapped(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        return op.get("attention").fn(q, k.roll(1, 0), v.roll(1, 0), **rest)  # type: ignore[no-any-return]

    assert bench.run("video[bf16,batch2,base]", bench.wrong("attention", swapped))[1].state == "fail"


def test_a_run_that_is_not_the_same_twice_fails(bench: Any) -> None:
    calls = []

    def drifts(x: Tensor, y: Tensor, *rest: Any, **attrs: Any) -> Tensor:
        calls.append(1)
        made: Tensor = op.get("gated_add").fn(x, y, *rest, **attrs)
        return made * (1 + 2.0**-22 * (len(calls) % 7 == 0))

    _, verdict = bench.run("same[fp32,seed_twice]", bench.wrong("gated_add", drifts))
    assert verdict.state == "fail"
    assert "differ, wanted the same bits" in verdict.reason


def test_digests_that_do_not_belong_to_the_kept_latents_fail(bench: Any) -> None:
    case = suite.find("same[fp32,prompts_a_b_a]")
    seen, verdict = bench.run(case, ReferenceBackend())
    assert verdict.state == "pass", verdict.reason
    facts = copy.deepcopy(dict(seen.facts))
    facts["digests"]["a"]["0"] = facts["digests"]["again"]["0"] = ["0" * 64, "1" * 64]
    worse = execute.judge(case, dataclasses.replace(seen, facts=facts), ROOT, committed())
    assert "not those that were compared" in worse.reason
    del facts["digests"]["b"]
    worse = execute.judge(case, dataclasses.replace(seen, facts=facts), ROOT, committed())
    assert "no digests of chunk 0" in worse.reason


SHORT = dataclasses.replace(suite.find("free_run[fp32,44]"), params={"chunks": 3})


@pytest.fixture(scope="module")
def free_run() -> Observation:
    return FreeRun().observe(SHORT, Session(select("cpu"), ROOT))


def test_a_free_run_is_drawn_and_not_judged(free_run: Observation) -> None:
    verdict = FreeRun().judge(SHORT, free_run, ROOT, committed())
    assert verdict.state == "pass", verdict.reason
    told = record.record(SHORT, free_run, verdict, 1.0)
    drawn = divergence.section([told])
    assert drawn is not None
    assert drawn["chunks"] == [0, 1, 2]
    assert 0 < drawn["relative"][0] < drawn["relative"][2] < 1e-3
    assert all(60 < x < 99 for x in drawn["psnr"])
    assert told["outputs"]["c00"]["bounds"]["norm"] == "inf"
    assert divergence.section([{**told, "state": "fail"}]) is None


def worse(seen: Observation, name: str, **change: Any) -> Observation:
    kept = dataclasses.replace(seen.outputs[name], **change)
    return dataclasses.replace(seen, outputs={**seen.outputs, name: kept})


def test_a_free_run_that_came_off_fails(free_run: Observation) -> None:
    first = free_run.outputs["c00"]

    def reason(seen: Observation) -> str:
        verdict = FreeRun().judge(SHORT, seen, ROOT, committed())
        assert verdict.state == "fail"
        return verdict.reason

    assert "NaN" in reason(worse(free_run, "c01", finite=False))
    assert "of the oracle's" in reason(worse(free_run, "c01", values=free_run.outputs["c01"].values * 100))
    assert "repeat" in reason(worse(free_run, "c01", digest=first.digest))
    assert "wanted 3" in reason(dataclasses.replace(free_run, outputs={"c00": first}))
    facts = {**free_run.facts, "relative": [x / 10 for x in free_run.facts["relative"]]}
    assert "is not that of its kept latents" in reason(dataclasses.replace(free_run, facts=facts))
    assert "missing" in reason(dataclasses.replace(free_run, facts={}))


class SecondWrong(Program):
    """Right, but for the second video of a batch."""

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        out = super().run(entry, inputs, context)
        return {name: self._turned(x) for name, x in out.items()}

    @staticmethod
    def _turned(x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[0] != 2:
            return x
        return torch.cat([x[:1], x[1:] * 1.25])


class SecondHeard(Program):
    """The second video of a batch is led by the first one's text."""

    def bind(self, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> Context:
        return super().bind({n: x[:1].expand_as(x) if n == "text" else x for n, x in inputs.items()}, context)


BESIDE = [f"beside[{precision},batch2,base]" for precision in ("bf16", "fp32")]


@pytest.mark.parametrize("case", BESIDE)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_video_beside_another_is_the_video_alone(bench: Any, case: str, backend: str) -> None:
    seen, verdict = bench.run(case, select(backend))
    assert verdict.state == "pass", verdict.reason
    assert set(verdict.judged) == {"batch.0", "batch.1", "alone.0", "alone.1"}
    assert seen.outputs["alone.0"].digest != seen.outputs["alone.1"].digest


@pytest.mark.parametrize("case", BESIDE)
@pytest.mark.parametrize("mixin", [SecondWrong, SecondHeard])
def test_a_backend_that_is_wrong_only_in_the_second_video_fails(bench: Any, case: str, mixin: type[Program]) -> None:
    _, verdict = bench.run(case, program_with(mixin)(ReferenceBackend()))
    assert verdict.state == "fail"
    wrong = {name for name in ("batch.0", "batch.1", "alone.0", "alone.1") if f"{name}: " in verdict.reason}
    assert wrong == {"batch.1"}, verdict.reason


def test_the_second_video_of_another_oracle_fails(bench: Any) -> None:
    """It is held to the video alone: one that takes both videos' noise from the first has an oracle of its own."""
    case = suite.find(BESIDE[1])
    seen, _ = bench.run(case, ReferenceBackend())
    swapped = {**seen.outputs, "batch.1": seen.outputs["batch.0"]}
    verdict = execute.judge(case, dataclasses.replace(seen, outputs=swapped), ROOT, committed())
    assert "batch.1: norm" in verdict.reason
