"""Sampler and resampling ops: laws they must obey, derivatives, refusals, and the graph they record."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helios import op as ops
from helios.errors import OpError
from helios.graph import Builder, Rate
from helios.ops import resample, sampler
from helios.ops.resample import block_factor, block_noise, downsample_noise, renoise_upsample, upsample_nearest2
from helios.ops.sampler import cfg, cfg_zero_star, dmd_step, unipc_step

FAMILY = [*sampler.__all__, *(n for n in resample.__all__ if n != "block_factor")]
CASES = [(name, sample.name) for name in FAMILY for sample in ops.get(name).samples() if not sample.big]
REFUSED = [(name, case.name) for name in FAMILY for case in ops.get(name).error_cases()]
F64 = torch.float64


def inputs(name: str, case: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    (sample,) = (s for s in ops.get(name).samples() if s.name == case)
    return sample.make(dtype), dict(sample.attrs)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_low_precision_is_the_rounded_float64_result(name: str, case: str) -> None:
    """Every op computes in at least float32 and keeps its documented output dtypes."""
    tensors, attrs = inputs(name, case, torch.bfloat16)
    low = outputs(ops.get(name)(*tensors, **attrs))
    exact = outputs(ops.get(name)(*(t.double() for t in tensors), **attrs))
    for mine, wanted in zip(low, exact, strict=True):
        assert wanted.dtype == F64
        assert mine.dtype in (torch.bfloat16, torch.float32)
        # A fused reference rounds between its ops: u = 2⁻⁸ each, at most four of them here.
        error = (mine.double() - wanted).norm() / wanted.norm().clamp(min=1.0)
        assert error <= 4 * 2**-8


@pytest.mark.parametrize(("name", "case"), [c for c in CASES if c[1] in ("small", "weaker", "zero_init")])
def test_derivatives(name: str, case: str) -> None:
    record = ops.get(name)
    tensors, attrs = inputs(name, case, F64)
    few = [t[:1, :2, :2, :2, :2].double() if t.dim() > 1 else t.double() for t in tensors]
    assert torch.autograd.gradcheck(lambda *x: record(*x, **attrs), [t.clone().requires_grad_() for t in few])


@pytest.mark.parametrize(("name", "case"), REFUSED)
def test_refusals(name: str, case: str) -> None:
    (bad,) = (e for e in ops.get(name).error_cases() if e.name == case)
    tensors = [a.make(torch.float32, torch.Generator()) for a in bad.inputs if isinstance(a, ops.Arg)]
    with pytest.raises(OpError) as caught:
        ops.get(name)(*tensors, **bad.attrs)
    assert bad.match in str(caught.value)


@pytest.mark.parametrize("name", [n for n in FAMILY if ops.get(n).kind == "fused"])
def test_fused_ops_expand_into_other_ops(name: str) -> None:
    tensors, attrs = inputs(name, "small", torch.float32)
    with Builder("one") as build:
        values = [build.input(f"x{i}", t.shape, t.dtype, Rate.STEP) for i, t in enumerate(tensors)]
        result = ops.get(name)(*values, **attrs)
        for i, value in enumerate(result if isinstance(result, tuple) else (result,)):
            build.output(str(i), value)
    (node,) = build.graph().nodes
    inner = ops.expand(node)
    ops.verify(inner)
    assert len(inner.nodes) == 3
    assert name not in [n.op for n in inner.nodes]


# --- steps ----------------------------------------------------------------------------------------------------------


def test_the_last_dmd_step_is_x0() -> None:
    x, v, start = (draw(1, 2, 3, 4, 6, seed=k) for k in range(3))
    coeffs = torch.tensor([0.354, 1.0, 0.0], dtype=F64)
    assert torch.equal(dmd_step(x, v, start, coeffs), x - coeffs[0] * v)


def test_dmd_follows_the_straight_line() -> None:
    """With the true velocity start − end, each step lands on the line at its noise level."""
    start, end = draw(1, 2, 3, 4, 6, seed=1), draw(1, 2, 3, 4, 6, seed=2)
    x = 0.9 * start + 0.1 * end
    moved = dmd_step(x, start - end, start, torch.tensor([0.9, 0.6, 0.4], dtype=F64))
    torch.testing.assert_close(moved, 0.4 * start + 0.6 * end, rtol=0, atol=1e-15)


def test_dmd_keeps_the_dtype_of_the_start_point() -> None:
    x = torch.zeros(1, 1, 1, 2, 2)
    coeffs = torch.tensor([0.5, 0.5, 0.5])
    assert dmd_step(x, x.bfloat16(), x, coeffs).dtype == torch.float32
    assert dmd_step(x.bfloat16(), x.bfloat16(), x.bfloat16(), coeffs).dtype == torch.bfloat16


def test_the_first_unipc_step_ignores_its_history() -> None:
    x, v = draw(1, 2, 1, 2, 2, seed=1), draw(1, 2, 1, 2, 2, seed=2)
    coeffs = torch.tensor([0.9, 1, 0, 0, 0, 0, 0.5, 0.5, 0], dtype=F64)
    zeros = torch.zeros_like(x)
    following, corrected, x0 = unipc_step(x, v, zeros, zeros, zeros, coeffs)
    assert torch.equal(corrected, x)
    torch.testing.assert_close(x0, x - 0.9 * v)
    torch.testing.assert_close(following, 0.5 * x + 0.5 * x0)


def test_float32_coefficients_do_not_lower_float64() -> None:
    x, v, start = (draw(1, 2, 3, 4, 6, seed=k) for k in range(3))
    coeffs = torch.tensor([0.3, 0.9, 0.1])
    assert torch.equal(dmd_step(x, v, start, coeffs), dmd_step(x, v, start, coeffs.double()))


# --- guidance -------------------------------------------------------------------------------------------------------


def test_cfg_zero_star_removes_what_is_parallel() -> None:
    """The scaled unconditional part is the projection: what remains of cond is orthogonal to uncond, in each video."""
    c, u = draw(2, 4, 3, 4, 6, seed=1), draw(2, 4, 3, 4, 6, seed=2)
    only_rest = cfg_zero_star(c, u, torch.tensor([2.0, 1.0], dtype=F64)) - c  # scale 2: c + (c − s·u)
    assert (only_rest * u).sum((1, 2, 3, 4)).abs().max() < 1e-9
    alone = cfg_zero_star(c[1:], u[1:], torch.tensor([5.0, 1.0], dtype=F64))
    both = cfg_zero_star(c, u, torch.tensor([5.0, 1.0], dtype=F64))
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-13)


def test_guidance_at_the_borders() -> None:
    c, u = draw(1, 2, 3, 4, 6, seed=1), draw(1, 2, 3, 4, 6, seed=2)
    one, silent = torch.tensor([1.0, 1.0], dtype=F64), torch.tensor([5.0, 0.0], dtype=F64)
    for guide in (cfg, cfg_zero_star):
        torch.testing.assert_close(guide(c, u, one), c)
        assert not guide(c, u, silent).any()
    assert cfg_zero_star(c, torch.zeros_like(u), one).isfinite().all()


# --- between the stages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.25, 1 / 3])
def test_block_factor_has_the_covariance(gamma: float) -> None:
    factor = torch.tensor(block_factor(gamma), dtype=F64)
    wanted = (1 + gamma) * torch.eye(4, dtype=F64) - gamma
    torch.testing.assert_close(factor @ factor.T, wanted, rtol=0, atol=4e-16)
    assert torch.equal(factor, factor.tril())


def test_block_factor_of_the_published_gamma() -> None:
    wanted = [
        [1.0, 0.0, 0.0, 0.0],
        [-1 / 3, 0.942809, 0.0, 0.0],
        [-1 / 3, -0.471405, 0.816497, 0.0],
        [-1 / 3, -0.471405, -0.816497, 0.0],
    ]
    torch.testing.assert_close(torch.tensor(block_factor(1 / 3)), torch.tensor(wanted), rtol=0, atol=1e-6)
    assert block_factor(1 / 3)[3][3] == 0.0


def patches(x: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    return x.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 1, 2, 3, 5, 4, 6).reshape(-1, 4)


def test_block_noise_sums_to_zero_and_has_the_covariance() -> None:
    noise = block_noise(draw(1, 4, 4, 50, 50, 4))
    assert patches(noise).sum(1).abs().max() < 1e-14
    wanted = torch.eye(4, dtype=F64) * (4 / 3) - 1 / 3
    # 40,000 patches: the standard error of a covariance is at most √2/200
    torch.testing.assert_close(torch.cov(patches(noise).T), wanted, rtol=0, atol=5 * 2**0.5 / 200)


def test_block_noise_keeps_each_patch_in_its_place() -> None:
    z = torch.zeros(1, 1, 1, 2, 3, 4, dtype=F64)
    z[0, 0, 0, 1, 2] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    noise = block_noise(z)[0, 0, 0]
    torch.testing.assert_close(noise[2:, 4:], torch.tensor([[1.0, -1 / 3], [-1 / 3, -1 / 3]], dtype=F64))
    assert noise.count_nonzero() == 4


def test_downsampled_noise_keeps_unit_variance() -> None:
    x = draw(1, 4, 4, 100, 100)
    half = downsample_noise(x)
    assert torch.equal(half[0, 0, 0, 0, 0], x[0, 0, 0, :2, :2].sum() / 2)
    assert float(half.std()) == pytest.approx(1.0, abs=5 / (2 * half.numel()) ** 0.5)


def test_renoised_latents_are_white_again() -> None:
    """Pure noise, repeated and renoised with matching constants, has independent pixels of equal variance."""
    up = renoise_upsample(
        draw(1, 4, 4, 50, 50), draw(1, 4, 4, 50, 50, 4, seed=1), torch.tensor([0.5, 0.75**0.5]).double()
    )
    torch.testing.assert_close(torch.cov(patches(up).T), torch.eye(4, dtype=F64), rtol=0, atol=5 * 2**0.5 / 200)


def test_nearest_upsampling_repeats() -> None:
    x = torch.arange(6.0).reshape(1, 1, 1, 2, 3)
    wanted = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
    assert torch.equal(upsample_nearest2(x), wanted)
