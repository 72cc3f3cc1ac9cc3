"""What a video starts from: nothing, an image or another video, as anchor and history of the first chunk.

Given frames are encoded and then mixed with a little noise, as the network saw them in training. An image gives two
things: its latent, the anchor; and the last latent of the image held still for 33 frames, the newest history frame. A
video gives its first frame as anchor and its last whole sections of 33 frames, each encoded by itself, as history.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from helios.media import to_model
from helios.model.vae_split import Split
from helios.pipeline.codec import Codec
from helios.pipeline.history import CHUNK_LATENTS
from helios.pipeline.request import Request, frames_of_chunks
from helios.sampler import Noise

__all__ = ["start"]

SECTION = frames_of_chunks(1)


def start(
    request: Request, codec: Codec, noise: Noise, channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """History ``[b, c, window, h, w]`` and anchor ``[b, c, 1, h, w]`` (None for text) of the first chunk.

    Args:
        request: what is asked for.
        codec: encodes given frames.
        noise: the draws, in the order of the published pipelines.
        channels: of latents.
        dtype: of the result.
    """
    factor = codec.config.scale_factor_spatial
    like = torch.zeros(1, channels, 1, request.height // factor, request.width // factor, dtype=dtype)
    newest, anchor = None, None
    if request.kind == "image":
        newest, anchor = _image(request, codec, noise, like)
    elif request.kind == "video":
        newest, anchor = _video(request, codec, noise, like)
    history = request.window.start(like, request.batch, None if newest is None else newest.to(dtype))
    return history, anchor if anchor is None else anchor.to(dtype)


def _image(request: Request, codec: Codec, noise: Noise, like: Tensor) -> tuple[Tensor, Tensor]:
    """The newest history frame, and the anchor."""
    assert request.given is not None
    frame, still = _shapes(request, like)
    one, whole = _splits(request, codec)
    picture = to_model(request.given)
    anchor = codec.encode(picture, noise.image_sample(frame, codec.encoding), one)
    held = picture.expand(-1, -1, SECTION, -1, -1).contiguous()
    newest = codec.encode(held, noise.fake_image_sample(still, codec.encoding), whole)[:, :, -1:]
    level = noise.image_sigma(request.batch, request.image_sigma)
    anchor = _mix(anchor, noise.image_noise(frame), level)
    level = noise.fake_image_sigma(request.batch, request.video_sigma)
    return _mix(newest, noise.fake_image_noise(frame), level), anchor


def _video(request: Request, codec: Codec, noise: Noise, like: Tensor) -> tuple[Tensor, Tensor]:
    """History of the video's end, and the anchor."""
    assert request.given is not None
    frame, section = _shapes(request, like)
    one, whole = _splits(request, codec)
    anchor = codec.encode(to_model(request.given[:1]), noise.video_first_sample(frame, codec.encoding), one)
    parts = {
        i: codec.encode(to_model(frames), noise.video_sample(i, section, codec.encoding), whole)
        for i, frames in _sections(request)
    }
    level = noise.image_sigma(request.batch, request.image_sigma)
    anchor = _mix(anchor, noise.image_noise(frame), level)
    for i, latents in parts.items():
        levels = noise.video_sigmas(i, request.batch, CHUNK_LATENTS, request.video_sigma)
        parts[i] = _mix(latents, noise.video_noise(i, section), levels)
    return torch.cat(list(parts.values()), dim=2), anchor


def _sections(request: Request) -> Iterator[tuple[int, Tensor]]:
    """Number and frames of the sections that the window reaches back to: the last ones of the video's whole sections,
    which end with its last frame. The published order of draws knows no skipping, so there all are encoded."""
    assert request.given is not None
    count = len(request.given) // SECTION
    reach = math.ceil(request.window.length / CHUNK_LATENTS)
    begin = len(request.given) - count * SECTION
    for i in range(0 if request.rng == "diffusers" else max(0, count - reach), count):
        yield i, request.given[begin + i * SECTION : begin + (i + 1) * SECTION]


def _shapes(request: Request, like: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one latent frame and of one section."""
    _, c, _, h, w = like.shape
    return (request.batch, c, 1, h, w), (request.batch, c, CHUNK_LATENTS, h, w)


def _splits(request: Request, codec: Codec) -> tuple[Split, Split]:
    """How one frame and one section are encoded."""
    one, whole = (codec.choose(1, n, request.height, request.width, "encode") for n in (1, CHUNK_LATENTS))
    return one, whole


def _mix(latents: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """``level·noise + (1 − level)·latents``."""
    return level * noise + (1 - level) * latents
