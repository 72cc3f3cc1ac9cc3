"""Videos of a small model that the suite draws, on any backend, and the oracle's along the way.

A run's chunks are a chain: each starts from the state that the one before left. The oracle goes along the chain in
float64, with every state rounded to the working dtype, and a device is given those states: an error in one chunk never
reaches the next.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import torch
from torch import Tensor

from helios.backend import PRECISIONS, Backend, ReferenceBackend
from helios.model import presets
from helios.model.shapes import transformer_shapes, vae_shapes
from helios.model.text import Encoded
from helios.model.vae_split import Split
from helios.pipeline import Chunk, Pipeline, RunState
from helios.pipeline.codec import Codec
from helios.pipeline.model import Model
from helios_conformance import budget
from helios_conformance.budget import Errors
from helios_conformance.draws import Root, normal, uniform
from helios_conformance.graph_runs import largest
from helios_conformance.scenes.vae import VAE
from helios_conformance.scenes.weights import LoudWeights
from helios_conformance.selection import digest

__all__ = [
    "GoldenChunk",
    "Video",
    "chunk_after",
    "coverage_of",
    "first_chunk_errors",
    "frame_digests",
    "golden_video",
    "latents_only",
    "model_of",
    "pipeline_of",
    "rounded_state",
    "state_through_bytes",
    "vae_weights",
]

TOKENS = 12


@dataclasses.dataclass(frozen=True)
class Video:
    """A request, as data.

    Attributes:
        variant: ``base``, ``mid`` or ``distilled``.
        prompts: one a video of the batch.
        chunks: to make.
        side: height and width in pixels.
        steps: of each stage.
        start: from nothing, from an image or from a video; their pixels are drawn.
        schedule: texts and their chunks, in place of a prompt.
        more: further settings of ``helios.pipeline.Settings`` as pairs.
    """

    variant: str
    prompts: tuple[str, ...] = ("a",)
    chunks: int = 1
    side: int = 64
    steps: tuple[int, ...] = (1, 1, 1)
    start: Literal["text", "image", "video"] = "text"
    schedule: tuple[tuple[str, int], ...] = ()
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def batch(self) -> int:
        return 1 if self.schedule else len(self.prompts)

    @property
    def latents(self) -> tuple[int, ...]:
        """Shape of a chunk's latents."""
        return (self.batch, VAE.z_dim, 9, self.side // 8, self.side // 8)

    @property
    def prompt(self) -> list[str] | None:
        return None if self.schedule else list(self.prompts)

    def settings(self, root: Root) -> dict[str, Any]:
        """Keyword arguments of ``Pipeline.stream``, without the length."""
        made: dict[str, Any] = {"height": self.side, "width": self.side, "steps": self.steps}
        made |= {"max_sequence_length": TOKENS, "seed": root.key("video", "seed") % 2**63}
        if self.schedule:
            made["prompts"] = list(self.schedule)
        size = (self.side, self.side, 3)
        if self.start == "image":
            made["image"] = _pixels(root, "image", size)
        elif self.start == "video":
            made["video"] = _pixels(root, "video", (33, *size))
        return made | dict(self.more)


def _pixels(root: Root, what: str, shape: tuple[int, ...]) -> Tensor:
    return uniform(root.key("video", what), shape, torch.float32, 255.0).round().to(torch.uint8)


class DrawnText:
    """Embeddings that stand for texts: normals keyed by the text, zeros behind its end."""

    origin = "drawn by the conformance suite"

    def __init__(self, root: Root, text_dim: int, dtype: torch.dtype) -> None:
        self.root, self.text_dim, self.dtype = root, text_dim, dtype

    def encode(self, text: str, tokens: int) -> Encoded:
        made = normal(self.root.key("text", text), (tokens, self.text_dim), self.dtype).float()
        made[tokens - tokens // 3 :] = 0.0
        return Encoded(made)

    def release(self) -> None:
        """Nothing is held."""


def model_of(variant: str, root: Root, dtype: torch.dtype) -> Model:
    """The tiny transformer and the suite's autoencoder, with weights and texts rounded to a dtype."""
    sampling, tiny = presets.variant(variant), presets.size("tiny").transformer
    return Model(
        f"drawn by the conformance suite, {variant}",
        sampling,
        sampling.pipeline,
        sampling.scheduler,
        tiny,
        VAE,
        LoudWeights(transformer_shapes(tiny), "video transformer", dtype),
        vae_weights(),
        lambda _dtype, _device: DrawnText(root, tiny.text_dim, dtype),
        lambda: str(root.key("video", variant)).encode(),
        random_weights=True,
    )


class _Undecoded(Codec):
    """Frames are black: where only latents are compared, decoding would be two thirds of the work."""

    def decode(self, latents: Tensor, split: Split, dtype: torch.dtype | None = None) -> Tensor:
        b, _, t, h, w = latents.shape
        return torch.zeros(b, 3, 4 * (t - 1) + 1, 8 * h, 8 * w)


def latents_only(pipeline: Pipeline) -> Pipeline:
    """The pipeline, without a decoder."""
    codec = pipeline.codec
    pipeline.codec = _Undecoded(codec.config, codec.weights, codec.backend, codec.dtype, codec.fallback)
    return pipeline


def pipeline_of(
    variant: str, root: Root, precision: str, backend: Backend | None = None, fallback: str = "error"
) -> Pipeline:
    """A pipeline of that model: on a backend, or the oracle, in float64 on the reference."""
    model = model_of(variant, root, PRECISIONS[precision])
    if backend is None:
        return Pipeline(model, ReferenceBackend(), "fp64")
    return Pipeline(model, backend, precision, fallback)


@functools.lru_cache(maxsize=32)
def first_chunk_errors(video: Video, root: Root, precision: str, draws: int) -> Errors:
    """The largest errors of the reference in a video's first chunk over several draws."""
    first = dataclasses.replace(video, chunks=1)
    rows = []
    for draw in range(draws):
        one = Root(64 * root.seed + draw, root.nonce)
        pipeline = latents_only(pipeline_of(video.variant, one, precision, ReferenceBackend()))
        came = chunk_after(pipeline, first, one, 0, None).latents
        rows.append(budget.measure(came, golden_video(first, one, precision)[0].latents))
    return largest(rows)


@dataclasses.dataclass(frozen=True, eq=False)
class GoldenChunk:
    """Where a chunk starts (None: at the beginning) and the oracle's latents, float64."""

    state: RunState | None
    latents: Tensor


@functools.lru_cache(maxsize=8)
def golden_video(video: Video, root: Root, precision: str) -> tuple[GoldenChunk, ...]:
    """The oracle's chunks, each from a state that both can start from."""
    pipeline = latents_only(pipeline_of(video.variant, root, precision))
    made: list[GoldenChunk] = []
    state = None
    for index in range(video.chunks):
        chunk = chunk_after(pipeline, video, root, index, state)
        made.append(GoldenChunk(state, chunk.latents))
        state = rounded_state(chunk.state, PRECISIONS[precision])
    return tuple(made)


def coverage_of(pipeline: Pipeline) -> list[tuple[str, int, int, int, str]]:
    """How the ops of all programs of a pipeline ran, the autoencoder's included: a row of op, native, fused, fallback
    and reason for each op of each program."""
    made = [pipeline.coverage, *pipeline.codec.coverage]
    return [row for coverage in made if coverage is not None for row in coverage.rows()]


def rounded_state(state: RunState, dtype: torch.dtype) -> RunState:
    """The state with the numbers of a dtype, as a run that keeps float32 has them; how it is decoded is left open."""
    anchor = None if state.anchor is None else state.anchor.to(dtype).float()
    return dataclasses.replace(state, history=state.history.to(dtype).float(), anchor=anchor, plan={})


def chunk_after(pipeline: Pipeline, video: Video, root: Root, index: int, state: RunState | None) -> Chunk:
    """One chunk of a video, after a state."""
    settings = video.settings(root)
    if not video.schedule:
        settings["chunks"] = index + 1
    return next(iter(pipeline.stream(video.prompt, state=state, **settings)))


def vae_weights() -> LoudWeights:
    """The autoencoder's, float32: the same in every run."""
    return LoudWeights(vae_shapes(VAE), "video vae", torch.float32)


def frame_digests(frames: Tensor) -> list[str]:
    """16 hexadecimal digits of each frame of ``[b, f, h, w, 3]``, of all videos together."""
    return [digest(frames[:, i])[:16] for i in range(frames.shape[1])]


def state_through_bytes(state: RunState) -> RunState:
    """The state as it comes back from a file."""
    from safetensors.torch import load, save

    tensors, metadata = state.to_tensors()
    return RunState.from_tensors(load(save(dict(tensors))), dict(metadata))
