"""Solver steps over whole schedules, with drawn velocities in the network's place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from helios.graph import Graph
from helios.model import presets
from helios.model.config import SchedulerConfig
from helios.op import accumulator
from helios.pipeline.denoise import Layout, denoise_graphs
from helios.pipeline.history import Window
from helios.sampler import Schedule, Stage, build_schedule, guidance_coeffs, pyramid_tokens
from helios_conformance.draws import Root, normal
from helios_conformance.golden import Call, Calls, InPrecision
from helios_conformance.scenes.trajectory import Steps, solver_steps

__all__ = ["Sampler"]


@dataclasses.dataclass(frozen=True)
class Sampler(InPrecision):
    """All steps of one chunk without a network: noise down, guidance, steps, up into the next stage.

    Attributes:
        scheduler: whose coefficients; each solver has its own state.
        steps: of each stage.
        amplify: twice the steps (distilled only).
        zero_star: guidance by CFG-Zero* with its silent first steps, else plain; ``None``: no guidance.
        height, width: of the latents at full size.
        batch: videos.
    """

    scheduler: SchedulerConfig
    steps: tuple[int, ...]
    amplify: bool = False
    zero_star: bool | None = None
    height: int = 8
    width: int = 8
    batch: int = 1

    forced = True

    @property
    def layout(self) -> Layout:
        return Layout(self.batch, self.height, self.width, 2, Window())

    def graphs(self, dtype: torch.dtype) -> Mapping[str, Graph]:
        pipeline = dataclasses.replace(presets.variant("mid").pipeline, is_cfg_zero_star=bool(self.zero_star))
        tiny = presets.size("tiny").transformer
        made = denoise_graphs(tiny, self.scheduler, pipeline, self.layout, dtype)
        left_out = ("denoise",) if self.zero_star is not None else ("denoise", "guide")
        return {name: graph for name, graph in made.items() if not name.startswith(left_out)}

    def weights(self, dtype: torch.dtype) -> NoWeights:
        return NoWeights()

    def schedule(self) -> Schedule:
        tokens = pyramid_tokens(9, self.height, self.width, self.scheduler.stages)
        return build_schedule(self.scheduler, self.steps, tokens, amplify=self.amplify)

    def calls(self, root: Root, dtype: torch.dtype) -> Calls:
        draw = _Draws(root, dtype)
        schedule, last = self.schedule(), self.scheduler.stages - 1
        sample = draw.wide("noise", self.layout.latents(16))
        if last:
            sample = (yield Call("shrink", "shrink", {"noise": sample}))["sample"].to(draw.acc)
        for i, stage in enumerate(schedule.stages):
            if stage.renoise is not None:
                noise = draw.wide("block", (*sample.shape, 4), i)
                inputs = {"latents": sample, "noise": noise, "coeffs": draw.vector(stage.renoise)}
                sample = (yield Call(f"enter{i}", f"enter.{i}", inputs))["sample"].to(draw.acc)
            sample = yield from self._stage(i, stage, schedule.solver, sample, draw)

    def _stage(self, i: int, stage: Stage, solver: str, sample: Tensor, draw: _Draws) -> Steps:
        def velocity(step: int, sample: Tensor) -> Steps:
            drawn = draw.narrow("velocity", sample.shape, i, step)
            return drawn if self.zero_star is None else (yield from self._guided(i, step, drawn, draw))

        names = [f"s{i}.k{step}.step" for step in range(len(stage))]
        return solver_steps(solver, stage, f"step.{i}", names, sample, velocity)

    def _guided(self, i: int, step: int, cond: Tensor, draw: _Draws) -> Steps:
        uncond = 0.5 * cond.to(draw.acc) + draw.wide("uncond", cond.shape, i, step)
        coeffs = guidance_coeffs(5.0, stage=i, step=step, zero_init=bool(self.zero_star))
        inputs = {"cond": cond, "uncond": uncond.to(cond.dtype), "coeffs": draw.vector(coeffs)}
        out = yield Call(f"s{i}.k{step}.guide", f"guide.{i}", inputs)
        return out["velocity"].to(cond.dtype)


class _Draws:
    """Normals in the working dtype and in its accumulator."""

    def __init__(self, root: Root, dtype: torch.dtype) -> None:
        self.root, self.dtype, self.acc = root, dtype, accumulator(dtype)

    def wide(self, name: str, shape: tuple[int, ...], *where: int) -> Tensor:
        return normal(self.root.key("sampler", name, *where), shape, self.acc)

    def narrow(self, name: str, shape: tuple[int, ...], *where: int) -> Tensor:
        return normal(self.root.key("sampler", name, *where), shape, self.dtype)

    def vector(self, values: Any) -> Tensor:
        """Coefficients, rounded once to what the graph takes."""
        return torch.tensor(values, dtype=self.acc)


class NoWeights:
    """For programs that read none."""

    def read(self, name: str) -> Tensor:
        raise KeyError(name)
