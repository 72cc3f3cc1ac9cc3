"""Sampler steps, guidance, noise and latents that are almost right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helios.backend import Backend, Kernel
from helios.op import accumulator
from helios_conformance.mutants.mutant import Mutant, backend_with, of_family, touched

__all__ = ["MUTANTS"]


def _sigmas_swapped(right: Any, sample: Tensor, velocity: Tensor, start: Tensor, coeffs: Tensor) -> Any:
    sigma, _, after = coeffs.unbind()
    return right(sample, velocity, start, torch.stack((after, 1.0 - sigma, sigma)))


def _derived_signal(right: Any, sample: Tensor, velocity: Tensor, start: Tensor, coeffs: Tensor) -> Any:
    sigma, _, after = coeffs.unbind()
    return right(sample, velocity, start, torch.stack((sigma, 1.0 - after, after)))


def _fresh_start(right: Any, sample: Tensor, velocity: Tensor, start: Tensor, coeffs: Tensor) -> Any:
    """Back along a line to the present sample, not to the stage's start."""
    return right(sample, velocity, sample.to(start.dtype), coeffs)


def _narrow_coefficients(right: Any, *operands: Tensor, **attrs: Any) -> Any:
    *rest, coeffs = operands
    return right(*rest, coeffs.bfloat16().to(coeffs.dtype), **attrs)


def _narrow_state(right: Any, sample: Tensor, *rest: Any) -> Any:
    return right(sample.bfloat16().to(sample.dtype), *rest)


def _backwards(right: Any, sample: Tensor, velocity: Tensor, coeffs: Tensor) -> Any:
    return right(sample, velocity, -coeffs)


def _no_corrector(right: Any, sample: Tensor, *rest: Any) -> Any:
    return sample.clone()


def _first_order(right: Any, sample: Tensor, x0: Tensor, newer: Tensor, coeffs: Tensor) -> Any:
    return right(sample, x0, x0, coeffs)


def _scale_plus_one(right: Any, cond: Tensor, uncond: Tensor, coeffs: Tensor, **attrs: Any) -> Any:
    return right(cond, uncond, coeffs + coeffs.new_tensor([1.0, 0.0]), **attrs)


def _gain_ignored(right: Any, cond: Tensor, uncond: Tensor, coeffs: Tensor, **attrs: Any) -> Any:
    return right(cond, uncond, torch.stack((coeffs[0], torch.ones_like(coeffs[1]))), **attrs)


def _no_projection(right: Any, cond: Tensor, uncond: Tensor, coeffs: Tensor, **attrs: Any) -> Tensor:
    acc = accumulator(cond.dtype)
    c, u, (scale, gain) = cond.to(acc), uncond.to(acc), coeffs.to(acc).unbind()
    return (gain * (u + scale * (c - u))).to(cond.dtype)


def _over_batch(right: Any, cond: Tensor, uncond: Tensor, coeffs: Tensor, **attrs: Any) -> Tensor:
    """One projection for all videos of the batch."""
    joined = [x.transpose(0, 1).reshape(1, x.shape[1], -1, *x.shape[3:]) for x in (cond, uncond)]
    out: Tensor = right(*joined, coeffs, **attrs)
    c, (b, t) = cond.shape[1], (cond.shape[0], cond.shape[2])
    return out.reshape(c, b, t, *cond.shape[3:]).transpose(0, 1)


def _mean_for_sum(right: Any, x: Tensor) -> Any:
    return (0.5 * right(x)).to(x.dtype)


def _one_pixel(right: Any, x: Tensor) -> Tensor:
    return x[..., ::2, ::2].clone()


def _independent(right: Any, z: Tensor, *, gamma: float = 1.0 / 3.0) -> Any:
    return right(z, gamma=0.0)


def _patch_transposed(right: Any, z: Tensor, **attrs: Any) -> Any:
    return right(z[..., [0, 2, 1, 3]], **attrs)


def _default_gamma(right: Any, z: Tensor, *, gamma: float = 1.0 / 3.0) -> Any:
    return right(z)


def _coefficients_swapped(right: Any, latents: Tensor, noise: Tensor, coeffs: Tensor, **attrs: Any) -> Any:
    return right(latents, noise, coeffs.flip(0), **attrs)


def _normalised(right: Any, x: Tensor, *, mean: Any, std: Any, **attrs: Any) -> Any:
    return right(x, mean=mean, std=tuple(1.0 / s for s in std), **attrs)


def _first_statistics(right: Any, x: Tensor, *, mean: Any, std: Any, **attrs: Any) -> Any:
    return right(x, mean=(mean[0],) * len(mean), std=std, **attrs)


def _variance_for_deviation(right: Any, moments: Tensor, noise: Tensor | None = None, **attrs: Any) -> Any:
    mean, logvar = moments.chunk(2, 1)
    return right(torch.cat((mean, 2.0 * logvar), 1), noise, **attrs)


def _not_clipped(right: Any, moments: Tensor, noise: Tensor | None = None, *, mean: Any, std: Any) -> Tensor:
    acc = accumulator(moments.dtype)
    centre, logvar = moments.to(acc).chunk(2, 1)
    if noise is not None:
        centre = centre + torch.exp(0.5 * logvar) * noise.to(acc)
    shift, scale = (torch.tensor(x, dtype=acc, device=moments.device).view(-1, 1, 1, 1) for x in (mean, std))
    return ((centre - shift) / scale).to(moments.dtype)


_STEPS = ("velocity_to_x0", "blend", "dmd_step", "euler_step", "unipc_correct", "unipc_predict", "cfg", "cfg_zero_star")


def _coefficients_of_before(backend: Backend) -> Backend:
    """Each call takes what the last call with as many coefficients was given: an upload that comes too late."""
    held: dict[tuple[str, int], Tensor] = {}

    def late(name: str, kernel: Kernel) -> Kernel:
        def run(*operands: Any, **attrs: Any) -> Any:
            *rest, coeffs = operands
            key = (name, coeffs.numel())
            before, held[key] = held.get(key, coeffs), coeffs.clone()
            return kernel.run(*rest, before, **attrs)

        return Kernel(run)

    kernels = {name: late(name, backend.kernels[name]) for name in _STEPS if name in backend.kernels}
    return backend_with(backend, kernels={**backend.kernels, **kernels}, fusions=())


_mutant = of_family("sampler")


MUTANTS: tuple[Mutant, ...] = (
    _mutant("dmd_sigmas_swapped", "The noise levels before and after a step are swapped.", _sigmas_swapped, "dmd_step"),
    _mutant(
        "dmd_signal_derived",
        "1 - sigma is computed anew and not taken from its coefficient.",
        _derived_signal,
        "dmd_step",
    ),
    _mutant(
        "dmd_wrong_start", "A step goes back to the present sample, not to its stage's start.", _fresh_start, "dmd_step"
    ),
    Mutant(
        "sigma_one_step_late",
        "Steps take the coefficients of the step before.",
        "sampler",
        _coefficients_of_before,
        ops=touched(_STEPS),
    ),
    _mutant(
        "coefficients_bfloat16",
        "Coefficients are rounded to bfloat16.",
        _narrow_coefficients,
        "dmd_step",
        "euler_step",
        "unipc_correct",
    ),
    _mutant(
        "state_bfloat16", "The sampler's float32 state is rounded to bfloat16.", _narrow_state, "dmd_step", "euler_step"
    ),
    _mutant("euler_backwards", "Euler steps go backwards.", _backwards, "euler_step"),
    _mutant("unipc_no_corrector", "UniPC does not correct.", _no_corrector, "unipc_correct"),
    _mutant("unipc_first_order", "UniPC predicts to first order only.", _first_order, "unipc_predict"),
    _mutant("guidance_plus_one", "Guidance takes scale + 1.", _scale_plus_one, "cfg", "cfg_zero_star"),
    _mutant(
        "zero_init_ignored", "Steps that zero-init silences are not silent.", _gain_ignored, "cfg", "cfg_zero_star"
    ),
    _mutant("zero_star_no_projection", "CFG-Zero* does not project.", _no_projection, "cfg_zero_star"),
    _mutant("zero_star_over_batch", "CFG-Zero* takes one projection for a whole batch.", _over_batch, "cfg_zero_star"),
    _mutant(
        "noise_shrinks_variance",
        "Noise is averaged to half its size, which halves its deviation.",
        _mean_for_sum,
        "downsample_noise",
    ),
    _mutant("noise_one_pixel", "Noise is downsampled by taking one pixel of four.", _one_pixel, "downsample_noise"),
    _mutant("block_noise_independent", "Block noise has no correlation.", _independent, "block_noise"),
    _mutant("block_noise_transposed", "Block noise fills patches column by column.", _patch_transposed, "block_noise"),
    _mutant("block_noise_gamma", "Block noise ignores its gamma.", _default_gamma, "block_noise"),
    _mutant("renoise_swapped", "Signal and noise swap their coefficients.", _coefficients_swapped, "renoise_upsample"),
    _mutant(
        "latents_divided",
        "Latents are divided by their deviation instead of multiplied.",
        _normalised,
        "denormalize_latents",
    ),
    _mutant(
        "latents_one_mean", "All channels of the latents take the first mean.", _first_statistics, "denormalize_latents"
    ),
    _mutant(
        "posterior_variance",
        "The posterior takes the variance for the deviation.",
        _variance_for_deviation,
        "sample_posterior",
    ),
    _mutant("posterior_not_clipped", "Log-variances are not clipped.", _not_clipped, "sample_posterior"),
)
