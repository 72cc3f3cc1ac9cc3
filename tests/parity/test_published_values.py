"""Numbers that others published, or that diffusers gave where nothing else was around: no oracle runs beside ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import helios
from helios.model.config import PipelineConfig, SchedulerConfig
from helios.model.presets import SIZES, VARIANTS

# diffusers hands torch tensors to np.linspace, which numpy has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")


def write_folder(out: Path, pipeline: PipelineConfig, scheduler: SchedulerConfig) -> Path:
    """A folder with diffusers' own initial weights of seed 0, without text encoder."""
    for cls, name, config in (
        (diffusers.AutoencoderKLWan, "vae", SIZES["tiny"].vae),
        (diffusers.HeliosTransformer3DModel, "transformer", SIZES["tiny"].transformer),
    ):
        torch.manual_seed(0)
        cls(**{k: v for k, v in config.to_dict().items() if not k.startswith("_")}).save_pretrained(out / name)
    (out / "scheduler").mkdir()
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler.to_dict()))
    components = {
        "transformer": ["diffusers", "HeliosTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "scheduler": ["diffusers", scheduler.class_name],
    }
    (out / "model_index.json").write_text(json.dumps(pipeline.to_dict() | components))
    return out


def edges(video: Tensor) -> Tensor:
    """First and last eight values of frames in 0 … 1, in the order frame, channel, row, column."""
    flat = video.permute(0, 3, 1, 2).flatten()
    return torch.cat([flat[:8], flat[-8:]])


def assert_near(values: Tensor, expected: list[float], bound: float) -> None:
    """Raise unless each value is within the bound."""
    worst = float((values - torch.tensor(expected)).abs().max())
    assert worst <= bound, f"off by {worst:.2e}"


BASE = [0.4529, 0.4527, 0.4499, 0.4542, 0.4528, 0.4524, 0.4531, 0.4534,
        0.5328, 0.5340, 0.5012, 0.5135, 0.5322, 0.5203, 0.5144, 0.5101]  # fmt: skip
DISTILLED = [0.4527, 0.4521, 0.4485, 0.4534, 0.4521, 0.4522, 0.4534, 0.4531,
             0.5008, 0.5426, 0.5141, 0.4878, 0.5166, 0.5426, 0.4959, 0.5165]  # fmt: skip
DISTILLED_LATENTS = [-0.07689, -1.03694, -0.03231, 1.28053, 0.25254, 1.03971, -1.01502, 0.78210,
                     -1.05415, -1.45027, -0.98168, -1.00753, 0.75948, -0.68502, -0.55409, -0.64471]  # fmt: skip


HALF_A_LEVEL = 0.5 / 255


def base_frames(pipeline: helios.Pipeline, embeds: Tensor) -> Tensor:
    """One chunk ``[33, 16, 16, 3]`` in 0 … 1 as diffusers' test makes it."""
    size: Any = {"height": 16, "width": 16, "chunks": 1}
    result = pipeline.generate(prompt_embeds=embeds, guidance=1.0, steps=2, seed=0, rng="diffusers", **size)
    assert result.frames.shape == (1, 33, 16, 16, 3)
    split = pipeline.codec.choose(1, 9, 16, 16)
    exact = pipeline.codec.decode(result.latents, split)[0].permute(1, 2, 3, 0) / 2 + 0.5
    assert (exact - result.frames[0].float() / 255).abs().max() <= HALF_A_LEVEL + 1e-6
    return exact  # a byte alone is off by up to half a level, more than the bound


def test_the_slice_of_diffusers_own_base_test(tmp_path: Path) -> None:
    """tests/pipelines/helios/test_helios.py of diffusers, tolerance 1e-3. The embeddings of its text encoder are nearly
    zero, and with zeros the result has the same four digits."""
    folder = write_folder(tmp_path, VARIANTS["base"].pipeline, VARIANTS["base"].scheduler)
    pipeline = helios.load(folder, backend="reference")
    zeros = torch.zeros(1, 16, 32)
    assert_near(edges(base_frames(pipeline, zeros)), BASE, 1e-3)
    with pytest.raises(AssertionError, match="off by"):
        assert_near(edges(base_frames(pipeline, zeros + 1)), BASE, 1e-3)


def test_two_distilled_chunks(tmp_path: Path) -> None:
    """Values of diffusers 0.42 with its singular factorisation done in float64."""
    folder = write_folder(tmp_path, VARIANTS["distilled"].pipeline, VARIANTS["distilled"].scheduler)
    embeds = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(1))
    pipeline = helios.load(folder, backend="reference")
    size: Any = {"height": 128, "width": 128, "frames": 66}
    result = pipeline.generate(prompt_embeds=embeds, steps=2, seed=0, rng="diffusers", **size)
    assert result.frames.shape == (1, 65, 128, 128, 3)
    flat = result.latents.flatten()
    # the last entry of their factor is 2e-4 where the exact one is 0
    assert_near(torch.cat([flat[:8], flat[-8:]]), DISTILLED_LATENTS, 2e-4)
    assert float(result.latents.abs().mean()) == pytest.approx(0.961053, abs=1e-5)
    assert_near(edges(result.frames[0].float() / 255), DISTILLED, 1e-4 + HALF_A_LEVEL)
