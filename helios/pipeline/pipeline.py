"""The pipeline: a model on a backend, and its videos as a stream of chunks.

::

    pipeline = helios.load("path/to/model")
    for chunk in pipeline.stream("a cat walks through grass", chunks=4, seed=1):
        show(chunk.frames)

Everything else is a way to use the stream: ``generate`` collects it; keeping ``chunk.state`` and passing it back
continues a run, or branches off from it with another prompt.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from torch import Tensor

from helios import backend as backends
from helios.backend import PRECISIONS, Backend
from helios.errors import InputError
from helios.graph import Rate
from helios.model.room import RESERVE, encodes_first, keeps_encoder
from helios.model.text import Encoded, text_bytes
from helios.model.vae_precision import VAE_DTYPES, choose_vae_precision, vae_name
from helios.passes.quantize import held_bytes
from helios.pipeline import condition
from helios.pipeline.codec import Codec, decoding_of, free_memory, plan_of, split_of
from helios.pipeline.denoise import Denoiser, Layout
from helios.pipeline.history import CHUNK_LATENTS
from helios.pipeline.model import Model, folder_model, sized_model
from helios.pipeline.prompts import PromptState
from helios.pipeline.request import FPS, Request, Settings, build_request, frames_of_chunks, returned_frames
from helios.pipeline.run import Chunk, Progress, Run, noise_of
from helios.pipeline.state import RunState
from helios.precision import precision as precision_of
from helios.precision import require_offered
from helios.program import Coverage

__all__ = ["Chunk", "Pipeline", "Progress", "Result", "load"]

OnProgress = Callable[[Progress], None]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Result:
    """A finished video.

    Attributes:
        frames: ``[b, f, h, w, 3]`` uint8.
        latents: ``[b, 16, 9·chunks, h/8, w/8]`` float32.
        asked: the length in the caller's words, such as ``99 frames``.
        returned: what came of it, such as ``97 frames (3 chunks, 4.04 s)``.
        state: of the run after the last chunk.
        timings: of each chunk, see ``Chunk.timings``.
        warnings: of the request and all chunks.
        random_weights: the video means nothing.
    """

    frames: Tensor
    latents: Tensor
    asked: str
    returned: str
    state: RunState
    timings: tuple[Mapping[str, float], ...]
    warnings: tuple[str, ...]
    random_weights: bool
    fps: int = FPS


class Pipeline:
    """A model on a backend. Networks are lowered when the first request needs them, and again when its sizes change.

    Args:
        model: what to run.
        backend: to run it on.
        precision: of the transformer, a name of ``helios.precision.PRECISIONS``. The text encoder computes in its
            working dtype, with ``fp16`` in bfloat16.
        fallback: what happens to an op that the backend lacks, as for ``lower``.
        vae_precision: ``fp32``, ``bf16`` or ``fp16``, in which frames are decoded. Default: that of a continued state,
            else what the backend declares in ``vae_precisions``, else float32 as published (float64 with ``fp64``).
            Pictures are encoded in float32.

    Raises:
        InputError: the backend does not decode in that.
    """

    def __init__(
        self,
        model: Model,
        backend: Backend,
        precision: str,
        fallback: str = "error",
        vae_precision: str | None = None,
    ) -> None:
        self.model, self.backend, self.precision, self.fallback = model, backend, precision, fallback
        self.dtype = PRECISIONS[precision]
        # The published encoder overflows in float16, as its family does.
        text = torch.bfloat16 if self.dtype == torch.float16 else self.dtype
        self.text = model.text(text, backend.device)
        self.vae_precision = choose_vae_precision(vae_precision, precision, backend)
        self._vae_asked = vae_precision is not None
        self.codec = Codec(model.vae, model.vae_weights, backend, VAE_DTYPES[self.vae_precision], fallback)
        self._denoiser: Denoiser | None = None
        self._encoded: dict[tuple[str, int], Encoded] = {}

    @property
    def variant(self) -> str:
        """``base``, ``mid`` or ``distilled``."""
        return self.model.variant.name

    @property
    def random_weights(self) -> bool:
        """Whether the weights are random: what is made is noise and must be marked so."""
        return self.model.random_weights

    @property
    def evaluations(self) -> Mapping[Rate, int]:
        """How often each slower phase of the transformer ran so far."""
        return self._denoiser.program.evaluations if self._denoiser else {}

    @property
    def coverage(self) -> Coverage | None:
        """How the ops of the transformer's program run; None before the first request."""
        return self._denoiser.program.coverage if self._denoiser else None

    def request(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        state: RunState | None = None,
        **settings: Unpack[Settings],
    ) -> Request:
        """The checked request that ``stream`` would run with these arguments. Raises InputError."""
        given: dict[str, Any] = {**settings}
        if state is not None:
            prompt, given = _continued(prompt, given, state)
        model = self.model
        return build_request(
            prompt,
            given,
            variant=model.variant,
            scheduler=model.scheduler,
            transformer=model.transformer,
            vae=model.vae,
        )

    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        state: RunState | None = None,
        progress: OnProgress | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[Chunk]:
        """Make a video chunk by chunk.

        Args:
            prompt: one text, or one for each video of a batch.
            state: continue after that chunk of an earlier run. Settings that are not given are those of the state, the
                prompt too; with another prompt (or seed, steps …) the run branches off, and the prompt changes at once
                unless ``interpolation_steps`` says otherwise. Lengths count from the beginning of the video.
            progress: called after each solver step.
            settings: see ``Settings``.

        Returns:
            an iterator over chunks. What is wrong with the request is raised now, not at the first chunk.

        Raises:
            InputError: a setting makes no sense. StateError: the state is of another size.
        """
        request = self.request(prompt, state=state, **settings)
        return self._chunks(request, state, progress)

    def run(
        self, request: Request, state: RunState | None = None, progress: OnProgress | None = None
    ) -> Iterator[Chunk]:
        """``stream`` for a request that is made already."""
        return self._chunks(request, state, progress)

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        state: RunState | None = None,
        progress: OnProgress | None = None,
        **settings: Unpack[Settings],
    ) -> Result:
        """Make a whole video; the arguments are those of ``stream``. After a ``state``, the rest of the video.

        Raises:
            InputError: also for a video without end, or with nothing left to make.
        """
        request = self.request(prompt, state=state, **settings)
        if request.chunks is None:
            raise InputError("generate needs an end: new prompts may always arrive", "give chunks, or use stream")
        chunks = list(self._chunks(request, state, progress))
        if not chunks:
            raise InputError(f"the state is at chunk {request.chunks} of {request.chunks}: nothing is left to make")
        return self._result(request, chunks)

    def begin(self, request: Request) -> RunState:
        """The state before the first chunk: given frames encoded, random numbers at their beginning."""
        noise = noise_of(request)
        wide = torch.promote_types(self.dtype, torch.float32)
        history, anchor = condition.start(request, self.codec, noise, self.model.transformer.in_channels, wide)
        self.codec.release("encode")
        prompt = PromptState(request.texts)
        return RunState(0, history, anchor, noise.state(), prompt, request.settings(), self.plan(request))

    def plan(self, request: Request, state: RunState | None = None) -> dict[str, Any]:
        """How a request is executed, as JSON values.

        A state's own way to decode is kept, so that a resumed run gives the same bits where free memory has changed;
        so is its arithmetic unless another was asked for, and what its backend had chosen. Raises BackendError where
        that cannot be had here.
        """
        if state is not None:
            self.backend.use_execution_plan(state.plan.get("execution", {}))
        self._encode_first(request, state)
        denoiser = self.denoiser(
            request
        )  # before the VAE is cut: the VAE is given a share of what its weights leave free
        return {
            "backend": self.backend.label,
            **({"options": dict(self.backend.chosen)} if self.backend.chosen else {}),
            "precision": self.precision,
            "fallback": self.fallback,
            "model": self.model.identity,
            "graphs": denoiser.program.plan.digest[:16],
            "vae": self._decoding(request, state),
            "torch": torch.__version__,
            "execution": dict(self.backend.execution_plan()),
        }

    def _decoding(self, request: Request, state: RunState | None) -> dict[str, Any]:
        """How chunks are decoded, as ``plan_of`` writes it."""
        if state is not None and (kept := state.plan.get("vae")):
            dtype = decoding_of(kept, state.plan.get("precision", self.precision))
            if dtype == self.codec.dtype or not self._vae_asked:
                choose_vae_precision(vae_name(dtype), self.precision, self.backend)  # may be no dtype of this backend's
                return dict(kept)
        split = self.codec.choose(request.batch, CHUNK_LATENTS, request.height, request.width)
        return plan_of(split, self.codec.dtype)

    def denoiser(self, request: Request) -> Denoiser:
        """The transformer's program for a request; the one in use, if it fits."""
        model, factor = self.model, self.model.vae.scale_factor_spatial
        height, width = request.height // factor, request.width // factor
        layout = Layout(request.batch, height, width, request.tokens, request.window)
        if self._denoiser is None or self._denoiser.layout != layout:
            self._denoiser = None  # never two copies of the weights
            self._denoiser = Denoiser(
                model.transformer,
                model.scheduler,
                model.pipeline,
                layout,
                precision=precision_of(self.precision),
                backend=self.backend,
                weights=model.transformer_weights,
                fallback=self.fallback,
            )
        return self._denoiser

    @property
    def apart(self) -> bool:
        """Whether the text encoder and the transformer have no room at once, by what was free at the first request.

        Then what a request says is encoded first, and the transformer loaded when the encoder is gone; for new prompts
        it steps aside, or is loaded again where its program cannot. The same bits come of it.
        """
        return encodes_first(*self._room)

    @property
    def keeps_text(self) -> bool:
        """Whether the text encoder stays after a prompt, for the next one: there was plenty of room for both."""
        return keeps_encoder(*self._room)

    @functools.cached_property
    def _room(self) -> tuple[int, int, int]:
        """Bytes of the transformer, of the text encoder, and those that were free for them at the first request."""
        shapes = {name: info.shape for name, info in self.model.transformer_weights.tensors.items()}
        needed = held_bytes(shapes, precision_of(self.precision))
        return needed, text_bytes(self.text), int(free_memory(self.backend) * (1 - RESERVE))

    def _encode_first(self, request: Request, state: RunState | None) -> None:
        if not self.apart:
            return
        told = () if state is None else (*state.prompt.current, *state.prompt.previous)
        parts = () if request.script is None else tuple(text for text, _ in request.script.parts)
        texts = dict.fromkeys((*request.texts, *parts, *request.negatives, *(told if request.embeds is None else ())))
        wanted = [(text, request.tokens) for text in texts]
        known = {key: self._encoded[key] for key in wanted if key in self._encoded}
        if len(known) < len(wanted):
            if self._denoiser is not None and not self._denoiser.program.aside():
                self._denoiser = None
            with self.backend.explained("the text encoder"):
                known |= {key: self.text.encode(*key) for key in wanted if key not in known}
            self.text.release()
        self._encoded = known

    def release(self) -> None:
        """Free the transformer's program and its weights, and the text encoder; the next request loads them anew."""
        self._denoiser = None
        self.text.release()

    def _chunks(self, request: Request, state: RunState | None, progress: OnProgress | None) -> Iterator[Chunk]:
        plan = self.plan(request, state)
        state = state or self.begin(request)
        run = Run(
            request,
            denoiser=self.denoiser(request),
            codec=self.codec,
            text=self.text,
            keeps_text=self.keeps_text,
            encoded=self._encoded,
            transformer=self.model.transformer,
            scheduler=self.model.scheduler,
            split=split_of(plan["vae"]),
            decoding=decoding_of(plan["vae"], self.precision),
            plan=plan,
            progress=progress,
        )
        try:
            yield from run.chunks(state)
        finally:
            if not self.keeps_text:
                self.text.release()

    def _result(self, request: Request, chunks: list[Chunk]) -> Result:
        frames = torch.cat([chunk.frames for chunk in chunks], dim=1)
        cut = frames_of_chunks(chunks[-1].index + 1) - returned_frames(chunks[-1].index + 1)
        frames = frames[:, : frames.shape[1] - cut]
        count = frames.shape[1]
        return Result(
            frames=frames,
            latents=torch.cat([chunk.latents for chunk in chunks], dim=2),
            asked=request.asked,
            returned=f"{count} frames ({len(chunks)} chunks, {count / FPS:.2f} s)",
            state=chunks[-1].state,
            timings=tuple(chunk.timings for chunk in chunks),
            warnings=tuple(dict.fromkeys(warning for chunk in chunks for warning in chunk.warnings)),
            random_weights=self.random_weights,
        )


_TENSORS = ("kind", "given", "embeds", "negative_embeds", "latents")
"""Settings of which a state knows only what they were, not their values."""


def _continued(
    prompt: str | Sequence[str] | None, given: dict[str, Any], state: RunState
) -> tuple[str | Sequence[str] | None, dict[str, Any]]:
    """Prompt and settings, completed with those of the run that the state came from."""
    kept = {name: value for name, value in state.settings.items() if name not in _TENSORS}
    if not kept.get("negative_prompt"):
        kept.pop("negative_prompt", None)
    if prompt is not None or "prompts" in given:
        kept.pop("interpolation_steps", None)
    if given.get("negative_prompt_embeds") is not None:
        kept.pop("negative_prompt", None)
    embeds, schedule = given.get("prompt_embeds"), given.get("prompts")
    if prompt is None and embeds is None and not isinstance(schedule, list | tuple) and state.prompt.current:
        prompt = state.prompt.current
    dropped = {"image": None, "video": None}  # they are in the state's history
    return prompt, {**kept, **{k: v for k, v in given.items() if v is not None}, **dropped}


def load(
    path_or_repo: str | Path | None = None,
    *,
    size: str | None = None,
    variant: str | None = None,
    backend: str | Backend | None = None,
    precision: str | None = None,
    fallback: str = "error",
    seed_weights: int = 0,
    backend_options: Mapping[str, str] | None = None,
    vae_precision: str | None = None,
) -> Pipeline:
    """A pipeline, ready for requests; weights are read at the first one.

    Args:
        path_or_repo: a model folder in the published layout, or a hub repository ``owner/name``.
        size: instead of it ``tiny``, ``mini`` or ``14b``, with random weights: ``pipeline.random_weights`` says so.
        variant: ``base``, ``mid`` or ``distilled`` for a size; a folder knows its own.
        backend: ``name[:provider][:index]`` or an instance; default: ``HELIOS_BACKEND``, else the best that can run.
        precision: as for ``Pipeline``; default: the backend's first. Backends offer some of them.
        fallback: ``error`` or ``reference``, for ops that the backend lacks.
        seed_weights: of random weights.
        backend_options: of a backend given by name, such as ``{"memory": "low"}``; `helios backends` lists them.
        vae_precision: ``fp32``, ``bf16`` or ``fp16``, of decoding; see ``Pipeline``.

    Raises:
        InputError: neither or both of folder and size, an unknown name, or options for an instance.
        CheckpointError: the folder. BackendError.
    """
    if (path_or_repo is None) == (size is None):
        came = "neither a model nor a size" if size is None else "both a model and a size"
        raise InputError(f"{came} is given", "give a folder or repository, or a size for random weights")
    if isinstance(backend, Backend) and backend_options:
        raise InputError("backend_options are given for a backend that is made already", "give its name instead")
    chosen = backend if isinstance(backend, Backend) else backends.select(backend, backend_options)
    name = precision or chosen.precisions[0]
    require_offered(name, chosen.name, chosen.precisions, chosen.withheld)
    if path_or_repo is not None:
        model = folder_model(path_or_repo, variant)
    else:
        model = sized_model(cast(str, size), variant, seed_weights)
    return Pipeline(model, chosen, name, fallback, vae_precision)
