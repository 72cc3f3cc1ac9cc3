"""Chunks of a video, step by step along the oracle's own trajectory: forwards, guidance, solver, pyramid, history."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from helios.graph import Graph
from helios.model import presets
from helios.model.config import TransformerConfig
from helios.model.shapes import transformer_shapes
from helios.op import accumulator
from helios.pipeline.denoise import STATES, Layout, denoise_graphs
from helios.pipeline.history import Window
from helios.sampler import Schedule, Stage, build_schedule, guidance_coeffs, pyramid_tokens
from helios_conformance.draws import Root, normal
from helios_conformance.golden import Call, Calls, InPrecision, Tensors
from helios_conformance.scenes.forward import text_of
from helios_conformance.scenes.weights import LoudWeights

__all__ = ["Steps", "Trajectory", "solver_steps"]

Steps: TypeAlias = Generator[Call, Tensors, Tensor]
"""Calls that end with a tensor."""


def solver_steps(
    solver: str,
    stage: Stage,
    entry: str,
    names: Sequence[str],
    sample: Tensor,
    velocity: Callable[[int, Tensor], Steps],
) -> Steps:
    """All steps of a stage; ends with the sample after the last.

    Args:
        solver: ``euler``, ``unipc`` or ``dmd``.
        stage: whose coefficients.
        entry: the graph of one step.
        names: of the steps' calls.
        sample: before the first step, in the accumulator's dtype, as coefficients and states are.
        velocity: the calls that end with a step's velocity, given the step and the sample.
    """
    wide = sample.dtype
    state = dict.fromkeys(STATES[solver], sample if solver == "dmd" else torch.zeros_like(sample))
    for step, name in enumerate(names):
        fed = yield from velocity(step, sample)
        coeffs = torch.tensor(stage.coeffs(step), dtype=wide)
        out = yield Call(name, entry, {"sample": sample, "velocity": fed, "coeffs": coeffs, **state})
        if solver == "unipc":
            newest = {key: out[key].to(wide) for key in ("last", "newer")}
            state = {**newest, "older": state["newer"]}
        sample = out["sample"].to(wide)
    return sample


@dataclasses.dataclass(frozen=True)
class Trajectory(InPrecision):
    """Chunks of one variant. Each call starts from where the oracle arrived, rounded to what the graph takes.

    Attributes:
        label: keys the draws.
        config: of the network.
        variant: ``base``, ``mid`` or ``distilled``.
        height, width: of the latents at full size.
        steps: of each stage.
        chunks: of the video; the history of each is made of the oracle's latents before it.
        amplify: twice the steps in the first chunk (distilled only).
        tokens: of the prompt.
        batch: videos.
    """

    label: str
    config: TransformerConfig
    variant: str
    height: int
    width: int
    steps: tuple[int, ...]
    chunks: int = 1
    amplify: bool = False
    tokens: int = 16
    batch: int = 1

    forced = True

    @property
    def layout(self) -> Layout:
        return Layout(self.batch, self.height, self.width, self.tokens, Window())

    def graphs(self, dtype: torch.dtype) -> Mapping[str, Graph]:
        variant = presets.variant(self.variant)
        made = denoise_graphs(self.config, variant.scheduler, variant.pipeline, self.layout, dtype)
        guided = self.guidance > 1.0
        return {name: graph for name, graph in made.items() if guided or not name.startswith("guide")}

    @property
    def guidance(self) -> float:
        return presets.variant(self.variant).guidance

    def weights(self, dtype: torch.dtype) -> LoudWeights:
        return LoudWeights(transformer_shapes(self.config), f"{self.label} weights", dtype)

    def schedule(self, chunk: int) -> Schedule:
        scheduler = presets.variant(self.variant).scheduler
        tokens = pyramid_tokens(9, self.height, self.width, scheduler.stages, self.config.patch_size)
        return build_schedule(scheduler, self.steps, tokens, amplify=self.amplify and chunk == 0)

    def calls(self, root: Root, dtype: torch.dtype) -> Calls:
        wide = accumulator(dtype)
        window, latents = self.layout.window, self.layout.latents(self.config.in_channels)
        history, anchor = window.start(torch.zeros(1, *latents[1:], dtype=wide), self.batch), None
        for chunk in range(self.chunks):
            run = _Chunk(self, root, dtype, chunk, window.inputs(history.to(dtype), anchor))
            made = (yield from run.calls()).to(wide)
            history = window.extend(history, made)
            anchor = made[:, :, :1].to(dtype) if anchor is None else anchor


class _Chunk:
    """The calls of one chunk."""

    def __init__(self, scene: Trajectory, root: Root, dtype: torch.dtype, chunk: int, past: Tensors) -> None:
        self.scene, self.root, self.dtype, self.wide, self.index = scene, root, dtype, accumulator(dtype), chunk
        self.schedule = scene.schedule(chunk)
        self.past = {f"history{chunk}": past}
        self.stages = len(self.schedule.stages)

    def draw(self, name: str, shape: tuple[int, ...], *where: int) -> Tensor:
        return normal(self.root.key(self.scene.label, name, self.index, *where), shape, self.wide)

    def calls(self) -> Steps:
        scene = self.scene
        full = scene.layout.latents(scene.config.in_channels)
        sample = self.draw("noise", full)
        if self.stages > 1:
            out = yield Call(f"c{self.index}.shrink", "shrink", {"noise": sample})
            sample = out["sample"].to(self.wide)
        for i, stage in enumerate(self.schedule.stages):
            if i:
                sample = yield from self.enter(i, stage, sample)
            sample = yield from self.stage(i, stage, sample)
        return sample

    def enter(self, i: int, stage: Stage, latents: Tensor) -> Steps:
        assert stage.renoise is not None
        noise = self.draw("block", (*latents.shape, 4), i)
        inputs = {"latents": latents, "noise": noise, "coeffs": torch.tensor(stage.renoise, dtype=self.wide)}
        return (yield Call(f"c{self.index}.enter{i}", f"enter.{i}", inputs))["sample"].to(self.wide)

    def stage(self, i: int, stage: Stage, sample: Tensor) -> Steps:
        def velocity(step: int, sample: Tensor) -> Steps:
            return self.velocity(i, stage, step, sample)

        names = [self.name(i, step, "step") for step in range(len(stage))]
        return solver_steps(self.schedule.solver, stage, f"step.{i}", names, sample, velocity)

    def velocity(self, i: int, stage: Stage, step: int, sample: Tensor) -> Steps:
        fed = float(stage.model_timesteps[step])
        time = torch.full((self.scene.batch,), fed, dtype=self.wide)
        inputs = {"sample": sample.to(self.dtype), "timestep": time}
        cond = yield Call(self.name(i, step, "cond"), f"denoise.{i}", inputs, self.bound("prompt"))
        if self.scene.guidance <= 1.0:
            return cond["velocity"].to(self.dtype)
        uncond = yield Call(self.name(i, step, "uncond"), f"denoise.{i}", inputs, self.bound("negative"))
        both = {"cond": cond["velocity"].to(self.dtype), "uncond": uncond["velocity"].to(self.dtype)}
        coeffs = guidance_coeffs(self.scene.guidance, stage=i, step=step)
        guided = yield Call(
            self.name(i, step, "guide"), f"guide.{i}", {**both, "coeffs": torch.tensor(coeffs, dtype=self.wide)}
        )
        return guided["velocity"].to(self.dtype)

    def name(self, stage: int, step: int, what: str) -> str:
        return f"c{self.index}.s{stage}.k{step}.{what}"

    def bound(self, prompt: str) -> dict[str, Tensors]:
        scene = self.scene
        size = (scene.batch, scene.tokens, scene.config.text_dim)
        return {prompt: {"text": text_of(self.root, scene.label, prompt, size, self.dtype)}, **self.past}
