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
from helios.model.config import VaeConfig
from helios.model.presets import SIZES
from helios.pipeline import Result

# diffusers hands torch tensors to np.linspace, which numpy has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

STEPS = {"base": (3,), "mid": (2, 3, 2), "distilled": (2, 1, 2)}
SIZES_OF = {"base": (48, 80), "mid": (64, 128), "distilled": (128, 64)}
PROMPT, NEGATIVE = "a cat walks through wet grass at night", "blurry &amp; grey"
# The VAE of `tiny` normalises three channels. Where all three are near zero the result has any direction, so that
# frames of latents 1e-6 apart can differ visibly, and so do diffusers' own, decoded alone or in a batch.
WIDER = VaeConfig(base_dim=8, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
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
        with mock.patch.dict(SIZES, {"wider": dataclasses.replace(SIZES["tiny"], vae=WIDER)}):
            make_checkpoint.write_checkpoint(out, size_name="wider", variant_name=variant, seed=3, dtype=torch.float32)
        return out

    return folder


@contextlib.contextmanager
def regular_cholesky(added: float) -> Iterator[None]:
    """The covariance of their block noise is singular, and their float32 factorisation fails. Here it is rebuilt in
    float64 from the number that it is made of, γ = 1/3, with ``added`` on the diagonal."""
    original = torch.linalg.cholesky

    def factor(matrix: Tensor, **kwargs: Any) -> Tensor:
        if matrix.shape != (4, 4):
            other: Tensor = original(matrix, **kwargs)
            return other
        ones, eye = torch.ones(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
        exact: Tensor = original(eye * (4 / 3 + added) - ones / 3)
        return exact.to(matrix.dtype)

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
    size = dict(zip(("height", "width"), SIZES_OF[variant], strict=True))
    theirs: dict[str, Any] = {"prompt": PROMPT, "max_sequence_length": 24, "guidance_scale": guidance, **size}
    ours: dict[str, Any] = {"max_sequence_length": 24, "rng": "diffusers", "seed": 5, "guidance": guidance, **size}
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
    assert pipeline.random_weights  # which the headers of the weights say
    result = pipeline.generate(PROMPT, chunks=3, **ours)
    assert_same(result, reference)
    assert result.frames.shape == (1, 97, *SIZES_OF[variant], 3)
    assert result.returned.startswith("97 frames")


def test_the_comparison_sees_another_seed(folders: Any) -> None:
    theirs, ours = arguments("distilled", "text")
    reference = published(their_pipeline(folders("distilled")), 1, **theirs)
    pipeline = helios.load(folders("distilled"), backend="reference")
    assert_same(pipeline.generate(PROMPT, chunks=1, **ours), reference)
    with pytest.raises(AssertionError, match="latents differ"):
        assert_same(pipeline.generate(PROMPT, chunks=1, **(ours | {"seed": 6})), reference)
    with pytest.raises(AssertionError, match="latents differ"):
        assert_same(pipeline.generate(PROMPT, chunks=1, **ours, shift_from="after_upsampling"), reference)


# Arguments beyond the usual: name -> variant, theirs, ours.
EXTRAS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "anchor from the second chunk": ("distilled", {"is_skip_first_chunk": True}, {"skip_first_chunk": True}),
    "other history": ("base", {"history_sizes": [1, 8, 3]}, {"history_sizes": (1, 8, 3)}),
    "given noise levels": ("base", {"sigmas": np.array([0.9, 0.5, 0.2])}, {"sigmas": [0.9, 0.5, 0.2]}),
    "more silent steps": ("mid", {"zero_steps": 2}, {"zero_steps": 2}),
    "no silent steps": ("mid", {"use_zero_init": False}, {"zero_init": False}),
    "guided distilled": ("distilled", {"guidance_scale": 3.0}, {"guidance": 3.0}),
    "long embedding": ("distilled", {"max_sequence_length": 512}, {"max_sequence_length": 512}),
    "cut prompt": ("distilled", {"max_sequence_length": 5}, {"max_sequence_length": 5}),
    "other noise on the image": (
        "distilled",
        {"image_noise_sigma_min": 0.3, "image_noise_sigma_max": 0.4, "video_noise_sigma_max": 0.2},
        {"image_sigma": (0.3, 0.4), "video_sigma": (0.111, 0.2)},
    ),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_other_arguments(name: str, folders: Any) -> None:
    variant, more_theirs, more_ours = EXTRAS[name]
    theirs, ours = arguments(variant, "image" if "image" in name else "text")
    small = {"height": 64, "width": 64} if variant == "distilled" else {}
    chunks = 3 if "chunk" in name else 2
    reference = published(their_pipeline(folders(variant)), chunks, **(theirs | more_theirs | small))
    pipeline = helios.load(folders(variant), backend="reference")
    result = pipeline.generate(PROMPT, chunks=chunks, **(ours | more_ours | small))
    assert_same(result, reference)


@pytest.mark.parametrize("variant", ["base", "mid"])
def test_a_batch_of_prompts(variant: str, folders: Any) -> None:
    prompts = [PROMPT, "a red boat on the sea"]
    theirs, ours = arguments(variant, "text")
    if "negative_prompt" in theirs:
        theirs["negative_prompt"] = [NEGATIVE, NEGATIVE]
    reference = published(their_pipeline(folders(variant)), 1, **(theirs | {"prompt": prompts}))
    result = helios.load(folders(variant), backend="reference").generate(prompts, chunks=1, **ours)
    assert_same(result, reference)
    assert relative(result.latents[0], result.latents[1]) > 0.1


def test_bf16_is_as_near_to_float32_as_theirs(folders: Any) -> None:
    """Rounding in other places is allowed, more of it is not."""
    theirs, ours = arguments("distilled", "text")
    exact = published(their_pipeline(folders("distilled")), 1, **theirs).latents
    half = diffusers.DiffusionPipeline.from_pretrained(folders("distilled"), torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    half.vae.to(torch.float32)
    error = relative(published(half, 1, **theirs).latents, exact)
    pipeline = helios.load(folders("distilled"), backend="reference", precision="bf16")
    assert relative(pipeline.generate(PROMPT, chunks=1, **ours).latents, exact) <= 1.5 * error
