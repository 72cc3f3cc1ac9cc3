"""A VAE that decodes in 16 bits: judged in what it computes in, and told from a wrong one."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helios import op
from helios.backend import Backend, ReferenceBackend, select
from helios.media import to_frames
from helios.model.vae_split import Split
from helios.pipeline.codec import Codec, plan_of
from helios_conformance import execute, frames, suite
from helios_conformance.case import Observation, Verdict
from helios_conformance.draws import Root, normal
from helios_conformance.mutants.mutant import backend_with
from helios_conformance.realtime import shown
from helios_conformance.realtime.options import Options
from helios_conformance.realtime.scene import drawn_model
from helios_conformance.references import committed
from helios_conformance.scenes.vae import VAE
from helios_conformance.session import Session
from helios_conformance.videos import vae_weights

ROOT = Root(79)

HALF = [c for p in ("bf16", "fp32") for c in suite.all_cases(p) if c.check == "vae_half" or c.id == "codec[bf16,half]"]


def halved(backend: Backend) -> Backend:
    """The backend, which now decodes in bfloat16 where the run is in bfloat16."""
    return backend_with(backend, vae_precisions={"bf16": "bf16"})


def narrow_sums(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: Any = (1, 1, 1), padding: Any = (0, 0, 0)
) -> Tensor:
    """Each tap of the convolution is added to a sum in bfloat16."""
    right = op.get("conv3d").fn(x, weight, bias, stride=stride, padding=padding)
    if x.dtype != torch.bfloat16:
        return right  # type: ignore[no-any-return]
    t, h, w = padding
    padded, total = F.pad(x.float(), (w, w, h, h, t, t)), torch.zeros_like(right)
    for tap in itertools.product(*map(range, weight.shape[2:])):
        at = (slice(i, i + (n - 1) * s + 1, s) for i, n, s in zip(tap, right.shape[2:], stride, strict=True))
        matrix = weight[(..., *tap)].float()
        part = torch.einsum("oc,bcthw->bothw", matrix, padded[(slice(None), slice(None), *at)])
        total = (total.float() + part).bfloat16()
    return total if bias is None else total + bias.view(-1, 1, 1, 1)


def truncated(x: Tensor, weight: Tensor, bias: Tensor | None = None, **attrs: Any) -> Tensor:
    """The right sum, cut to bfloat16 and not rounded."""
    if x.dtype != torch.bfloat16:
        return op.get("conv3d").fn(x, weight, bias, **attrs)  # type: ignore[no-any-return]
    out = F.conv3d(x.float(), weight.float(), None if bias is None else bias.float(), **attrs)
    return (out.contiguous().view(torch.int32) & -0x10000).view(torch.float32).bfloat16()


WRONG: dict[str, Callable[..., Any]] = {"narrow_sums": narrow_sums, "truncated": truncated}


def test_which_cases_there_are() -> None:
    """Required of every backend in bfloat16; in float32 there is nothing that is narrower."""
    assert {c.precision for c in HALF} == {"bf16"}
    assert all(c.required for c in HALF)
    levels = {c.id: c.level for c in HALF if c.suite == "quick"}
    assert levels == {
        "vae_half[bf16,decode_blocks]": "blocks",
        "vae_half[bf16,decode_blocks_next]": "blocks",
        "vae_half[bf16,decode]": "model",
        "vae_half[bf16,decode_groups]": "model",
        "vae_half[bf16,decode_batch2]": "model",
        "codec[bf16,half]": "pipeline",
    }


@pytest.mark.parametrize("case", [c.id for c in HALF if c.suite == "quick"])
def test_the_cpu_backend_passes(bench: Any, case: str) -> None:
    seen, verdict = bench.run(case, select("cpu"))
    assert verdict.state == "pass", verdict.reason
    assert {kept.dtype for name, kept in seen.outputs.items()} == {"bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize("case", [c.id for c in HALF if c.suite == "full"])
def test_the_cpu_backend_passes_wide(bench: Any, case: str) -> None:
    _, verdict = bench.run(case, select("cpu"))
    assert verdict.state == "pass", verdict.reason


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("case", ["vae_half[bf16,decode_blocks]", "codec[bf16,half]", "video[bf16,text,base]"])
def test_a_wrong_convolution_in_bfloat16_fails(bench: Any, case: str, name: str) -> None:
    _, verdict = bench.run(case, halved(bench.wrong("conv3d", WRONG[name])))
    assert verdict.state == "fail"
    assert "beyond" in verdict.reason
    assert "latents" not in verdict.reason


def test_what_is_wrong_in_bfloat16_alone_does_not_show_in_float32(bench: Any) -> None:
    """Without cases in the working dtype such a backend would be certified."""
    for case in ("vae[bf16,decode]", "vae[bf16,decode_blocks]", "codec[bf16,groups]"):
        assert bench.run(case, bench.wrong("conv3d", narrow_sums))[1].state == "pass"


@pytest.fixture(scope="module")
def film() -> tuple[Observation, Verdict]:
    """A video whose pipeline decodes in bfloat16."""
    case = suite.find("video[bf16,text,base]")
    seen = execute.observe(case, Session(halved(ReferenceBackend()), ROOT))
    return seen, execute.judge(case, seen, ROOT, committed())


def test_a_right_video_in_bfloat16_passes(film: tuple[Observation, Verdict]) -> None:
    seen, verdict = film
    assert verdict.state == "pass", verdict.reason
    assert seen.facts["vae"] == "bf16"
    judged = verdict.judged["frames"]
    assert 0.9 < judged.errors.norm / judged.reference.norm < 1.1  # type: ignore[union-attr]
    assert judged.errors.misrounded > 100 * frames.FLIPS  # what float32 is held to would refuse it


@pytest.mark.parametrize(
    ("said", "words"), [("fp32", "frames: worst element"), ("fp16", "decoded in fp16"), (None, "decoded in None")]
)
def test_frames_are_judged_in_what_they_were_decoded_in(
    film: tuple[Observation, Verdict], said: str | None, words: str
) -> None:
    seen = copy.copy(film[0])
    told = dataclasses.replace(seen, facts={**seen.facts, "vae": said})
    verdict = execute.judge(suite.find("video[bf16,text,base]"), told, ROOT, committed())
    assert verdict.state == "fail"
    assert words in verdict.reason


def test_a_run_in_float32_decodes_in_float32(bench: Any) -> None:
    backend = backend_with(ReferenceBackend(), vae_precisions={"fp32": "bf16"})
    _, verdict = bench.run("video[fp32,text,base]", backend)
    assert verdict.state == "fail"
    assert "decoded in bf16, wanted fp32" in verdict.reason


def test_the_bounds_follow_the_latents() -> None:
    """Louder latents, larger errors: of the rounded operations as of the device."""
    seen = []
    for scale in (0.1, 1.0):
        latents = scale * normal(ROOT.key("frames"), (1, VAE.z_dim, 3, 4, 4))
        right = frames.right_frames(VAE, vae_weights(), latents, Split(3), "bf16")
        assert right.rounded is not None
        flat = right.map(lambda x: x.reshape(-1))
        seen.append(frames.judge(right.rounded.reshape(-1), flat, right, "bf16"))
    for judged in seen:
        assert judged.errors == judged.reference
        assert judged.bounds.norm == pytest.approx(frames.GROWN * judged.errors.norm)
    assert seen[0].errors.norm != seen[1].errors.norm


def test_frames_under_the_clock_are_judged_alike() -> None:
    """Of level realtime the part that looks at frames: decoded in bfloat16, told as such, or told as float32."""
    options = Options.of({"size": "mini", "height": 32, "width": 32, "tokens": 16})
    case = next(c for c in suite.all_cases("bf16") if c.check == "realtime_timed")
    model = drawn_model("mini", "distilled", ROOT)
    codec = Codec(model.vae, model.vae_weights, ReferenceBackend(), torch.bfloat16)
    latents = normal(ROOT.key("shown"), (1, model.vae.z_dim, 9, 4, 4))
    plan = plan_of(Split(9), torch.bfloat16)
    seen: Any = types.SimpleNamespace(index=0, latents=latents, frames=to_frames(codec.decode(latents, Split(9))))
    outputs, fact = shown.keep(ROOT, case, options, seen, plan)
    shots = [{"latents": outputs["shown.latents"].digest}]
    facts = {"chunks": shots, "checked": [[0]], "shown": fact}
    setting = {"size": "mini", "height": 32, "width": 32, "tokens": 16, "weights": "random", "variant": "distilled"}
    for vae, words in (
        (plan, []),
        ({"group": 9}, ["worst element", "part of"]),
        ({**plan, "precision": "fp8"}, ["fp8"]),
    ):
        judged, wrong = shown.judge(case, Observation(outputs, {**facts, "vae": vae}), setting, ROOT, 1)
        assert len(wrong) == len(words), wrong
        assert all(word in line for word, line in zip(words, wrong, strict=True))
        assert bool(judged) == ("fp8" not in words)
