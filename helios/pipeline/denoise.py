"""From noise to the latents of one chunk: the stages of the pyramid, the solver's steps and guidance, as one program.

The program has an entry for each thing that runs on the device: ``denoise.i`` (the transformer at stage i),
``guide.i``, ``step.i`` (the solver), ``shrink`` (noise down to the first stage) and ``enter.i`` (up into stage i). What
the steps compute with, timesteps and coefficients, comes from the schedule on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from helios.backend import Backend
from helios.graph import Builder, Graph, Rate, Value
from helios.lower import lower
from helios.model.config import PipelineConfig, SchedulerConfig, TransformerConfig
from helios.model.transformer import DenoiseShape, HistoryShape, denoise_graph
from helios.op import accumulator
from helios.ops.resample import downsample_noise, renoise_upsample
from helios.ops.sampler import cfg, cfg_zero_star, dmd_step, euler_step, unipc_step
from helios.passes import quantize
from helios.pipeline.history import CHUNK_LATENTS, Window
from helios.precision import Precision
from helios.program import Context, Program, WeightReader
from helios.sampler import Noise, Schedule, Stage, guidance_coeffs

__all__ = ["Denoiser", "Guidance", "Layout", "OnStep", "denoise_graphs"]

OnStep: TypeAlias = Callable[[int, int, int], None]
"""Called after each step with the stage, the steps done in this chunk, and the steps that it has."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """What the graphs of a run are static in; heights and widths in latent pixels at full size."""

    batch: int
    height: int
    width: int
    tokens: int
    window: Window

    def latents(self, channels: int, halvings: int = 0) -> tuple[int, int, int, int, int]:
        """Shape of a chunk's latents, that many times halved."""
        return (self.batch, channels, CHUNK_LATENTS, self.height >> halvings, self.width >> halvings)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Guidance:
    """The prompts of a chunk, bound, and how they guide.

    Attributes:
        prompt, negative: contexts; without ``negative`` there is no guidance.
        scale: of the guidance.
        zero_init, zero_steps: which first steps move by nothing; only CFG-Zero* does it.
    """

    prompt: Context
    negative: Context | None = None
    scale: float = 1.0
    zero_init: bool = False
    zero_steps: int = 1


def denoise_graphs(
    transformer: TransformerConfig,
    scheduler: SchedulerConfig,
    pipeline: PipelineConfig,
    layout: Layout,
    precision: Precision | torch.dtype,
) -> dict[str, Graph]:
    """All entries of the program, by name; in a dtype, nothing is quantised."""
    dtype = precision.dtype if isinstance(precision, Precision) else precision
    channels, last = transformer.in_channels, scheduler.stages - 1
    graphs: dict[str, Graph] = {}
    for i in range(scheduler.stages):
        shape = layout.latents(channels, last - i)
        size = DenoiseShape(
            shape[3],
            shape[4],
            layout.tokens,
            layout.window.indices,
            HistoryShape(layout.height, layout.width),
            layout.batch,
        )
        forward = denoise_graph(transformer, size, dtype=dtype, name=f"denoise.{i}")
        graphs[f"denoise.{i}"] = quantize(forward, precision)[0] if isinstance(precision, Precision) else forward
        graphs[f"guide.{i}"] = _guide_graph(f"guide.{i}", shape, dtype, pipeline.is_cfg_zero_star)
        graphs[f"step.{i}"] = _step_graph(f"step.{i}", shape, dtype, scheduler.solver)
        if i:
            graphs[f"enter.{i}"] = _enter_graph(f"enter.{i}", shape, accumulator(dtype), scheduler.gamma)
    if last:
        graphs["shrink"] = _shrink_graph(layout.latents(channels), accumulator(dtype), last)
    return graphs


def _guide_graph(name: str, shape: tuple[int, ...], dtype: torch.dtype, zero_star: bool) -> Graph:
    with Builder(name) as build:
        cond, uncond = (build.input(which, shape, dtype, Rate.STEP) for which in ("cond", "uncond"))
        coeffs = build.input("coeffs", (2,), accumulator(dtype), Rate.STEP)
        build.output("velocity", (cfg_zero_star if zero_star else cfg)(cond, uncond, coeffs))
    return build.graph()


STATES: Mapping[str, tuple[str, ...]] = {"dmd": ("start",), "unipc": ("last", "newer", "older"), "euler": ()}
"""What each solver's step takes beside the sample, the velocity and the coefficients."""

_COEFFS: Mapping[str, int] = {"dmd": 3, "unipc": 9, "euler": 1}


def _step_graph(name: str, shape: tuple[int, ...], dtype: torch.dtype, solver: str) -> Graph:
    wide = accumulator(dtype)
    with Builder(name) as build:
        sample = build.input("sample", shape, wide, Rate.STEP)
        velocity = build.input("velocity", shape, dtype, Rate.STEP)
        state = [build.input(which, shape, wide, Rate.STEP) for which in STATES[solver]]
        coeffs = build.input("coeffs", (_COEFFS[solver],), wide, Rate.STEP)
        if solver == "unipc":
            outputs: tuple[Value, ...] = unipc_step(sample, velocity, *state, coeffs)
        else:
            outputs = ((dmd_step if solver == "dmd" else euler_step)(sample, velocity, *state, coeffs),)
        for output, value in zip(("sample", "last", "newer"), outputs, strict=False):
            build.output(output, value)
    return build.graph()


def _enter_graph(name: str, shape: tuple[int, int, int, int, int], wide: torch.dtype, gamma: float) -> Graph:
    b, c, t, h, w = shape
    with Builder(name) as build:
        latents = build.input("latents", (b, c, t, h // 2, w // 2), wide, Rate.STEP)
        noise = build.input("noise", (b, c, t, h // 2, w // 2, 4), wide, Rate.STEP)
        coeffs = build.input("coeffs", (2,), wide, Rate.STEP)
        build.output("sample", renoise_upsample(latents, noise, coeffs, gamma=gamma))
    return build.graph()


def _shrink_graph(shape: tuple[int, ...], wide: torch.dtype, times: int) -> Graph:
    with Builder("shrink") as build:
        x = build.input("noise", shape, wide, Rate.STEP)
        for _ in range(times):
            x = downsample_noise(x)
        build.output("sample", x)
    return build.graph()


class Denoiser:
    """The lowered program of one layout, with the transformer's weights loaded.

    ``program.evaluations`` counts how often the prompt and the chunk phase ran.
    """

    def __init__(
        self,
        transformer: TransformerConfig,
        scheduler: SchedulerConfig,
        pipeline: PipelineConfig,
        layout: Layout,
        *,
        precision: Precision,
        backend: Backend,
        weights: WeightReader,
        fallback: str = "error",
    ) -> None:
        self.channels, self.layout, self.wide = transformer.in_channels, layout, accumulator(precision.dtype)
        self.stages = scheduler.stages
        graphs = denoise_graphs(transformer, scheduler, pipeline, layout, precision)
        self.program: Program = lower(graphs, backend, fallback=fallback)
        self.program.load(weights)

    def bind_prompt(self, embeds: Tensor) -> Context:
        """The context of embeddings ``[b, tokens, text_dim]``: text keys and values of all layers."""
        return self.program.bind({"text": embeds})

    def bind_history(self, history: Tensor, anchor: Tensor | None) -> Context:
        """The context of the past: history tokens. See ``Window.inputs``."""
        return self.program.bind(self.layout.window.inputs(history, anchor))

    def chunk(
        self,
        index: int,
        schedule: Schedule,
        noise: Noise,
        guidance: Guidance,
        history: Context,
        given: Tensor | None = None,
        on_step: OnStep = lambda stage, done, steps: None,
    ) -> Tensor:
        """Denoise one chunk.

        Args:
            index: of the chunk, for the draws.
            schedule: its steps.
            noise: where draws come from.
            guidance: prompt contexts.
            history: context of the past.
            given: noise ``[b, c, 9, h, w]`` to start from instead of drawn.
            on_step: called after each step.

        Returns:
            latents ``[b, c, 9, h, w]`` in the accumulator dtype, on the device.
        """
        sample = noise.latents(index, self.layout.latents(self.channels)) if given is None else given
        if self.stages > 1:
            sample = self.program.run("shrink", {"noise": sample})["sample"]
        done = 0
        for i, stage in enumerate(schedule.stages):
            if i:
                sample = self._enter(i, stage, sample, noise, index)
            steps = _Steps(self, i, stage, schedule.solver, guidance, history, sample)
            for _ in steps:
                done += 1
                on_step(i, done, len(schedule))
            sample = steps.sample
        return sample

    def _enter(self, i: int, stage: Stage, latents: Tensor, noise: Noise, chunk: int) -> Tensor:
        assert stage.renoise is not None
        shape = (*self.layout.latents(self.channels, self.stages - i), 4)
        inputs = {"latents": latents, "noise": noise.block(chunk, i, shape), "coeffs": torch.tensor(stage.renoise)}
        return self.program.run(f"enter.{i}", inputs)["sample"]


class _Steps:
    """The steps of one stage, an iterator over the samples; solvers start anew at each stage."""

    def __init__(
        self,
        owner: Denoiser,
        index: int,
        stage: Stage,
        solver: str,
        guidance: Guidance,
        history: Context,
        sample: Tensor,
    ) -> None:
        self.run, self.layout, self.wide = owner.program.run, owner.layout, owner.wide
        self.index, self.stage, self.guidance = index, stage, guidance
        self.prompt = guidance.prompt | history
        self.negative = None if guidance.negative is None else guidance.negative | history
        self.sample = sample
        fresh = sample if solver == "dmd" else torch.zeros_like(sample)
        self.state = dict.fromkeys(STATES[solver], fresh)
        self.step = 0

    def __iter__(self) -> _Steps:
        return self

    def __next__(self) -> Tensor:
        if self.step == len(self.stage):
            raise StopIteration
        coeffs = torch.tensor(self.stage.coeffs(self.step))
        inputs = {"sample": self.sample, "velocity": self._velocity(), "coeffs": coeffs, **self.state}
        out = self.run(f"step.{self.index}", inputs)
        if "last" in out:  # UniPC: the newest end point becomes the older one
            self.state = {"last": out["last"], "newer": out["newer"], "older": self.state["newer"]}
        self.sample = out["sample"]
        self.step += 1
        return self.sample

    def _velocity(self) -> Tensor:
        fed = float(self.stage.model_timesteps[self.step])
        inputs = {"sample": self.sample, "timestep": torch.full((self.layout.batch,), fed, dtype=self.wide)}
        cond = self.run(f"denoise.{self.index}", inputs, self.prompt)["velocity"]
        if self.negative is None:
            return cond
        uncond = self.run(f"denoise.{self.index}", inputs, self.negative)["velocity"]
        how = self.guidance
        coeffs = guidance_coeffs(
            how.scale, stage=self.index, step=self.step, zero_init=how.zero_init, zero_steps=how.zero_steps
        )
        inputs = {"cond": cond, "uncond": uncond, "coeffs": torch.tensor(coeffs)}
        return self.run(f"guide.{self.index}", inputs)["velocity"]
