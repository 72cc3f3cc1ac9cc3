"""Where the published pipelines fail or ignore what they get: what they do, what ours does, and why it is right."""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from torch import Tensor

import helios
from helios.errors import InputError
from helios.ops.resample import block_noise

# diffusers hands torch tensors to np.linspace, which numpy has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

SIZE = {"height": 64, "width": 64, "max_sequence_length": 8}
OURS: dict[str, Any] = {**SIZE, "rng": "diffusers", "seed": 1, "guidance": 1.0}
THEIRS: dict[str, Any] = {**SIZE, "guidance_scale": 1.0, "output_type": "latent", "return_dict": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    out: Path = tmp_path_factory.mktemp("base") / "tiny"
    make_checkpoint.write_checkpoint(out, size_name="tiny", variant_name="base", seed=3, dtype=torch.float32)
    return out


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    out: Path = tmp_path_factory.mktemp("distilled") / "tiny"
    make_checkpoint.write_checkpoint(out, size_name="tiny", variant_name="distilled", seed=3, dtype=torch.float32)
    return out


@pytest.fixture(scope="module")
def mid(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    out: Path = tmp_path_factory.mktemp("mid") / "tiny"
    make_checkpoint.write_checkpoint(out, size_name="tiny", variant_name="mid", seed=3, dtype=torch.float32)
    return out


def theirs(folder: Path, **more: Any) -> Tensor:
    """Latents of diffusers' pipeline."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    latents: Tensor = pipeline("a cat", generator=torch.Generator().manual_seed(1), **(THEIRS | more))[0]
    return latents


def ours(folder: Path, prompt: Any = "a cat", **more: Any) -> Tensor:
    return helios.load(folder, backend="reference").generate(prompt, **(OURS | more)).latents


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_singular_block_noise(distilled: Path) -> None:
    with pytest.raises(RuntimeError, match="positive-definite"):
        theirs(distilled, num_frames=33, pyramid_num_inference_steps_list=[1, 1, 1])
    assert ours(distilled, chunks=1, steps=1).isfinite().all()
    # Right because the noise has the covariance asked for, (1 + γ)·I − γ·11ᵀ, for which L is only one root of many.
    z = torch.randn(1, 1, 1, 300, 300, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = block_noise(z).reshape(300, 2, 300, 2).permute(0, 2, 1, 3).reshape(-1, 4)
    covariance = torch.eye(4) * 4 / 3 - torch.ones(4, 4) / 3
    torch.testing.assert_close(torch.cov(noise.T).float(), covariance, atol=0.02, rtol=0)


def test_without_the_first_frame(base: Path) -> None:
    with pytest.raises(RuntimeError, match="split"):
        theirs(base, num_frames=66, num_inference_steps=2, keep_first_frame=False)
    result = ours(base, chunks=3, steps=2, keep_first_frame=False)

    # Right because it is what their code gives once its window is counted after the short group has grown.
    def counted(sizes: Iterable[int], *start: int) -> int:
        sizes = list(sizes)
        return builtins.sum(sizes, *start) + (sizes == [16, 2, 1])

    module = diffusers.pipelines.helios.pipeline_helios
    with mock.patch.object(module, "sum", counted, create=True):
        repaired = theirs(base, num_frames=99, num_inference_steps=2, keep_first_frame=False)
    assert relative(result, repaired) < 1e-5
    assert relative(result, ours(base, chunks=3, steps=2)) > 1e-3


def test_given_latents(base: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(1, 16, 9, 8, 8, generator=generator)
    other = torch.randn(1, 16, 9, 8, 8, generator=generator)
    more = {"num_frames": 33, "num_inference_steps": 2}
    ignored = theirs(base, **more, latents=other)
    assert torch.equal(ignored, theirs(base, **more))
    # Ours starts from them: from those that would have been drawn as if drawn, from others elsewhere.
    plain = ours(base, chunks=1, steps=2)
    assert torch.equal(ours(base, chunks=1, steps=2, latents=drawn), plain)
    assert relative(ours(base, chunks=1, steps=2, latents=other), plain) > 0.1


def test_several_videos_of_a_prompt(base: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(size|shape|match)"):
        theirs(base, num_frames=33, num_inference_steps=2, num_videos_per_prompt=2)
    prompts = ["a cat", "a boat at night"]
    together = ours(base, prompts, chunks=2, steps=2, videos_per_prompt=2, rng="helios")
    assert together.shape[0] == 4
    # Right because they are what the prompts give one by one: videos 0 and 1 have the first prompt, 2 and 3 the second.
    repeated = ours(base, [p for p in prompts for _ in range(2)], chunks=2, steps=2, rng="helios")
    assert torch.equal(together, repeated)
    assert relative(together[:1], ours(base, "a cat", chunks=2, steps=2, rng="helios")) < 1e-5
    assert relative(together[:1], together[1:2]) > 0.1


def test_an_image_for_a_batch(base: Path) -> None:
    image = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(2))
    more = {"num_frames": 33, "num_inference_steps": 1}
    with pytest.raises(RuntimeError, match=r"(size|shape|match)"):
        theirs(base, **more, image=image.permute(2, 0, 1)[None], num_videos_per_prompt=2)
    together = ours(base, ["a cat", "a boat"], chunks=1, steps=1, image=image, rng="helios")
    alone = ours(base, "a cat", chunks=1, steps=1, image=image, rng="helios")
    assert relative(together[:1], alone) < 1e-5


def test_guidance_off_says_that_the_negative_prompt_is_ignored(base: Path) -> None:
    """They ignore it silently."""
    request = helios.load(base, backend="reference").request("a cat", negative_prompt="dark", **OURS)
    assert request.warnings == ("the negative prompt has no effect: there is no guidance at scale 1",)


def test_one_token_a_frame(mid: Path) -> None:
    """At 64×64 the first stage has one token a frame, and their CFG-Zero* cannot flatten what comes out of it."""
    more = {"num_frames": 33, "pyramid_num_inference_steps_list": [1, 1, 1], "guidance_scale": 5.0}
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        theirs(mid, **more)
    small = ours(mid, chunks=1, steps=1, guidance=5.0)
    assert small.isfinite().all()


def test_a_size_that_leaves_half_a_patch(distilled: Path) -> None:
    """They accept multiples of 16, halve 10 rows to 5 to 2, double them to 8, and fail after the last step."""
    regular = mock.patch.object(torch.linalg, "cholesky", return_value=torch.eye(4))
    with regular, pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        theirs(distilled, num_frames=33, pyramid_num_inference_steps_list=[1, 1, 1], height=80)
    with pytest.raises(InputError, match="height is 80, wanted a multiple of 64") as error:
        ours(distilled, height=80)
    assert error.value.fix == "use height 64 or 128"
