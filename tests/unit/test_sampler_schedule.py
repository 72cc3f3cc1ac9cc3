"""Schedules against written-down figures, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helios.errors import InputError
from helios.model.config import SchedulerConfig
from helios.sampler import build_schedule, calculate_shift, guidance_coeffs, pyramid_tokens
from helios.sampler.schedule import base_sigmas, stage_tables
from helios.sampler.shift import dynamic_shift, static_shift
from helios.sampler.unipc import coefficients

DISTILLED = SchedulerConfig(class_name="HeliosDMDScheduler", use_dynamic_shifting=True, time_shift_type="linear")
MID = SchedulerConfig(use_dynamic_shifting=True)
BASE = SchedulerConfig(stages=1, stage_range=(0.0, 1.0), use_dynamic_shifting=True)
TOKENS = [540, 2160, 8640]  # 384×640: latents of 9×48×80

# What a 384×640 run visits, six decimals, computed apart from this code.
TWO_STEPS_T = [[998.534227, 833.963564], [742.604645, 512.462859], [385.146833, 174.763707]]
TWO_STEPS_SIGMA = [[0.998176929, 0.354035138, 0]] * 2 + [[0.998784149, 0.451239930, 0]]
AMPLIFIED_T = [
    [998.534, 902.218, 833.964, 783.066],
    [742.605, 607.913, 512.463, 441.286],
    [385.147, 274.575, 174.764, 84.216],
]
AMPLIFIED_SIGMA = [[0.998177, 0.621189, 0.354035, 0.154818, 0]] * 2 + [[0.998784, 0.711008, 0.451240, 0.215580, 0]]


def test_shared_tables() -> None:
    sigmas = base_sigmas(DISTILLED)
    np.testing.assert_allclose(sigmas[[0, 1, -1]], [0.999, 0.998001, 0.000999], rtol=1e-12)
    tables = stage_tables(DISTILLED)
    assert [t.plain_start for t in tables] == pytest.approx([0.999, 0.666333, 0.333666])
    assert [t.start for t in tables] == pytest.approx([0.999, 0.7997597118943213, 0.5003741566479163], rel=1e-15)
    assert [t.end for t in tables] == pytest.approx([0.666333, 0.333666, 0.0])
    edges = [(t.timesteps[0], t.timesteps[-1]) for t in tables]
    np.testing.assert_allclose(edges, [(999, 743.511744), (743.256, 385.971642), (385.614, 1.383615)], atol=5e-7)
    for table in tables:
        np.testing.assert_allclose(table.sigmas[[0, -1]], [0.999, 0.000999], rtol=1e-12)


def test_renoise_constants() -> None:
    first, second, third = (t.renoise for t in stage_tables(DISTILLED))
    assert first is None
    assert second == pytest.approx((0.6001201440528393, 0.6926122274238059), rel=1e-15)
    assert third == pytest.approx((0.7498129216760419, 0.4333367310543098), rel=1e-15)


def test_renoising_restores_independent_pixels() -> None:
    """Why α and β are what they are: noise that was repeated over a patch, scaled, plus block noise, is white again."""
    for table in stage_tables(DISTILLED)[1:]:
        assert table.renoise is not None
        alpha, beta = table.renoise
        repeated = alpha * table.plain_start  # the stage before ends with this share of noise
        variance, covariance = repeated**2 + beta**2, repeated**2 - beta**2 / 3
        assert covariance == pytest.approx(0.0, abs=1e-15)
        assert variance == pytest.approx(table.start**2, rel=1e-12)


def test_distilled_two_steps() -> None:
    schedule = build_schedule(DISTILLED, [2, 2, 2], TOKENS)
    for stage, t, sigma in zip(schedule.stages, TWO_STEPS_T, TWO_STEPS_SIGMA, strict=True):
        np.testing.assert_allclose(stage.timesteps, t, atol=5e-7)
        np.testing.assert_allclose(stage.sigmas, sigma, atol=5e-10)
    assert [s.model_timesteps.tolist() for s in schedule.stages] == [[998, 833], [742, 512], [385, 174]]
    assert all(s.model_timesteps.dtype == np.int64 for s in schedule.stages)
    assert [s.mu for s in schedule.stages] == pytest.approx([0.5480729, 0.5480729, 0.8222917], abs=5e-8)
    assert len(schedule) == 6


def test_distilled_amplified() -> None:
    schedule = build_schedule(DISTILLED, [2, 2, 2], TOKENS, amplify=True)
    for stage, t, sigma in zip(schedule.stages, AMPLIFIED_T, AMPLIFIED_SIGMA, strict=True):
        np.testing.assert_allclose(stage.timesteps, t, atol=5e-4)
        np.testing.assert_allclose(stage.sigmas, sigma, atol=5e-7)


def test_distilled_one_step() -> None:
    schedule = build_schedule(DISTILLED, [1, 1, 1], TOKENS)
    assert [round(float(s.timesteps[0]), 3) for s in schedule.stages] == [998.534, 742.605, 385.147]
    assert [len(s) for s in schedule.stages] == [1, 1, 1]
    for stage in schedule.stages:  # the only step is the last: straight to x0
        assert stage.coeffs(0).tolist() == [stage.sigmas[0], 1.0, 0.0]


def test_mid_twenty_steps() -> None:
    schedule = build_schedule(MID, [20, 20, 20], TOKENS)
    first, _, last = schedule.stages
    np.testing.assert_allclose(first.timesteps[[0, 1, -2, -1]], [998.852, 990.912, 766.279, 743.953], atol=5e-4)
    np.testing.assert_allclose(first.sigmas[[0, 1, -3, -2, -1]], [0.999422, 0.968343, 0.089113, 0.001727, 0], atol=5e-7)
    np.testing.assert_allclose(last.timesteps[[0, 1, -2, -1]], [385.445, 376.297, 45.194, 2.256], atol=5e-4)
    np.testing.assert_allclose(last.sigmas[[0, 1, -3, -2, -1]], [0.99956, 0.975752, 0.114022, 0.002271, 0], atol=5e-7)


def test_base_fifty_steps() -> None:
    (stage,) = build_schedule(BASE, [50], TOKENS[-1:]).stages
    t = [999.8531, 996.8655, 993.7723, 302.9197, 220.9861, 121.9948]
    np.testing.assert_allclose(stage.timesteps[[0, 1, 2, -3, -2, -1]], t, atol=5e-5)
    np.testing.assert_array_equal(stage.model_timesteps, stage.timesteps)
    np.testing.assert_allclose(stage.sigmas[:-1], stage.timesteps / 1000, rtol=1e-15)
    assert stage.sigmas[-1] == 0
    assert stage.mu == pytest.approx(1.9191667, abs=5e-8)


def test_shift_from_the_tokens_after_upsampling() -> None:
    schedule = build_schedule(DISTILLED, [2, 2, 2], TOKENS, shift_from="after_upsampling")
    assert [s.mu for s in schedule.stages] == [calculate_shift(n) for n in TOKENS]
    published = build_schedule(DISTILLED, [2, 2, 2], TOKENS)
    assert [s.mu for s in published.stages] == [calculate_shift(n) for n in (540, 540, 2160)]


def test_amplify_is_of_the_distilled_solver_alone() -> None:
    assert len(build_schedule(MID, [2, 2, 2], TOKENS, amplify=True)) == 6
    assert len(build_schedule(DISTILLED, [2, 2, 2], TOKENS, amplify=True)) == 12


def test_static_shift_of_base() -> None:
    config = SchedulerConfig(stages=1, stage_range=(0.0, 1.0), shift=3.0)
    (stage,) = build_schedule(config, [4], [1]).stages
    levels = np.linspace(0.999, 0, 5)[:-1]
    np.testing.assert_allclose(stage.sigmas[:-1], 3 * levels / (1 + 2 * levels), rtol=1e-15)
    (given,) = build_schedule(config, [4], [1], sigmas=list(levels)).stages
    np.testing.assert_array_equal(given.sigmas[:-1], levels)


def test_shifts_move_levels_and_keep_the_ends() -> None:
    sigmas = np.array([1.0, 0.5, 0.0])
    for shifted in (static_shift(sigmas, 3.0), dynamic_shift(sigmas, np.log(3.0), "exponential")):
        np.testing.assert_allclose(shifted, [1.0, 0.75, 0.0], rtol=1e-14)
    np.testing.assert_allclose(dynamic_shift(sigmas, 3.0, "linear"), [1.0, 0.75, 0.0], rtol=1e-14)
    assert dynamic_shift(sigmas, 0.5, "linear")[1] < 0.5 < dynamic_shift(sigmas, 0.5, "exponential")[1]


def test_euler_coefficients_are_the_differences() -> None:
    (stage,) = build_schedule(
        SchedulerConfig(stages=1, stage_range=(0.0, 1.0), scheduler_type="euler"), [3], [1]
    ).stages
    assert [float(stage.coeffs(k)[0]) for k in range(3)] == pytest.approx([-0.333] * 3)


def test_unipc_solves_a_straight_flow_exactly() -> None:
    """If x0 never changes, each step stays on the straight line from start to x0, corrected or not."""
    sigmas = np.append(np.linspace(0.999, 0.05, 7), 0.0)
    before = np.append(np.nan, sigmas)
    for row, past, here, there in zip(coefficients(sigmas), before, sigmas, sigmas[1:], strict=False):
        assert row[0] == here
        # a sample of the line is (1 − σ)·x0 + σ·noise: compare the coefficients of x0 and of noise
        a, b = row[6:8]
        np.testing.assert_allclose([a * (1 - here) + b, a * here], [1 - there, there], atol=1e-7)
        keep, a, b = row[1:4]
        corrected = (1 - here, here) if keep else (a * (1 - past) + b, a * past)
        np.testing.assert_allclose(corrected, [1 - here, here], atol=1e-7)
    assert coefficients(sigmas)[:, 1].tolist() == [1, 0, 0, 0, 0, 0, 0]


def test_unipc_is_of_second_order() -> None:
    """On a curved flow (velocity of a scalar Gaussian) halving the steps divides the error by about four."""

    def solve(n: int) -> float:
        sigmas = np.append(np.linspace(0.9, 0.1, n + 1), 0.0)
        rows = coefficients(sigmas)[:n]  # stop at 0.1, before the first-order end
        x = last = 1.0
        newer = older = 0.0
        for row, s in zip(rows, sigmas, strict=False):
            v = 4.0
            variance = v * (1 - s) ** 2 + s**2
            x0 = v * (1 - s) / variance * x  # posterior mean of N(0, v) data
            keep, a, b, c, d, pa, pb, pc = row[1:]
            x = keep * x + a * last + b * newer + c * (older - newer) + d * (x0 - newer)
            last, older, newer = x, newer, x0
            x = pa * x + pb * x0 + pc * (older - x0)
        return x

    exact = (4.0 * 0.9**2 + 0.1**2) ** 0.5 / (4.0 * 0.1**2 + 0.9**2) ** 0.5
    coarse, fine = abs(solve(20) - exact), abs(solve(40) - exact)
    assert 3.0 < coarse / fine < 10.0


def test_zero_init_silences_one_step_more_than_its_name() -> None:
    gains = [guidance_coeffs(5.0, stage=s, step=k, zero_init=True)[1] for s in range(2) for k in range(4)]
    assert gains == [0, 0, 1, 1, 1, 1, 1, 1]
    assert guidance_coeffs(5.0).tolist() == [5.0, 1.0]


def test_tables_cannot_be_changed() -> None:
    stage = build_schedule(MID, [2, 2, 2], TOKENS).stages[1]
    for array in (stage.timesteps, stage.model_timesteps, stage.sigmas, stage.table, stage.renoise):
        assert array is not None
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert torch.tensor(stage.coeffs(0)).shape == (9,)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"steps": [2, 2]}, "2 numbers of steps"),
        ({"tokens": [540]}, "1 of tokens for 3 pyramid stage"),
        ({"steps": [2, 0, 2]}, "at least one step"),
        ({"sigmas": [0.9, 0.5]}, "only Base"),
        ({"shift_from": "after_upsample"}, "did you mean 'after_upsampling'"),
    ],
)
def test_refused_arguments(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        build_schedule(MID, **{"steps": [2, 2, 2], "tokens": TOKENS} | arguments)  # type: ignore[arg-type]


def test_refused_settings() -> None:
    with pytest.raises(InputError, match="exclude each other"):
        build_schedule(SchedulerConfig(shift=3.0, use_dynamic_shifting=True), [2, 2, 2], TOKENS)
    with pytest.raises(InputError, match="fall from below 1 to 0"):
        build_schedule(SchedulerConfig(stages=1, stage_range=(0.0, 1.0)), [2], [1], sigmas=[1.0, 0.5])
    with pytest.raises(InputError, match="unknown time shift"):
        dynamic_shift(np.array([0.5]), 1.0, "quadratic")
    with pytest.raises(InputError, match="mu > 0"):
        dynamic_shift(np.array([0.5]), -0.1, "linear")


def test_tokens_of_each_stage() -> None:
    assert pyramid_tokens(9, 48, 80, 3) == TOKENS
    assert pyramid_tokens(9, 48, 80, 1) == [8640]
