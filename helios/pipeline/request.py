"""What is asked of a pipeline: every parameter with its default and meaning, checked before anything is computed."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from helios.errors import InputError, unknown_name
from helios.model.config import SchedulerConfig, TransformerConfig, VaeConfig
from helios.model.presets import Variant
from helios.pipeline import checks
from helios.pipeline.history import CHUNK_LATENTS, Window
from helios.pipeline.prompts import CHUNKS_PER_PROMPT, INTERPOLATION_STEPS, Prompts, Script, script_of
from helios.sampler.schedule import ShiftFrom

__all__ = ["FPS", "Request", "Settings", "build_request", "frames_of_chunks", "returned_frames"]

FPS = 24
"""Frames a second of every published model."""

Rng = Literal["helios", "diffusers"]


class Settings(TypedDict, total=False):
    """Keyword arguments of ``Pipeline.stream`` and ``Pipeline.generate``. ``None`` stands for the default.

    What to make:
        negative_prompt: one text or one a prompt; what guidance leads away from. Default: the empty text.
        image: starts the video: a path, or whatever ``helios.media.as_frames`` takes.
        video: is continued: a path or frames, at least 33; the last multiple of 33 is used, and the first frame.
        prompts: a schedule of prompts, or where new ones arrive (see ``helios.pipeline.prompts``).
        chunks_per_prompt: chunks of a scheduled prompt that does not say its own (7).
        interpolation_steps: chunks over which a new prompt takes over (3; 0 in a branch, see ``Pipeline.stream``).
        chunks, frames, seconds: length, one of them; rounded up to chunks of 33 frames. Default: the variant's.
        height, width: in pixels (384 × 640); multiples of 16, for a pyramid of 3 stages of 64.
        prompt_embeds, negative_prompt_embeds: ``[b, tokens, text_dim]`` instead of texts.
        videos_per_prompt: p prompts make ``p × videos_per_prompt`` videos in one batch, those of a prompt adjacent.

    How:
        steps: solver steps, one number for every stage or one a stage. Default: the variant's.
        guidance: scale of classifier-free guidance; at 1 or less there is none. Default: the variant's.
        amplify_first_chunk: twice the steps in the first chunk; only the distilled sampler does it.
        zero_init, zero_steps: with CFG-Zero*, let steps 0 … zero_steps of stage 0 move by nothing.
        seed: 0 … 2⁶⁴ − 1. rng: ``helios`` (keyed draws, the same on every host) or ``diffusers`` (the draws of the
            published pipelines, in their order).
        latents: noise to start from, ``[b, 16, 9·n, h/8, w/8]`` for the first n chunks, instead of drawn.
        sigmas: noise levels of Base, one a step, falling.
        max_sequence_length: tokens of the prompt (512).
        keep_first_frame: every chunk sees an anchor, the first frame of the video. history_sizes: (16, 2, 1).
        skip_first_chunk: take the anchor from the second chunk once it is there.
        image_sigma, video_sigma: ranges of the noise mixed into the anchor and into other given frames; (0, 0) is none.
        shift_from: ``before_upsampling`` as published for inference, ``after_upsampling`` as in training.
    """

    negative_prompt: str | Sequence[str] | None
    image: Any
    video: Any
    prompts: Prompts | None
    chunks_per_prompt: int
    interpolation_steps: int | None
    chunks: int | None
    frames: int | None
    seconds: float | None
    height: int | None
    width: int | None
    steps: int | Sequence[int] | None
    guidance: float | None
    amplify_first_chunk: bool | None
    zero_init: bool | None
    zero_steps: int
    seed: int
    rng: Rng
    latents: Tensor | None
    sigmas: Sequence[float] | None
    max_sequence_length: int
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    videos_per_prompt: int
    keep_first_frame: bool
    history_sizes: Sequence[int]
    skip_first_chunk: bool
    image_sigma: tuple[float, float]
    video_sigma: tuple[float, float]
    shift_from: ShiftFrom


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A checked request; the meaning of the fields stands at ``Settings``.

    ``texts`` are the prompts, empty where embeddings are given; ``negatives`` is empty without guidance; ``chunks`` is
    None for a video without end; ``given`` are frames ``[f, h, w, 3]`` of the image (1) or video (more); ``asked`` is
    the length in the caller's words.
    """

    texts: tuple[str, ...]
    negatives: tuple[str, ...]
    embeds: Tensor | None
    negative_embeds: Tensor | None
    script: Script | None
    interpolation_steps: int | None
    given: Tensor | None
    kind: Literal["text", "image", "video"]
    chunks: int | None
    asked: str
    height: int
    width: int
    steps: tuple[int, ...]
    guidance: float
    amplify: bool
    zero_init: bool
    zero_steps: int
    seed: int
    rng: Rng
    latents: Tensor | None
    sigmas: tuple[float, ...] | None
    tokens: int
    prompts: int
    videos_per_prompt: int
    window: Window
    skip_first_chunk: bool
    image_sigma: tuple[float, float]
    video_sigma: tuple[float, float]
    shift_from: ShiftFrom
    warnings: tuple[str, ...] = ()

    @property
    def batch(self) -> int:
        """Videos made together."""
        return self.prompts * self.videos_per_prompt

    @property
    def guided(self) -> bool:
        return self.guidance > 1.0

    def settings(self) -> dict[str, Any]:
        """Everything that shapes the result but the prompts in force and the length, as JSON values, under the names of
        ``Settings``; of tensors their digests, of given frames also their kind."""
        same = ("height", "width", "steps", "guidance", "zero_init", "zero_steps", "seed", "rng", "sigmas")
        more = ("videos_per_prompt", "skip_first_chunk", "image_sigma", "video_sigma", "shift_from", "kind")
        values = {name: getattr(self, name) for name in (*same, *more, "interpolation_steps")}
        values |= {
            "negative_prompt": self.negatives,
            "amplify_first_chunk": self.amplify,
            "max_sequence_length": self.tokens,
            "history_sizes": self.window.sizes,
            "keep_first_frame": self.window.keep_first_frame,
        }
        values |= {name: _digest(getattr(self, name)) for name in ("embeds", "negative_embeds", "given", "latents")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def frames_of_chunks(chunks: int) -> int:
    """Frames that the VAE makes of that many chunks: 33 each."""
    return chunks * ((CHUNK_LATENTS - 1) * 4 + 1)


def returned_frames(chunks: int) -> int:
    """Frames of the finished video: of all of them the last 4k + 1, as published.

    >>> returned_frames(1), returned_frames(3), returned_frames(8)
    (33, 97, 261)
    """
    return (frames_of_chunks(chunks) - 1) // 4 * 4 + 1


def build_request(
    prompt: str | Sequence[str] | None,
    settings: Mapping[str, Any],
    *,
    variant: Variant,
    scheduler: SchedulerConfig,
    transformer: TransformerConfig,
    vae: VaeConfig,
) -> Request:
    """The request that these arguments make for a model.

    Raises:
        InputError: the first thing that makes no sense, and what would.
    """
    unknown = sorted(set(settings) - set(Settings.__annotations__))
    if unknown:
        raise InputError(unknown_name("setting", unknown[0], Settings.__annotations__))
    given = {name: value for name, value in settings.items() if value is not None}
    get = given.get
    height, width = get("height", 384), get("width", 640)
    checks.size(height, width, checks.size_unit(scheduler.stages, transformer, vae))
    script = script_of(given["prompts"], get("chunks_per_prompt", CHUNKS_PER_PROMPT)) if "prompts" in given else None
    texts, embeds = _prompt(prompt, given, script, transformer.text_dim)
    guidance = checks.at_least("guidance", get("guidance", variant.guidance), 0.0)
    prompts = len(texts) if embeds is None else embeds.shape[0]
    negatives, negative_embeds, warnings = _negative(given, prompts, guidance, embeds, transformer.text_dim)
    per_prompt = checks.whole("videos_per_prompt", get("videos_per_prompt", 1), 1)
    chunks, asked = _length(given, script, variant)
    frames, kind = _given_frames(given, height, width)
    return Request(
        texts=texts,
        negatives=negatives,
        embeds=embeds,
        negative_embeds=negative_embeds,
        script=script,
        interpolation_steps=_interpolation(given, script),
        given=frames,
        kind=kind,
        chunks=chunks,
        asked=asked,
        height=height,
        width=width,
        latents=checks.latents(get("latents"), prompts * per_prompt, vae, height, width),
        tokens=_tokens(given, embeds),
        prompts=prompts,
        videos_per_prompt=per_prompt,
        guidance=guidance,
        warnings=warnings,
        **_sampling(given, variant, scheduler.stages),
    )


def _sampling(given: Mapping[str, Any], variant: Variant, stages: int) -> dict[str, Any]:
    """How it is made: the fields that depend on nothing but their own setting."""
    get = given.get
    steps = checks.steps(get("steps", variant.steps), stages)
    shift_from = get("shift_from", "before_upsampling")
    return {
        "steps": steps,
        "sigmas": checks.sigmas(get("sigmas"), steps),
        "amplify": bool(get("amplify_first_chunk", variant.amplify_first_chunk)),
        "zero_init": bool(get("zero_init", variant.zero_init)),
        "zero_steps": checks.whole("zero_steps", get("zero_steps", 1), 0),
        "seed": checks.whole("seed", get("seed", 0), 0, 2**64 - 1),
        "rng": checks.one_of("rng", get("rng", "helios"), ("helios", "diffusers")),
        "window": Window.of(get("history_sizes", (16, 2, 1)), bool(get("keep_first_frame", True))),
        "skip_first_chunk": bool(get("skip_first_chunk", False)),
        "image_sigma": checks.sigma_range("image_sigma", get("image_sigma", (0.111, 0.135))),
        "video_sigma": checks.sigma_range("video_sigma", get("video_sigma", (0.111, 0.135))),
        "shift_from": checks.one_of("shift_from", shift_from, ("before_upsampling", "after_upsampling")),
    }


def _prompt(
    prompt: Any, given: Mapping[str, Any], script: Script | None, text_dim: int
) -> tuple[tuple[str, ...], Tensor | None]:
    embeds = given.get("prompt_embeds")
    if embeds is not None:
        if prompt is not None or script is not None:
            raise InputError("both a prompt and prompt_embeds are given", "give one of them")
        return (), checks.embeds("prompt_embeds", embeds, text_dim)
    if script is not None and script.parts:
        if prompt is not None:
            raise InputError("both prompt and a schedule of prompts are given", "make the prompt the first of prompts")
        return (script.parts[0][0],), None
    if prompt is None:
        raise InputError("there is no prompt", "describe the video in a sentence or more, or pass prompt_embeds")
    texts = checks.texts(prompt)
    if script is not None and len(texts) > 1:
        raise InputError(f"{len(texts)} prompts and a source of new ones", "prompts that arrive need a batch of one")
    return texts, None


def _negative(
    given: Mapping[str, Any], prompts: int, guidance: float, embeds: Tensor | None, text_dim: int
) -> tuple[tuple[str, ...], Tensor | None, tuple[str, ...]]:
    """Negative texts or embeddings, one a prompt, and what should be said about them."""
    text, tensor = given.get("negative_prompt"), given.get("negative_prompt_embeds")
    if text is not None and tensor is not None:
        raise InputError("both negative_prompt and negative_prompt_embeds are given", "give one of them")
    if guidance <= 1.0:
        warning = f"the negative prompt has no effect: there is no guidance at scale {guidance:g}"
        return (), None, (warning,) if text or tensor is not None else ()
    if tensor is not None:
        tensor = checks.embeds("negative_prompt_embeds", tensor, text_dim)
        if tensor.shape[0] not in (1, prompts):
            came = f"{tensor.shape[0]} negative embeddings for {prompts} prompt(s)"
            raise InputError(came, "give one, or one a prompt")
        if embeds is not None and tensor.shape[1] != embeds.shape[1]:
            raise InputError(
                f"prompt_embeds have {embeds.shape[1]} tokens, negative_prompt_embeds {tensor.shape[1]}",
                "pad both to the same length with zeros",
            )
        return (), tensor.expand(prompts, -1, -1), ()
    negatives = (text or "",) * prompts if text is None or isinstance(text, str) else tuple(text)
    if len(negatives) != prompts or not all(isinstance(one, str) for one in negatives):
        raise InputError(f"{len(negatives)} negative prompts for {prompts} prompt(s)", "give one text, or one a prompt")
    return negatives, None, ()


def _tokens(given: Mapping[str, Any], embeds: Tensor | None) -> int:
    if embeds is not None:
        return int(embeds.shape[1])
    return checks.whole("max_sequence_length", given.get("max_sequence_length", 512), 2)


def _length(given: Mapping[str, Any], script: Script | None, variant: Variant) -> tuple[int | None, str]:
    """Chunks, and the length in the caller's words."""
    named = [name for name in ("chunks", "frames", "seconds") if name in given]
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} are given, but each of them is the length", f"give {named[0]} alone")
    if not named and script is not None:
        return script.chunks, _counted(script.chunks, "chunks") if script.chunks else "a video without end"
    name = named[0] if named else "frames"
    value = given.get(name, variant.frames)
    if name == "chunks":
        return checks.whole("chunks", value, 1), _counted(value, name)
    frames = math.ceil(checks.above("seconds", value, 0.0) * FPS) if name == "seconds" else checks.whole(name, value, 1)
    return math.ceil(frames / frames_of_chunks(1)), _counted(value, name)


def _counted(value: float, name: str) -> str:
    return f"{value:g} {name.removesuffix('s') if value == 1 else name}"


def _interpolation(given: Mapping[str, Any], script: Script | None) -> int | None:
    if "interpolation_steps" in given:
        return checks.whole("interpolation_steps", given["interpolation_steps"], 0)
    return None if script is None else INTERPOLATION_STEPS


def _given_frames(
    given: Mapping[str, Any], height: int, width: int
) -> tuple[Tensor | None, Literal["text", "image", "video"]]:
    """The frames of the image or video at the size of the run, and which of the two they are."""
    from helios.media import as_frames, read_image, read_video

    image, video, least = given.get("image"), given.get("video"), frames_of_chunks(1)
    if image is not None and video is not None:
        raise InputError("both an image and a video are given", "start from one of them")
    if image is not None:
        if isinstance(image, str | os.PathLike):
            return read_image(image, height=height, width=width)[None], "image"
        frames = as_frames(image, height=height, width=width)
        if len(frames) != 1:
            raise InputError(f"image holds {len(frames)} pictures, wanted one", "pass several frames as video")
        return frames, "image"
    if video is None:
        return None, "text"
    if isinstance(video, str | os.PathLike):
        return read_video(video, height=height, width=width, min_frames=least), "video"
    frames = as_frames(video, height=height, width=width)
    if len(frames) < least:
        raise InputError(f"the video has {len(frames)} frames, wanted at least {least}", "pass one frame as image")
    return frames, "video"


def _digest(tensor: Tensor | None) -> str | None:
    if tensor is None:
        return None
    sha = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
