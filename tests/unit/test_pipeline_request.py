"""Requests that make no sense are refused before anything is computed, each with what would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import helios
from helios.backend import ReferenceBackend
from helios.errors import CheckpointError, HeliosError, InputError, UnknownBackend
from helios.pipeline import frames_of_chunks, returned_frames
from helios.pipeline.pipeline import Pipeline

PIPELINES = {
    variant: helios.load(size="tiny", variant=variant, backend="reference") for variant in ("base", "distilled")
}
EMBEDS = torch.zeros(1, 8, 32)
PICTURE = np.zeros((32, 32, 3), np.uint8)

# variant, prompt, settings, words of the error, words of the fix
REFUSED: list[tuple[str, Any, dict[str, Any], str, str]] = [
    ("base", "a", {"height": 100}, "height is 100, wanted a multiple of 16", "use height 96 or 112"),
    ("base", "a", {"width": 8}, "width is 8, wanted a multiple of 16", "use width 16"),
    ("distilled", "a", {"width": 656}, "width is 656, wanted a multiple of 64", "use width 640 or 704"),
    ("distilled", "a", {"height": 0}, "height is 0, wanted a whole number of at least 1", ""),
    ("distilled", "a", {"height": 64.0}, "height is 64.0, wanted a whole number", ""),
    ("base", "a", {"frames": 0}, "frames is 0, wanted a whole number of at least 1", ""),
    ("base", "a", {"frames": -5}, "frames is -5", ""),
    ("base", "a", {"chunks": 0}, "chunks is 0", ""),
    ("base", "a", {"chunks": True}, "chunks is True", ""),
    ("base", "a", {"seconds": 0}, "seconds is 0, wanted a number above 0", ""),
    ("base", "a", {"seconds": float("nan")}, "seconds is nan", ""),
    ("base", "a", {"frames": 9, "seconds": 1.0}, "frames and seconds are given", "give frames alone"),
    ("base", None, {}, "there is no prompt", "describe the video"),
    ("base", "", {}, "the prompt is empty", "describe the video"),
    ("base", " \n\t", {}, "the prompt is empty", ""),
    ("base", [], {}, "the list of prompts is empty", ""),
    ("base", ["a", ""], {}, "the prompt is empty", ""),
    ("base", 5, {}, "a prompt must be a text, got int", ""),
    ("base", "a", {"prompt_embeds": EMBEDS}, "both a prompt and prompt_embeds", ""),
    ("base", None, {"prompt_embeds": torch.zeros(8, 32)}, r"prompt_embeds is \[8, 32\]", ""),
    ("base", None, {"prompt_embeds": torch.zeros(1, 8, 4096)}, r"wanted a tensor \[prompts, tokens, 32\]", ""),
    ("base", None, {"prompt_embeds": EMBEDS / 0}, "no finite floating-point numbers", ""),
    ("base", "a", {"prompts": ["b"]}, "both prompt and a schedule", "make the prompt the first"),
    ("base", None, {"prompts": ["b", ""]}, "the prompt is empty", ""),
    ("base", None, {"prompts": "b"}, "prompts is 'b'", "give one prompt as `prompt`"),
    ("base", ["a", "b"], {"prompts": lambda chunk: None}, "2 prompts and a source of new ones", ""),
    ("base", "a", {"image": PICTURE, "video": [PICTURE] * 33}, "both an image and a video", "start from one"),
    ("base", "a", {"image": [PICTURE] * 2}, "image holds 2 pictures", "as video"),
    ("base", "a", {"image": "/nowhere/cat.png"}, "/nowhere/cat.png", ""),
    ("base", "a", {"video": [PICTURE] * 32}, "the video has 32 frames, wanted at least 33", "pass one frame as image"),
    ("base", "a", {"video": "/nowhere/cat.mp4"}, "/nowhere/cat.mp4", ""),
    ("base", "a", {"steps": (2, 2, 2)}, r"steps 2,2,2 are for 3 stage\(s\), this model has 1", "for example 2"),
    ("distilled", "a", {"steps": (2, 2)}, r"steps 2,2 are for 2 stage\(s\), this model has 3", "for example 2,2,2"),
    ("distilled", "a", {"steps": (2, 0, 2)}, "steps is 0", ""),
    ("distilled", "a", {"steps": "2,2,2"}, "steps", ""),
    ("base", "a", {"guidance": -1}, "guidance is -1", ""),
    ("base", "a", {"guidance": float("inf")}, "guidance is inf", ""),
    ("base", "a", {"negative_prompt": "b", "negative_prompt_embeds": EMBEDS}, "both negative_prompt and", ""),
    ("base", "a", {"negative_prompt": ["b", "c"]}, r"2 negative prompts for 1 prompt\(s\)", "one a prompt"),
    ("base", ["a"] * 3, {"negative_prompt_embeds": EMBEDS.expand(2, -1, -1)}, "2 negative embeddings for 3", ""),
    (
        "base",
        None,
        {"prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS[:, :4]},
        "have 8 tokens, negative",
        "pad",
    ),
    ("base", "a", {"seed": -1}, "seed is -1, wanted a whole number from 0 to 18446744073709551615", ""),
    ("base", "a", {"rng": "torch"}, "unknown rng 'torch'", ""),
    ("base", "a", {"latents": torch.zeros(1, 16, 9, 8, 8)}, r"latents are \[1, 16, 9, 8, 8\]", ""),
    ("base", "a", {"latents": torch.zeros(1, 16, 8, 48, 80)}, r"wanted \[1, 16, 9·n, 48, 80\]", ""),
    ("base", "a", {"sigmas": [0.9], "steps": 2}, "1 sigmas for steps 2", ""),
    ("base", "a", {"sigmas": [0.5, 0.9], "steps": 2}, "sigmas 0.5, 0.9 do not fall", ""),
    ("distilled", "a", {"sigmas": [0.9, 0.5, 0.2], "steps": 1}, "only Base takes them", ""),
    ("base", "a", {"max_sequence_length": 1}, "max_sequence_length is 1, wanted a whole number of at least 2", ""),
    ("base", "a", {"videos_per_prompt": 0}, "videos_per_prompt is 0", ""),
    ("base", "a", {"history_sizes": (16, 2)}, r"history_sizes \[16, 2\]", "use 16, 2, 1"),
    ("base", "a", {"history_sizes": (16, 2, 0)}, "history_sizes", ""),
    ("base", "a", {"image_sigma": (0.2, 0.1)}, "image_sigma", "use 0.111 and 0.135"),
    ("base", "a", {"video_sigma": 0.1}, "video_sigma", ""),
    ("base", "a", {"shift_from": "later"}, "unknown shift_from 'later'", ""),
    ("base", "a", {"guidence": 2.0}, "unknown setting 'guidence': did you mean 'guidance'", ""),
]


@pytest.mark.parametrize(("variant", "prompt", "settings", "why", "fix"), REFUSED)
def test_refused(variant: str, prompt: Any, settings: dict[str, Any], why: str, fix: str) -> None:
    with pytest.raises(InputError, match=why) as error:
        PIPELINES[variant].stream(prompt, **settings)  # at the call, before the first chunk is asked for
    assert fix in error.value.fix


@pytest.mark.parametrize("variant", PIPELINES)
def test_defaults_are_those_of_the_variant(variant: str) -> None:
    request, preset = PIPELINES[variant].request("a"), PIPELINES[variant].model.variant
    assert (request.steps, request.guidance, request.amplify) == (preset.steps, preset.guidance, variant == "distilled")
    assert (request.height, request.width, request.tokens, request.seed) == (384, 640, 512, 0)
    assert request.asked == f"{preset.frames} frames"
    assert request.chunks == -(-preset.frames // 33)
    assert request.negatives == (("",) if variant == "base" else ())
    assert request.warnings == ()


def test_none_is_the_default() -> None:
    names = ("steps", "guidance", "height", "chunks", "image", "prompts", "negative_prompt", "amplify_first_chunk")
    asked: Any = dict.fromkeys(names)
    assert PIPELINES["base"].request("a", **asked).settings() == PIPELINES["base"].request("a").settings()


@given(st.integers(1, 2000))
def test_what_is_asked_for_and_what_comes(frames: int) -> None:
    request = PIPELINES["base"].request("a", frames=frames)
    assert request.chunks is not None
    assert frames_of_chunks(request.chunks) - 33 < frames <= frames_of_chunks(request.chunks)
    assert returned_frames(request.chunks) % 4 == 1
    assert 0 <= frames_of_chunks(request.chunks) - returned_frames(request.chunks) < 4


def test_the_published_lengths() -> None:
    asked = {99: 97, 132: 129, 264: 261, 726: 725, 1452: 1449, 66: 65, 33: 33, 1: 33}
    for frames, returned in asked.items():
        chunks = PIPELINES["base"].request("a", frames=frames).chunks
        assert chunks is not None
        assert returned_frames(chunks) == returned


def test_settings_are_json_and_see_every_tensor() -> None:
    import json

    pipeline = PIPELINES["base"]
    plain = pipeline.request("a", chunks=1, height=32, width=32).settings()
    assert json.loads(json.dumps(plain)) == plain
    noise = torch.zeros(1, 16, 9, 4, 4)
    for change in ({"latents": noise}, {"latents": noise + 1}, {"image": PICTURE}, {"image": PICTURE + 1}, {"seed": 1}):
        changed: Any = change
        settings = pipeline.request("a", chunks=1, height=32, width=32, **changed).settings()
        assert settings != plain
        plain = settings


def test_a_long_prompt_is_cut_and_says_so() -> None:
    settings: Any = {"chunks": 1, "height": 16, "width": 16, "steps": 1, "max_sequence_length": 4}
    result = PIPELINES["base"].generate("a cat walks through wet grass", **settings)
    assert result.warnings == ("the prompt is longer than 4 tokens; what the model does not see: 'through wet grass'",)
    assert PIPELINES["base"].generate("a cat walks", **settings).warnings == ()


# --- loading ---


def test_load_refuses(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], type[HeliosError], str]] = [
        ({}, InputError, "neither a model nor a size"),
        ({"path_or_repo": tmp_path, "size": "tiny"}, InputError, "both a model and a size"),
        ({"size": "tinny"}, InputError, "did you mean 'tiny'"),
        ({"size": "tiny", "variant": "distiled"}, InputError, "did you mean 'distilled'"),
        ({"size": "tiny", "precision": "fp17"}, InputError, "unknown precision 'fp17': did you mean 'fp16'"),
        ({"path_or_repo": tmp_path}, CheckpointError, "model_index.json"),
        ({"path_or_repo": tmp_path / "none"}, CheckpointError, "there is no folder"),
    ]
    for arguments, kind, match in wrong:
        with pytest.raises(kind, match=match):
            helios.load(**({"backend": "reference"} | arguments))
    with pytest.raises(UnknownBackend, match="did you mean 'reference'"):
        helios.load(size="tiny", backend="referense")


def test_a_folder_knows_its_variant(tmp_path: Path, make_checkpoint: Any) -> None:
    make_checkpoint.write_checkpoint(tmp_path / "m", size_name="tiny", variant_name="mid")
    pipeline = helios.load(tmp_path / "m", backend="reference", variant="mid")
    assert (pipeline.variant, pipeline.random_weights) == ("mid", True)
    with pytest.raises(InputError, match="is a mid model, not base"):
        helios.load(tmp_path / "m", backend="reference", variant="base")


def test_models_are_told_apart() -> None:
    def identity(**arguments: Any) -> str:
        return helios.load(backend="reference", **({"size": "tiny", "variant": "mid"} | arguments)).model.identity

    assert identity() == identity()
    assert len({identity(), identity(seed_weights=1), identity(variant="base")}) == 3


def test_a_backend_may_be_an_instance() -> None:
    backend = ReferenceBackend()
    assert helios.load(size="tiny", backend=backend).backend is backend
    assert helios.Pipeline is Pipeline


def test_what_the_package_lacks() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        helios.lode  # noqa: B018
