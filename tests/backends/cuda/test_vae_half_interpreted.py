"""Frames decoded in bfloat16 by the kernels of this backend, in Triton's interpreter: wrong by what rounding is, and no
more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import helios
from helios.backend import select
from helios.media import to_frames
from helios.model.vae_split import Split
from helios.pipeline.codec import Codec
from helios_conformance import budget, frames, suite
from helios_conformance.draws import Root, normal
from helios_conformance.execute import judge, observe
from helios_conformance.references import committed
from helios_conformance.scenes.vae import VAE
from helios_conformance.session import Session
from helios_conformance.videos import vae_weights

ROOT = Root(83)


@pytest.mark.parametrize(("precision", "vae"), [("bf16", "bf16"), ("fp32", "fp32")])
def test_what_a_pipeline_decodes_in_by_itself(precision: str, vae: str) -> None:
    made = helios.load(size="tiny", backend="cuda:interpret", precision=precision)
    assert made.vae_precision == vae
    assert helios.load(size="tiny", backend=made.backend, precision=precision, vae_precision="fp32").codec.dtype == (
        torch.float32
    )


def test_frames_err_as_rounding_does() -> None:
    latents = normal(ROOT.key("latents"), (1, VAE.z_dim, 2, 1, 2))
    codec = Codec(VAE, vae_weights(), select("cuda:interpret"), torch.bfloat16)
    video = codec.decode(latents, Split(2))
    assert video.dtype == torch.bfloat16
    right = frames.right_frames(VAE, vae_weights(), latents, Split(2), "bf16")
    judged = frames.judge(to_frames(video).reshape(-1), right.map(lambda x: x.reshape(-1)), right, "bf16")
    assert budget.exceeded(judged.errors, judged.bounds) == []
    assert judged.errors.norm > 0.8 * judged.reference.norm  # type: ignore[union-attr]
    assert judged.errors.misrounded > 100 * frames.FLIPS  # of float32 far less


@pytest.mark.slow
@pytest.mark.parametrize("case", ["vae_half[bf16,decode_blocks]", "vae_half[bf16,decode_groups]"])
def test_the_suite_passes_it(case: str) -> None:
    found: Any = suite.find(case)
    seen = observe(found, Session(select("cuda:interpret"), ROOT))
    verdict = judge(found, seen, ROOT, committed())
    assert verdict.state == "pass", verdict.reason
    assert {kept.dtype for kept in seen.outputs.values()} == {"bfloat16"}
