"""Schedules, steps and random draws against the published samplers as diffusers runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import HeliosDMDScheduler, HeliosPyramidPipeline, HeliosScheduler
from diffusers.pipelines.helios.pipeline_helios_pyramid import calculate_shift as published_shift
from diffusers.pipelines.helios.pipeline_helios_pyramid import optimized_scale
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helios.model.config import SchedulerConfig
from helios.ops.resample import block_factor, block_noise, downsample_noise, renoise_upsample, upsample_nearest2
from helios.ops.sampler import cfg, cfg_zero_star, dmd_step, euler_step
from helios.sampler import (
    CounterNoise,
    DiffusersNoise,
    Stage,
    UniPCState,
    build_schedule,
    calculate_shift,
    guidance_coeffs,
    pyramid_tokens,
)
from helios.sampler.schedule import stage_tables

# diffusers hands torch scalars to numpy.linspace; torch's side of that protocol is behind numpy's.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")

SHAPE = (2, 4, 3, 4, 6)
TOKENS = pyramid_tokens(9, 48, 80, 3)
ONCE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
SOLVERS = {"dmd": HeliosDMDScheduler, "unipc": HeliosScheduler, "euler": HeliosScheduler}


def config_of(solver: str, **fields: Any) -> SchedulerConfig:
    if solver == "dmd":
        return SchedulerConfig(class_name="HeliosDMDScheduler", **{"time_shift_type": "linear"} | fields)
    return SchedulerConfig(scheduler_type=solver, **fields)


def published(config: SchedulerConfig) -> Any:
    """The diffusers scheduler of the same configuration."""
    fields = config.to_dict()
    cls = SOLVERS[config.solver]
    return cls.from_config({k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()})


def close(actual: Tensor, wanted: Tensor, bound: float) -> None:
    """Relative error in the norm at most ``bound``, same shape and dtype."""
    assert actual.shape == wanted.shape
    assert actual.dtype == wanted.dtype
    error = (actual.double() - wanted.double()).norm() / wanted.double().norm()
    assert error <= bound, f"relative error {error:.3g}, wanted at most {bound:.3g}"


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def vector(values: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(values)).to(dtype)


def test_close_can_fail() -> None:
    x = draw(3, 4, seed=0)
    with pytest.raises(AssertionError, match="relative error"):
        close(x * (1 + 3e-6), x, 1e-6)


# --- tables ---------------------------------------------------------------------------------------------------------


def published_stage(config: SchedulerConfig, i: int, steps: int, tokens: int, amplify: bool) -> Any:
    """The scheduler after the call that the pipelines make on entering stage i."""
    scheduler = published(config)
    mu = published_shift(tokens) if config.use_dynamic_shifting else None
    if config.stages > 1:
        scheduler.set_timesteps(steps, i, mu=mu, is_amplify_first_chunk=amplify)
        return scheduler
    points = (2 * steps if amplify else steps) + 1 if config.solver == "dmd" else steps
    scheduler.set_timesteps(steps, mu=mu, sigmas=np.linspace(0.999, 0.0, points + 1)[:-1])
    return scheduler


def same_tables(stage: Stage, scheduler: Any, single: bool) -> None:
    np.testing.assert_array_equal(stage.timesteps, scheduler.timesteps.numpy())
    np.testing.assert_array_equal(stage.sigmas, scheduler.sigmas.numpy())
    fed = scheduler.timesteps if single else scheduler.timesteps.to(torch.int64)
    np.testing.assert_array_equal(stage.model_timesteps, fed.numpy())
    assert stage.model_timesteps.dtype == fed.numpy().dtype


@settings(max_examples=120, deadline=None)
@given(
    solver=st.sampled_from(["dmd", "unipc", "euler"]),
    cuts=st.lists(st.integers(1, 999), max_size=3, unique=True),
    steps=st.lists(st.integers(1, 50), min_size=4, max_size=4),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 12)),
    dynamic=st.booleans(),
    kind=st.sampled_from(["exponential", "linear"]),
    shift=st.floats(0.5, 8.0),
    gamma=st.floats(0.05, 1 / 3),
    amplify=st.booleans(),
)
def test_tables_equal_in_float64(
    solver: str,
    cuts: list[int],
    steps: list[int],
    sizes: tuple[int, int, int],
    dynamic: bool,
    kind: str,
    shift: float,
    gamma: float,
    amplify: bool,
) -> None:
    """Bit for bit: every timestep and noise level, and the integers that the model is given."""
    stages = len(cuts) + 1
    # A static shift of Base acts only on our own default levels; see test_sampler_schedule.py.
    static = 1.0 if dynamic or stages == 1 else shift
    config = config_of(
        solver,
        stages=stages,
        stage_range=(0.0, *(c / 1000 for c in sorted(cuts)), 1.0),
        gamma=gamma,
        shift=static,
        use_dynamic_shifting=dynamic,
        time_shift_type=kind,
    )
    scale = 2 ** (stages - 1)
    tokens = pyramid_tokens(sizes[0], 2 * sizes[1] * scale, 2 * sizes[2] * scale, stages)
    schedule = build_schedule(config, steps[:stages], tokens, amplify=amplify)
    for i, stage in enumerate(schedule.stages):
        scheduler = published_stage(config, i, steps[i], tokens[max(i - 1, 0)], amplify)
        same_tables(stage, scheduler, stages == 1)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 999), min_size=1, max_size=4, unique=True),
    gamma=st.floats(0.05, 1 / 3),
    shift=st.floats(0.5, 8.0),
)
def test_stage_tables_equal_in_float64(cuts: list[int], gamma: float, shift: float) -> None:
    ranges = (0.0, *(c / 1000 for c in sorted(cuts)), 1.0)
    config = config_of("unipc", stages=len(cuts) + 1, stage_range=ranges, gamma=gamma, shift=shift)
    scheduler = published(config)
    for i, table in enumerate(stage_tables(config)):
        np.testing.assert_array_equal(table.timesteps, scheduler.timesteps_per_stage[i].numpy())
        np.testing.assert_array_equal(table.sigmas, scheduler.sigmas_per_stage[i].numpy())
        assert table.plain_start == scheduler.ori_start_sigmas[i]
        assert table.end == scheduler.end_sigmas[i]
        assert table.start == pytest.approx(scheduler.start_sigmas[i], rel=1e-14)


@given(st.integers(1, 200_000))
def test_shift_of_the_sequence_length(tokens: int) -> None:
    assert calculate_shift(tokens) == published_shift(tokens)


# --- steps ----------------------------------------------------------------------------------------------------------


def schedule_of(solver: str, steps: list[int], amplify: bool = False, **fields: Any) -> Any:
    stages = len(steps)
    ranges = (0.0, 1 / 3, 2 / 3, 1.0) if stages == 3 else (0.0, 1.0)
    config = config_of(solver, stages=stages, stage_range=ranges, use_dynamic_shifting=True, **fields)
    tokens = TOKENS if stages == 3 else TOKENS[-1:]
    return config, tokens, build_schedule(config, steps, tokens, amplify=amplify)


@ONCE
@pytest.mark.parametrize(
    ("steps", "amplify"), [([1, 1, 1], False), ([2, 2, 2], True), ([3, 7, 20], False), ([300] * 3, False)]
)
def test_dmd_steps(steps: list[int], amplify: bool, dtype: torch.dtype) -> None:
    """Each step from the same sample. 300 steps a stage lie less than 1 apart, where the published lookup errs."""
    config, tokens, schedule = schedule_of("dmd", steps, amplify)
    for i, stage in enumerate(schedule.stages):
        scheduler = published_stage(config, i, steps[i], tokens[max(i - 1, 0)], amplify)
        start = sample = draw(*SHAPE, seed=i, dtype=dtype)
        checked = range(len(stage)) if len(stage) < 50 else [0, 1, 2, 150, len(stage) - 2, len(stage) - 1]
        for k in checked:
            velocity = draw(*SHAPE, seed=100 + k, dtype=dtype)
            (wanted,) = scheduler.step(
                velocity,
                scheduler.timesteps[k],
                sample,
                return_dict=False,
                cur_sampling_step=k,
                dmd_noisy_tensor=start,
                dmd_sigmas=scheduler.sigmas,
                dmd_timesteps=scheduler.timesteps,
                all_timesteps=scheduler.timesteps,
            )
            actual = dmd_step(sample, velocity, start, vector(stage.coeffs(k), dtype))
            close(actual, wanted, 1e-6 if dtype == torch.float32 else 1e-14)
            sample = wanted


def test_dmd_lookup_differs_from_the_own_level_when_steps_lie_close() -> None:
    """The case above is one where the truncated lookup matters."""
    _, _, schedule = schedule_of("dmd", [300] * 3)
    assert any((stage.table[:, 0] != stage.sigmas[:-1]).any() for stage in schedule.stages)


UNIPC = [([50], 2), ([1], 2), ([2], 2), ([20, 20, 20], 2), ([3, 2, 1], 2), ([5, 5, 5], 1)]


@pytest.mark.parametrize(("steps", "order"), UNIPC)
def test_unipc_steps_in_float32(steps: list[int], order: int) -> None:
    """Each step from the same sample and history: corrector, second order, and the first-order end."""
    config, tokens, schedule = schedule_of("unipc", steps, solver_order=order)
    for i, stage in enumerate(schedule.stages):
        scheduler = published_stage(config, i, steps[i], tokens[max(i - 1, 0)], False)
        sample = draw(*SHAPE, seed=i)
        state = UniPCState.initial(sample)
        for k, t in enumerate(scheduler.timesteps):
            velocity = draw(*SHAPE, seed=100 + k)
            wanted, _, corrected, _ = scheduler.step(velocity, t, sample, return_dict=False)
            actual, mine = state.step(sample, velocity, vector(stage.coeffs(k), torch.float32))
            close(actual, wanted, 1e-6)
            close(mine.last, corrected, 1e-6)
            close(mine.newer, scheduler.model_outputs[-1], 1e-6)
            state = UniPCState(corrected, scheduler.model_outputs[-1], state.newer)
            sample = wanted


@pytest.mark.parametrize(("steps", "order"), UNIPC)
def test_unipc_runs_in_float64(steps: list[int], order: int) -> None:
    """Whole runs of each stage, every history our own."""
    config, tokens, schedule = schedule_of("unipc", steps, solver_order=order)
    for i, stage in enumerate(schedule.stages):
        scheduler = published_stage(config, i, steps[i], tokens[max(i - 1, 0)], False)
        wanted = sample = draw(*SHAPE, seed=i, dtype=torch.float64)
        state = UniPCState.initial(sample)
        for k, t in enumerate(scheduler.timesteps):
            velocity = draw(*SHAPE, seed=100 + k, dtype=torch.float64)
            wanted = scheduler.step(velocity, t, wanted, return_dict=False)[0]
            sample, state = state.step(sample, velocity, vector(stage.coeffs(k), torch.float64))
            close(sample, wanted, 1e-13)


@ONCE
@pytest.mark.parametrize("steps", [[6], [4, 4, 4]])
def test_euler_steps(steps: list[int], dtype: torch.dtype) -> None:
    """diffusers' Euler step computes in float32 whatever it is given, so float64 is bounded by that."""
    config, tokens, schedule = schedule_of("euler", steps)
    for i, stage in enumerate(schedule.stages):
        scheduler = published_stage(config, i, steps[i], tokens[max(i - 1, 0)], False)
        sample = draw(*SHAPE, seed=i).to(dtype)
        for k, t in enumerate(scheduler.timesteps):
            velocity = draw(*SHAPE, seed=100 + k).to(dtype)
            (wanted,) = scheduler.step(velocity, t, sample, return_dict=False)
            close(euler_step(sample, velocity, vector(stage.coeffs(k), dtype)), wanted, 1e-6)
            sample = wanted.float().to(dtype)


def test_dmd_in_bfloat16_is_closer_than_published() -> None:
    """One rounding instead of two: against exact arithmetic on the same rounded inputs, at every step but the last."""
    config, tokens, schedule = schedule_of("dmd", [4, 4, 4])
    for i, stage in enumerate(schedule.stages):
        scheduler = published_stage(config, i, 4, tokens[max(i - 1, 0)], False)
        start, sample, velocity = (draw(*SHAPE, seed=10 * i + k, dtype=torch.bfloat16) for k in range(3))
        for k in range(3):
            kwargs = {"dmd_noisy_tensor": start, "dmd_sigmas": scheduler.sigmas, "dmd_timesteps": scheduler.timesteps}
            kwargs |= {"cur_sampling_step": k, "all_timesteps": scheduler.timesteps, "return_dict": False}
            (theirs,) = scheduler.step(velocity, scheduler.timesteps[k], sample, **kwargs)
            ours = dmd_step(sample, velocity, start, vector(stage.coeffs(k), torch.float32))
            exact = dmd_step(sample.double(), velocity.double(), start.double(), vector(stage.coeffs(k), torch.float64))
            assert ours.dtype == theirs.dtype == torch.bfloat16
            assert (ours - exact).norm() < (theirs - exact).norm()


# --- guidance -------------------------------------------------------------------------------------------------------


@ONCE
def test_cfg_zero_star(dtype: torch.dtype) -> None:
    """The published projection computes in float32 whatever it is given."""
    cond, uncond = draw(*SHAPE, seed=1, dtype=dtype), draw(*SHAPE, seed=2, dtype=dtype) + 0.5
    s = optimized_scale(cond.view(2, -1), uncond.view(2, -1)).view(2, 1, 1, 1, 1).to(dtype)
    wanted = uncond * s + 5.0 * (cond - uncond * s)
    close(cfg_zero_star(cond, uncond, vector(guidance_coeffs(5.0), dtype)), wanted, 1e-6)


@ONCE
def test_cfg(dtype: torch.dtype) -> None:
    cond, uncond = draw(*SHAPE, seed=1, dtype=dtype), draw(*SHAPE, seed=2, dtype=dtype)
    close(cfg(cond, uncond, vector(guidance_coeffs(5.0), dtype)), uncond + 5.0 * (cond - uncond), 1e-6)


# --- between the stages ---------------------------------------------------------------------------------------------


def by_frames(x: Tensor, resize: Callable[[Tensor], Tensor]) -> Tensor:
    b, c, t, h, w = x.shape
    y = resize(x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w))
    return y.reshape(b, t, c, *y.shape[-2:]).permute(0, 2, 1, 3, 4)


@ONCE
def test_noise_pyramid(dtype: torch.dtype) -> None:
    x = draw(2, 3, 2, 8, 12, seed=3, dtype=dtype)
    wanted = by_frames(x, lambda f: F.interpolate(f, size=(4, 6), mode="bilinear") * 2)
    close(downsample_noise(x), wanted, 1e-6 if dtype == torch.float32 else 1e-15)


def test_nearest_upsampling_is_exact() -> None:
    x = draw(2, 3, 2, 4, 5, seed=3)
    assert torch.equal(upsample_nearest2(x), by_frames(x, lambda f: F.interpolate(f, size=(8, 10), mode="nearest")))


class _Pipeline:
    """What ``HeliosPyramidPipeline.sample_block_noise`` needs of its object."""

    def __init__(self, gamma: float) -> None:
        self.scheduler = HeliosScheduler(gamma=gamma)

    def sample(self, shape: tuple[int, ...], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = HeliosPyramidPipeline.sample_block_noise(self, *shape, generator=generator)
        assert isinstance(noise, Tensor)
        return noise


def test_block_noise_where_the_published_factorisation_works() -> None:
    """Same generator, same layout: for a gamma below 1/3 the numeric factor is ours."""
    z = DiffusersNoise(torch.Generator().manual_seed(5)).block(0, 1, (2, 3, 2, 2, 4, 4))
    close(block_noise(z, gamma=0.25), _Pipeline(0.25).sample((2, 3, 2, 4, 8), seed=5), 1e-6)


def test_block_noise_where_the_published_factorisation_fails() -> None:
    """At the published gamma the covariance is singular: the numeric factorisation gives up on the CPU, ours cannot."""
    with pytest.raises(RuntimeError, match="not positive-definite"):
        _Pipeline(1 / 3).sample((1, 1, 1, 2, 2), seed=5)
    z = DiffusersNoise(torch.Generator().manual_seed(5)).block(0, 1, (2, 3, 2, 2, 4, 4))
    assert block_noise(z).isfinite().all()


def test_block_factor_is_the_limit_of_the_published_one() -> None:
    """Where float64 keeps the published 1e-8 on the diagonal, the factor works and differs by its square root."""
    covariance = torch.eye(4, dtype=torch.float64) * (4 / 3 + 1e-8) - 1 / 3
    wanted = torch.linalg.cholesky(covariance)
    difference = (torch.tensor(block_factor(1 / 3), dtype=torch.float64) - wanted).abs()
    assert difference[3, 3] == pytest.approx(2e-4, rel=1e-3)
    difference[3, 3] = 0
    assert difference.max() < 3e-8


def test_renoise_upsample() -> None:
    """The published transition, with float64's factor in place of the one that fails."""
    _, _, schedule = schedule_of("dmd", [2, 2, 2])
    latents, z = draw(1, 2, 3, 2, 4, seed=1), draw(1, 2, 3, 2, 4, 4, seed=2)
    alpha, beta = schedule.stages[1].renoise
    factor = torch.tensor(block_factor(1 / 3))
    noise = (z.reshape(-1, 4) @ factor.T).view(1, 2, 3, 2, 4, 2, 2).permute(0, 1, 2, 3, 5, 4, 6).reshape(1, 2, 3, 4, 8)
    up = by_frames(latents, lambda f: F.interpolate(f, size=(4, 8), mode="nearest"))
    actual = renoise_upsample(latents, z, vector(schedule.stages[1].renoise, torch.float32))
    close(actual, alpha * up + beta * noise, 1e-6)


# --- randomness -----------------------------------------------------------------------------------------------------


def test_draw_order_of_image_to_video() -> None:
    """rand, randn, rand, randn, then the latents; noise levels computed as published."""
    shape, between = (1, 4, 1, 4, 6), (0.111, 0.135)
    generator = torch.Generator().manual_seed(9)
    wanted: list[Tensor] = []
    for _ in range(2):
        wanted.append(torch.rand(1, generator=generator) * (0.135 - 0.111) + 0.111)
        wanted.append(torch.randn(shape, generator=generator))
    wanted.append(torch.randn((1, 4, 9, 4, 6), generator=generator))
    noise = DiffusersNoise(torch.Generator().manual_seed(9))
    actual = [
        noise.image_sigma(1, between),
        noise.image_noise(shape),
        noise.fake_image_sigma(1, between),
        noise.fake_image_noise(shape),
        noise.latents(0, (1, 4, 9, 4, 6)),
    ]
    for mine, theirs in zip(actual, wanted, strict=True):
        assert torch.equal(mine.flatten(), theirs.flatten())


def test_draws_of_video_to_video() -> None:
    generator = torch.Generator().manual_seed(3)
    levels = torch.rand(9, generator=generator) * (0.135 - 0.111) + 0.111
    normals = torch.randn((2, 4, 9, 4, 6), generator=generator)
    noise = DiffusersNoise(torch.Generator().manual_seed(3))
    mine = noise.video_sigmas(0, 2, 9, (0.111, 0.135))
    assert torch.equal(mine, levels.view(1, 1, 9, 1, 1).expand(2, 1, 9, 1, 1))
    assert torch.equal(noise.video_noise(0, (2, 4, 9, 4, 6)), normals)


def test_config_round_trip_keeps_the_schedule() -> None:
    """The configuration that the tests hand to both sides is the same one."""
    config = config_of("dmd", use_dynamic_shifting=True)
    again = SchedulerConfig.from_dict(config.to_dict(), "scheduler_config.json")
    assert dataclasses.asdict(again) == dataclasses.asdict(config)
    assert CounterNoise(1).state().numel() == 0
