"""Whole pipelines against diffusers', both loading the same folder and drawing the same random numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import helios
from helios.pipeline import Result

# diffusers hands torch tensors to np.linspace, which numpy has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

STEPS = {"base": (3,), "mid": (2, 3, 2), "distilled": (2, 1, 2)}
SIZE = {"height": 64, "width": 128}
PROMPT, NEGATIVE = "a cat walks through wet grass at night", "blurry &amp; grey"
LATENTS, FRAMES = 1e-4, 50.0  # relative error of latents; PSNR of frames in dB


@dataclasses.dataclass(frozen=True)
class Published:
    """What diffusers made: latents of the new chunks, and frames ``[b, f, h, w, 3]`` in 0 … 1."""

    latents: Tensor
    frames: Tensor


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Any:
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def folder(variant: str) -> Path:
        out = root / variant
        make_checkpoint.write_checkpoint(out, size_name="tiny", variant_name=variant, seed=3, dtype=torch.float32)
        return out

    return folder


@contextlib.contextmanager
def regular_cholesky(added: float) -> Iterator[None]:
    """The covariance of their block noise is singular, and their float32 factorisation fails. Here it is rebuilt in
    float64 from the number that it is made of, γ = 1/3, with ``added`` on the diagonal."""
    original = torch.linalg.cholesky

    def factor(matrix: Tensor, **kwargs: Any) -> Tensor:
        if matrix.shape != (4, 4):
            return original(matrix, **kwargs)
        ones, eye = torch.ones(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
        return original(eye * (4 / 3 + added) - ones / 3).to(matrix.dtype)

    with mock.patch.object(torch.linalg, "cholesky", factor):
        yield


def their_pipeline(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def published(pipeline: Any, chunks: int, seed: int = 5, added: float = 1e-14, **arguments: Any) -> Published:
    """Run diffusers; frames are taken where the pipeline decodes them."""
    decoded: list[Tensor] = []
    decode = pipeline.vae.decode

    def record(*args: Any, **kwargs: Any) -> Any:
        out = decode(*args, **kwargs)
        decoded.append(out[0].clamp(-1, 1))
        return out

    generator = torch.Generator().manual_seed(seed)
    with mock.patch.object(pipeline.vae, "decode", record), regular_cholesky(added):
        latents = pipeline(
            num_frames=33 * chunks, generator=generator, output_type="latent", return_dict=False, **arguments
        )[0]
    frames = torch.cat(decoded, dim=2) / 2 + 0.5
    return Published(latents[:, :, -9 * chunks :], frames.permute(0, 2, 3, 4, 1))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def assert_same(ours: Result, theirs: Published) -> None:
    """Raise unless latents and frames agree within the bounds."""
    assert ours.latents.shape == theirs.latents.shape
    assert theirs.latents.std() > 0.1
    error = relative(ours.latents, theirs.latents)
    assert error <= LATENTS, f"latents differ by {error:.2e}"
    frames = theirs.frames[:, : ours.frames.shape[1]]
    assert frames.std() > 0.02
    mse = float(((ours.frames.double() / 255 - frames.double()) ** 2).mean())
    psnr = -10 * np.log10(mse)
    assert psnr >= FRAMES, f"frames have a PSNR of {psnr:.1f} dB"


def picture(count: int, seed: int) -> np.ndarray:
    """Frames of another size than the video's, so that they have to be resized: uint8 ``[count, 48, 80, 3]``."""
    rows, columns, time = np.meshgrid(np.arange(48), np.arange(80), np.arange(count), indexing="ij")
    wave = np.sin(rows / 7 + seed) * np.cos(columns / 9 - time / 5)
    channels = np.stack([wave, np.roll(wave, 11, 0), np.roll(wave, 23, 1)], -1)
    return ((channels * 0.5 + 0.5) * 255).astype(np.uint8).transpose(2, 0, 1, 3)


def arguments(variant: str, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same request in their words and in ours."""
    from PIL import Image

    guidance = 1.0 if variant == "distilled" else 5.0
    theirs: dict[str, Any] = {"prompt": PROMPT, "max_sequence_length": 24, "guidance_scale": guidance, **SIZE}
    ours: dict[str, Any] = {"max_sequence_length": 24, "rng": "diffusers", "seed": 5, "guidance": guidance, **SIZE}
    if guidance > 1:
        theirs["negative_prompt"] = ours["negative_prompt"] = NEGATIVE
    steps = STEPS[variant]
    ours["steps"] = steps
    theirs |= {"num_inference_steps": steps[0]} if variant == "base" else {"pyramid_num_inference_steps_list": [*steps]}
    if variant == "distilled":
        theirs["is_amplify_first_chunk"] = ours["amplify_first_chunk"] = True
    if kind == "image":
        theirs["image"] = ours["image"] = Image.fromarray(picture(1, 1)[0])
    elif kind == "video":
        frames = [Image.fromarray(frame) for frame in picture(70, 2)]
        theirs["video"] = ours["video"] = frames
    return theirs, ours


@pytest.mark.parametrize("kind", ["text", "image", "video"])
@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_three_chunks(variant: str, kind: str, folders: Any) -> None:
    theirs, ours = arguments(variant, kind)
    reference = published(their_pipeline(folders(variant)), 3, **theirs)
    pipeline = helios.load(folders(variant), backend="reference")
    assert pipeline.variant == variant
    assert not pipeline.random_weights
    result = pipeline.generate(PROMPT, chunks=3, **ours)
    assert_same(result, reference)
    assert result.frames.shape == (1, 97, 64, 128, 3)
    assert result.returned.startswith("97 frames")
