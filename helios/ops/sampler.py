"""Steps of the samplers and guidance. Coefficients come from the host as one small tensor.

A schedule is computed in float64 on the host (``helios.sampler``) and enters each step as a vector, float32 in
production, so that no graph and no engine ever has a schedule baked into it. What a step does only sometimes (the last
step, the corrector, zero-init) is a coefficient of 0 or 1 and not a branch: one graph serves every step.

Each op computes in the widest of its inputs' dtypes, coefficients included, at least float32, and rounds once. The
published samplers round intermediate results to the velocity's dtype as well; in float32 and float64 both are the same
arithmetic, in bfloat16 these ops are the closer ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helios.op import Arg, ErrorCase, Sample, op, widest

__all__ = [
    "blend",
    "cfg",
    "cfg_zero_star",
    "dmd_step",
    "euler_step",
    "unipc_correct",
    "unipc_predict",
    "unipc_step",
    "velocity_to_x0",
]

F32 = torch.float32
SMALL, ODD, STAGE2 = (2, 4, 3, 4, 6), (1, 3, 2, 5, 7), (1, 16, 9, 48, 80)


def _widest(*tensors: Tensor) -> torch.dtype:
    return widest(*(t.dtype for t in tensors))


def _coefficients(n: int) -> Arg:
    return Arg((n,), "uniform", dtype=F32)


def _step_samples(tensors: int, n: int) -> list[Sample]:
    """Small, odd and real shapes; and the production mix, a float32 state beside a velocity in the dtype under test."""

    def case(name: str, first: Arg, rest: Arg, big: bool = False) -> Sample:
        return Sample(name, (first, *(rest,) * (tensors - 1), _coefficients(n)), big=big)

    return [
        case("small", Arg(SMALL), Arg(SMALL)),
        case("odd", Arg(ODD), Arg(ODD)),
        case("float32_state", Arg(SMALL, dtype=F32), Arg(SMALL)),
        case("stage2", Arg(STAGE2, dtype=F32), Arg(STAGE2), big=True),
    ]


def _shape_errors() -> list[ErrorCase]:
    """A velocity of other latents must not be broadcast into the step."""
    return [ErrorCase("shapes", (Arg(SMALL), Arg((1, *SMALL[1:])), _coefficients(1)), {}, "'b' is 1")]


@op(dims="b c t h w, b c t h w, n -> b c t h w", kind="round", samples=lambda: _step_samples(2, 1))
def velocity_to_x0(sample: Tensor, velocity: Tensor, coeffs: Tensor) -> Tensor:
    """The end point that a velocity predicts: ``sample − σ·velocity``, in the dtype of ``sample``.

    Args:
        sample, velocity: latents ``[b, c, t, h, w]``.
        coeffs: ``coeffs[0]`` is σ; further entries are ignored, so that a whole solver step can share one vector.
    """
    acc = _widest(sample, velocity, coeffs)
    return (sample.to(acc) - coeffs[0].to(acc) * velocity.to(acc)).to(sample.dtype)


@op(dims="b c t h w, b c t h w, 2 -> b c t h w", kind="round", samples=lambda: _step_samples(2, 2))
def blend(x: Tensor, y: Tensor, coeffs: Tensor) -> Tensor:
    """``coeffs[0]·x + coeffs[1]·y`` for latents ``[b, c, t, h, w]``, in the dtype of ``x``."""
    acc = _widest(x, y, coeffs)
    a, b = coeffs.to(acc).unbind()
    return (a * x.to(acc) + b * y.to(acc)).to(x.dtype)


@op(
    dims="b c t h w, b c t h w, b c t h w, 3 -> b c t h w",
    kind="round",
    samples=lambda: _step_samples(3, 3),
)
def dmd_step(sample: Tensor, velocity: Tensor, start: Tensor, coeffs: Tensor) -> Tensor:
    """One step of the distilled sampler: predict the end point of the stage, go back along the same straight line.

    ``x0 = sample − σ·velocity``; result ``(1 − σ')·x0 + σ'·start``. The line ends in the noisy start point of this
    pyramid stage; no fresh noise is drawn. At the last step σ' = 0, and the result is x0. The result has the dtype of
    ``start``. (The published sampler stores x0 in the velocity's dtype first, and so rounds twice.)

    Args:
        sample: x_t ``[b, c, t, h, w]``.
        velocity: the model's output at x_t, guidance applied.
        start: start point of the stage: the downsampled noise, or the renoised upsampled latents.
        coeffs: ``[σ, 1 − σ', σ']``, local to the stage. 1 − σ' is its own entry because σ' is near 1 at early steps,
            where the difference of rounded numbers would have few correct digits.
    """
    acc = _widest(sample, velocity, start, coeffs)
    sigma, signal, noise = coeffs.to(acc).unbind()
    x0 = sample.to(acc) - sigma * velocity.to(acc)
    return (signal * x0 + noise * start.to(acc)).to(start.dtype)


@op(
    dims="b c t h w, b c t h w, 1 -> b c t h w", kind="round", samples=lambda: _step_samples(2, 1), errors=_shape_errors
)
def euler_step(sample: Tensor, velocity: Tensor, coeffs: Tensor) -> Tensor:
    """One Euler step of the flow: ``sample + Δσ·velocity``, in the dtype of ``sample``; ``coeffs`` is ``[Δσ]``."""
    acc = _widest(sample, velocity, coeffs)
    return (sample.to(acc) + coeffs[0].to(acc) * velocity.to(acc)).to(sample.dtype)


@op(
    dims="b c t h w, b c t h w, b c t h w, b c t h w, b c t h w, 9 -> b c t h w",
    kind="round",
    samples=lambda: _step_samples(5, 9),
)
def unipc_correct(sample: Tensor, last: Tensor, newer: Tensor, older: Tensor, x0: Tensor, coeffs: Tensor) -> Tensor:
    """The corrector of UniPC: the current sample again, from the last one, with the new prediction taken into account.

    ``keep·sample + a·last + b·newer + c·(older − newer) + d·(x0 − newer)``, in the dtype of ``sample``; all are
    ``[b, c, t, h, w]``. At the first step there is no history: ``keep`` is 1, the others 0, and the history is zeros.

    Args:
        sample: x_t as the predictor left it.
        last: the corrected sample of the previous step.
        newer, older: predicted end points of the previous step and of the one before it.
        x0: end point predicted at ``sample``.
        coeffs: ``[σ, keep, a, b, c, d, …]``; see ``helios.sampler.unipc.coefficients``.
    """
    acc = _widest(sample, last, newer, older, x0, coeffs)
    keep, a, b, c, d = coeffs.to(acc)[1:6].unbind()
    m0 = newer.to(acc)
    moved = a * last.to(acc) + b * m0 + c * (older.to(acc) - m0) + d * (x0.to(acc) - m0)
    return (keep * sample.to(acc) + moved).to(sample.dtype)


@op(dims="b c t h w, b c t h w, b c t h w, 9 -> b c t h w", kind="round", samples=lambda: _step_samples(3, 9))
def unipc_predict(sample: Tensor, x0: Tensor, newer: Tensor, coeffs: Tensor) -> Tensor:
    """The predictor of UniPC: the sample at the next noise level.

    ``a·sample + b·x0 + c·(newer − x0)``, in the dtype of ``sample``; all are ``[b, c, t, h, w]``. ``c`` is 0 in
    steps of first order.

    Args:
        sample: the corrected x_t.
        x0: end point predicted at this step.
        newer: end point predicted at the previous step (zeros at the first).
        coeffs: ``[…, a, b, c]``, nine entries; see ``helios.sampler.unipc.coefficients``.
    """
    acc = _widest(sample, x0, newer, coeffs)
    a, b, c = coeffs.to(acc)[6:9].unbind()
    m0 = x0.to(acc)
    return (a * sample.to(acc) + b * m0 + c * (newer.to(acc) - m0)).to(sample.dtype)


@op(
    dims="b c t h w, b c t h w, b c t h w, b c t h w, b c t h w, 9 -> b c t h w, b c t h w, b c t h w",
    kind="fused",
    samples=lambda: _step_samples(5, 9),
)
def unipc_step(
    sample: Tensor, velocity: Tensor, last: Tensor, newer: Tensor, older: Tensor, coeffs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One whole step of UniPC (B(h) = expm1(h), at most second order, data prediction), corrector first.

    Args:
        sample: x_t; it gives the dtype of all three outputs.
        velocity: the model's output at x_t, guidance applied.
        last, newer, older: outputs 2 and 3 of the previous step and output 3 of the one before; zeros at first.
        coeffs: nine numbers, see ``helios.sampler.unipc.coefficients``.

    Returns:
        The next sample; the corrected one (``last`` of the next step); x0 (``newer`` of the next step).
    """
    x0 = velocity_to_x0(sample, velocity, coeffs)
    corrected = unipc_correct(sample, last, newer, older, x0, coeffs)
    return unipc_predict(corrected, x0, newer, coeffs), corrected, x0


def _guidance_samples() -> list[Sample]:
    guided = Arg((2,), "uniform", dtype=F32, scale=4.0, offset=1.0)
    shapes = {"small": SMALL, "odd": ODD}
    cases = [Sample(name, (Arg(s), Arg(s, offset=0.5), guided)) for name, s in shapes.items()]
    # gain 0: the zero-init steps
    silent = Sample("zero_init", (Arg(SMALL), Arg(SMALL), Arg((2,), dtype=F32, scale=0.0)))
    # |uncond|² near eps
    faint = Sample("faint", (Arg(SMALL), Arg(SMALL, scale=5e-6), guided))
    return [*cases, silent, faint, Sample("stage2", (Arg(STAGE2), Arg(STAGE2, offset=0.5), guided), big=True)]


@op(dims="b c t h w, b c t h w, 2 -> b c t h w", kind="round", samples=_guidance_samples)
def cfg(cond: Tensor, uncond: Tensor, coeffs: Tensor) -> Tensor:
    """Classifier-free guidance: ``gain·(uncond + scale·(cond − uncond))``, in the dtype of ``cond``.

    Args:
        cond, uncond: velocities ``[b, c, t, h, w]`` with the prompt and with the negative prompt.
        coeffs: ``[scale, gain]``; gain is 1, and 0 at the steps that zero-init silences.
    """
    acc = _widest(cond, uncond, coeffs)
    scale, gain = coeffs.to(acc).unbind()
    u = uncond.to(acc)
    return (gain * (u + scale * (cond.to(acc) - u))).to(cond.dtype)


@op(dims="b c t h w, b c t h w, 2 -> b c t h w", kind="reduce", samples=_guidance_samples)
def cfg_zero_star(cond: Tensor, uncond: Tensor, coeffs: Tensor, *, eps: float = 1e-8) -> Tensor:
    """CFG-Zero*: guidance against the unconditional velocity scaled to its projection (arXiv 2503.18886).

    ``s = ⟨cond, uncond⟩ / (|uncond|² + eps)`` for each video; ``gain·(s·uncond + scale·(cond − s·uncond))``, in the
    dtype of ``cond``. The unconditional branch is needed at every step, zero-init steps included.

    Args:
        cond, uncond: velocities ``[b, c, t, h, w]`` with the prompt and with the negative prompt.
        coeffs: ``[scale, gain]``; gain is 1, and 0 at the steps that zero-init silences.
        eps: keeps the quotient finite where ``uncond`` is zero.
    """
    acc = _widest(cond, uncond, coeffs)
    scale, gain = coeffs.to(acc).unbind()
    c, u = cond.to(acc), uncond.to(acc)
    video = (1, 2, 3, 4)
    s = (c * u).sum(video, keepdim=True) / ((u * u).sum(video, keepdim=True) + eps)
    return (gain * (s * u + scale * (c - s * u))).to(cond.dtype)
