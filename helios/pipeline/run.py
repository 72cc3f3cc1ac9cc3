"""The chunks of a run: each is a pure function of the weights, the request and the state before it."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from helios.backend import Backend
from helios.errors import StateError
from helios.model.config import SchedulerConfig, TransformerConfig
from helios.model.text import Encoded, TextEncoder
from helios.model.vae_split import Split
from helios.pipeline.codec import Codec, host_frames
from helios.pipeline.denoise import Denoiser, Guidance
from helios.pipeline.history import CHUNK_LATENTS
from helios.pipeline.prompts import PromptState
from helios.pipeline.request import Request
from helios.pipeline.state import RunState
from helios.program import Context
from helios.sampler import AheadNoise, CounterNoise, DiffusersNoise, Noise, Schedule, build_schedule, pyramid_tokens

__all__ = ["Chunk", "Progress", "Run", "noise_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """Told after each solver step: chunk (and chunks, None without end), stage, steps done and to do in the chunk, and
    seconds since the chunk began."""

    chunk: int
    chunks: int | None
    stage: int
    step: int
    steps: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """33 finished frames.

    Attributes:
        index: of the chunk in the video.
        latents: ``[b, 16, 9, h/8, w/8]`` float32 (float64 in fp64), host.
        frames: ``[b, 33, h, w, 3]`` uint8, host.
        state: of the run after this chunk; whatever continues from it does not see later chunks.
        timings: seconds of ``text``, ``history``, ``denoise``, ``decode`` and ``total``.
        warnings: what the caller should know, such as the end of a prompt that did not fit.
    """

    index: int
    latents: Tensor
    frames: Tensor
    state: RunState
    timings: Mapping[str, float]
    warnings: tuple[str, ...] = ()


def noise_of(request: Request) -> Noise:
    """The source of draws that a request names, at its beginning."""
    if request.rng == "helios":
        return CounterNoise(request.seed)
    generator = torch.Generator()
    # torch takes seeds of 64 bits with a sign or without; the same bits are the same seed
    return DiffusersNoise(generator.manual_seed(request.seed))


class _Laps:
    """Seconds of each part, by the backend's marks."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.begin = time.perf_counter()
        self._marks = [("begin", backend.mark())]

    def lap(self, name: str) -> None:
        """The part of that name ends with what is queued so far."""
        self._marks.append((name, self.backend.mark()))

    def seconds(self) -> dict[str, float]:
        """Of each part, and ``total``; waits for the last."""
        between = self.backend.seconds_between
        parts = {name: between(start, end) for (_, start), (name, end) in itertools.pairwise(self._marks)}
        return {**parts, "total": between(self._marks[0][1], self._marks[-1][1])}


@dataclasses.dataclass(slots=True, eq=False)
class _Begun:
    """A chunk on its way. Its tensors stay until its frames are on the host: a queue beside reads them when it may.

    Attributes:
        before: the state that it follows.
        prompt, rng: of the state after it.
        latents: on the device.
        video: on the device, once decoding is queued.
        host, after: its latents on the host, and the state after it, once they are asked for.
    """

    before: RunState
    prompt: PromptState
    rng: Tensor
    latents: Tensor
    laps: _Laps
    warnings: tuple[str, ...]
    video: Tensor | None = None
    host: Tensor | None = None
    after: RunState | None = None


class Run:
    """Makes chunks of one request. Holds bound prompts and nothing that a chunk could change.

    Args:
        request: what is asked for.
        denoiser, codec, text: the networks.
        transformer, scheduler: configs.
        split, decoding: how frames are decoded, and in which dtype.
        plan: of the execution, kept in each state.
        progress: told after each step.
        keeps_text: the text encoder stays when the prompts are encoded.
        encoded: texts that need no encoder any more, with their number of tokens.
    """

    def __init__(
        self,
        request: Request,
        *,
        denoiser: Denoiser,
        codec: Codec,
        text: TextEncoder,
        transformer: TransformerConfig,
        scheduler: SchedulerConfig,
        split: Split,
        decoding: torch.dtype,
        plan: Mapping[str, Any],
        progress: Callable[[Progress], None] | None = None,
        keeps_text: bool = False,
        encoded: Mapping[tuple[str, int], Encoded] = MappingProxyType({}),
    ) -> None:
        self.request, self.denoiser, self.codec, self.text = request, denoiser, codec, text
        self.transformer, self.scheduler = transformer, scheduler
        self.split, self.decoding = split, decoding
        self.plan, self.progress = plan, progress
        self.keeps_text, self.encoded = keeps_text, encoded
        self._noise = AheadNoise(request.seed) if request.rng == "helios" else None
        self._embeddings: dict[str, Tensor] = {}
        self._negative: Context | None = None
        self._prompt: tuple[Any, Context] | None = None
        self._warnings: list[str] = list(request.warnings)

    def chunks(self, state: RunState) -> Iterator[Chunk]:
        """The chunks after a state, to the end of the request.

        Where the backend has a queue beside, a chunk is decoded there while the next one is denoised, and handed out
        when that has been begun. Not the first one, which somebody waits for; and none where prompts arrive meanwhile,
        since the next chunk would not have seen what its prompt was chosen by.

        Raises:
            StateError: the state is of another size or kind of random numbers than the request.
        """
        script, first = self.request.script, state.chunk
        ahead = self.codec.backend.overlaps and (script is None or script.ask is None)
        waiting: list[_Begun] = []
        for index in self._indices(first):
            try:
                begun = self._begin(state)
            except BaseException:  # Ctrl-C as well: what is made is handed out first
                yield from self._finished(waiting)
                raise
            yield from self._finished(waiting)
            self._decode(begun)
            if ahead and index > first:
                waiting.append(begun)
                state = self._after(begun)
            else:
                chunk = self._finish(begun)
                state = chunk.state
                yield chunk
        yield from self._finished(waiting)

    def _indices(self, first: int) -> Iterator[int]:
        count = self.request.chunks
        return itertools.count(first) if count is None else iter(range(first, count))

    def _begin(self, state: RunState) -> _Begun:
        """Queue the next chunk after a state up to its latents."""
        self._require_fit(state)
        laps = _Laps(self.codec.backend)
        noise = self._noise or noise_of(self.request)
        noise.restore(state.rng)
        prompt = self._prompt_state(state)
        guidance = self._guidance(prompt, state.chunk)
        laps.lap("text")
        history = self.denoiser.bind_history(state.history, state.anchor)
        laps.lap("history")
        latents = self.denoiser.chunk(
            state.chunk,
            self._schedule(state.chunk),
            noise,
            guidance,
            history,
            self._given(state.chunk),
            self._on_step(state.chunk, laps),
        )
        laps.lap("denoise")
        warnings, self._warnings = tuple(self._warnings), []
        return _Begun(state, prompt, noise.state(), latents, laps, warnings)

    def _decode(self, begun: _Begun) -> None:
        """Queue its decoding."""
        with self.codec.backend.beside(begun.latents):
            begun.video = self.codec.decode(begun.latents, self.split, self.decoding)
        self._draw_ahead(begun.before.chunk + 1)

    def _finish(self, begun: _Begun) -> Chunk:
        """Wait for it."""
        backend, video = self.codec.backend, begun.video
        assert video is not None
        with backend.beside():
            frames = host_frames(backend, video)
            state = self._after(begun)
            begun.laps.lap("decode")
        assert begun.host is not None
        return Chunk(begun.before.chunk, begun.host, frames, state, begun.laps.seconds(), begun.warnings)

    def _finished(self, waiting: list[_Begun]) -> Iterator[Chunk]:
        while waiting:
            yield self._finish(waiting.pop(0))

    def _draw_ahead(self, chunk: int) -> None:
        """Draw for the next chunk while the device decodes this one; where the host decodes, nothing is won."""
        more = self.request.chunks is None or chunk < self.request.chunks
        if more and self._noise is not None and self.codec.backend.device.type != "cpu":
            self._noise.draw(chunk)

    def _require_fit(self, state: RunState) -> None:
        layout = self.denoiser.layout
        wanted = [*layout.latents(self.denoiser.channels)]
        wanted[2] = layout.window.length
        if list(state.history.shape) != wanted:
            raise StateError(
                f"the state's history is {list(state.history.shape)}, this run needs {wanted}",
                "continue with the height, width, batch and history of the run that it came from",
            )

    def _prompt_state(self, state: RunState) -> PromptState:
        request, prompt = self.request, state.prompt
        if request.embeds is not None:
            return PromptState()
        if request.script is None:
            return prompt.change(request.texts, state.chunk)
        wanted = request.script.wanted(state.chunk)
        return prompt if wanted is None else prompt.change((wanted,), state.chunk)

    def _guidance(self, prompt: PromptState, chunk: int) -> Guidance:
        request = self.request
        weight = prompt.weight(chunk, request.interpolation_steps or 0)
        key = (prompt.current, prompt.previous if weight < 1.0 else (), weight)
        if self._prompt is None or self._prompt[0] != key:
            self._prompt = None  # free the old text keys and values before the new ones are made
            self._prompt = key, self._bind(self._mixed(prompt, weight))
        if request.guided and self._negative is None:
            embeds = request.negative_embeds
            self._negative = self._bind(self._embeds(request.negatives) if embeds is None else embeds)
        more = request.script is not None and request.script.ask is not None and not self.encoded
        if not (self.keeps_text or more):
            self.text.release()
        return Guidance(self._prompt[1], self._negative, request.guidance, request.zero_init, request.zero_steps)

    def _mixed(self, prompt: PromptState, weight: float) -> Tensor:
        if self.request.embeds is not None:
            return self.request.embeds
        new = self._embeds(prompt.current)
        return new if weight == 1.0 else torch.lerp(self._embeds(prompt.previous), new, weight)

    def _embeds(self, texts: tuple[str, ...]) -> Tensor:
        for text in texts:
            if text not in self._embeddings:
                encoded = self.encoded.get((text, self.request.tokens)) or self._encode(text)
                self._embeddings[text] = encoded.embedding
                if encoded.cut:
                    kept = f"the prompt is longer than {self.request.tokens} tokens"
                    self._warnings.append(f"{kept}; what the model does not see: {encoded.cut!r}")
        return torch.stack([self._embeddings[text] for text in texts])

    def _encode(self, text: str) -> Encoded:
        if self.encoded:  # there is no room for both: this one came while the run was under way
            self.denoiser.program.aside()
        with self.codec.backend.explained("the text encoder"):
            return self.text.encode(text, self.request.tokens)

    def _bind(self, embeds: Tensor) -> Context:
        return self.denoiser.bind_prompt(embeds.repeat_interleave(self.request.videos_per_prompt, dim=0))

    def _schedule(self, chunk: int) -> Schedule:
        layout = self.denoiser.layout
        tokens = pyramid_tokens(
            CHUNK_LATENTS, layout.height, layout.width, self.scheduler.stages, self.transformer.patch_size
        )
        return build_schedule(
            self.scheduler,
            self.request.steps,
            tokens,
            amplify=self.request.amplify and chunk == 0,
            shift_from=self.request.shift_from,
            sigmas=self.request.sigmas,
        )

    def _given(self, chunk: int) -> Tensor | None:
        begin = chunk * CHUNK_LATENTS
        given = self.request.latents
        return None if given is None or begin >= given.shape[2] else given[:, :, begin : begin + CHUNK_LATENTS]

    def _on_step(self, chunk: int, laps: _Laps) -> Callable[[int, int, int], None]:
        def tell(stage: int, step: int, steps: int) -> None:
            if self.progress is not None:
                seconds = time.perf_counter() - laps.begin
                self.progress(Progress(chunk, self.request.chunks, stage, step, steps, seconds))

        return tell

    def _after(self, begun: _Begun) -> RunState:
        """The state after a chunk; waits for its latents."""
        if begun.after is None:
            begun.host = self.codec.backend.fetch(begun.latents)
            begun.after = self._state_after(begun, begun.host)
        return begun.after

    def _state_after(self, begun: _Begun, latents: Tensor) -> RunState:
        request, window, state = self.request, self.request.window, begun.before
        first = state.chunk == 0 and state.anchor is None
        takes = window.keep_first_frame and (first or (request.skip_first_chunk and state.chunk == 1))
        origin = {name: state.settings[name] for name in ("kind", "given") if name in state.settings}
        return RunState(
            chunk=state.chunk + 1,
            history=window.extend(state.history, latents),
            anchor=latents[:, :, :1].clone() if takes else state.anchor,
            rng=begun.rng,
            prompt=begun.prompt,
            settings=request.settings() | origin,
            # What the autoencoder's program made the backend choose is known only now.
            plan={**self.plan, "execution": dict(self.denoiser.program.backend.execution_plan())},
        )
