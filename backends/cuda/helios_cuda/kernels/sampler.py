"""Sampler steps and guidance: each in one launch, whatever its formula; a projection in two.

All of them multiply and add a few latents by numbers that one small tensor holds, so one Triton function runs them and
a constant picks the formula. In float32, each result rounded once. The two sums of CFG-Zero* are taken by a fixed
number of programs, each in a fixed order, and added in a fixed order by all readers: the same bits each time, and no
atomics.

Bytes: latents of 9 × 48 × 80 × 16 are 2.2 MB in float32, and lie in the second-level cache; ``dmd_step`` moves 7.7 MB
(3 operands, one of them in bfloat16, and its result), ``unipc_step`` 16.6 MB. What counts is launches, for which we
expect 2 to 4 µs each even in a CUDA graph: the bodies launch 6 (``dmd_step``), 20 (``unipc_step``), 7 (``cfg``) and 15
(``cfg_zero_star``) kernels at each step, as ``pytest tests/backends/cuda/test_sampler_kernels.py -k launches`` counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helios.backend import Kernel
from helios_cuda.kernels.numerics import rounded
from helios_cuda.launch import Tile, name_of, tiled

__all__ = ["KERNELS"]

PARTS = 128
"""Programs that share the sums of a video at most: about one for each multiprocessor."""
PART = 4096
"""Elements below which a sum is not worth another program."""


@triton.jit
def _read(x, at, inside):
    return tl.load(x + at, inside, 0.0).to(tl.float32)


@triton.jit
def _write(out, at, value, inside):
    tl.store(out + at, rounded(value, out.dtype.element_ty), inside)


@triton.jit
def _number(coeffs, i: tl.constexpr):
    return tl.load(coeffs + i).to(tl.float32)


@triton.jit
def _guide(cond, uncond, coeffs):
    return _number(coeffs, 1) * (uncond + _number(coeffs, 0) * (cond - uncond))


@triton.jit
def _correct(sample, last, newer, older, x0, coeffs):
    moved = _number(coeffs, 2) * last + _number(coeffs, 3) * newer + _number(coeffs, 4) * (older - newer)
    return _number(coeffs, 1) * sample + (moved + _number(coeffs, 5) * (x0 - newer))


@triton.jit
def _predict(sample, x0, newer, coeffs):
    return _number(coeffs, 6) * sample + _number(coeffs, 7) * x0 + _number(coeffs, 8) * (newer - x0)


@tiled(
    Tile({"SIZE": 1024}, warps=4, stages=1),
    Tile({"SIZE": 512}, warps=4, stages=1),
    Tile({"SIZE": 2048}, warps=8, stages=1),
    Tile({"SIZE": 4096}, warps=8, stages=1),
    interpreted=Tile({"SIZE": 65536}),
)
@triton.jit
def _step(a, b, c, d, e, coeffs, out, out1, out2, count, STEP: tl.constexpr, SIZE: tl.constexpr):
    """The formula ``STEP`` of up to five operands of ``count`` elements, in the order of the op's signature."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    x, y = _read(a, at, inside), _read(b, at, inside)
    if STEP == "velocity_to_x0":
        result = x - _number(coeffs, 0) * y
    elif STEP == "euler_step":
        result = x + _number(coeffs, 0) * y
    elif STEP == "blend":
        result = _number(coeffs, 0) * x + _number(coeffs, 1) * y
    elif STEP == "cfg":
        result = _guide(x, y, coeffs)
    elif STEP == "dmd_step":
        x0 = x - _number(coeffs, 0) * y
        result = _number(coeffs, 1) * x0 + _number(coeffs, 2) * _read(c, at, inside)
    elif STEP == "unipc_predict":
        result = _predict(x, y, _read(c, at, inside), coeffs)
    elif STEP == "unipc_correct":
        result = _correct(x, y, _read(c, at, inside), _read(d, at, inside), _read(e, at, inside), coeffs)
    else:
        tl.static_assert(STEP == "unipc_step")
        x0 = x - _number(coeffs, 0) * y
        newer = _read(d, at, inside)
        corrected = _correct(x, _read(c, at, inside), newer, _read(e, at, inside), x0, coeffs)
        result = _predict(corrected, x0, newer, coeffs)
        _write(out1, at, corrected, inside)
        _write(out2, at, x0, inside)
    _write(out, at, result, inside)


def _launch(step: str, operands: Sequence[Tensor], coeffs: Tensor, outs: Sequence[Tensor]) -> None:
    dense = [x.contiguous() for x in operands]
    _step.launch(
        lambda size: (triton.cdiv(outs[0].numel(), size["SIZE"]),),
        *(*dense, *(None,) * (5 - len(dense))),
        *(coeffs.contiguous(), *outs, *(None,) * (3 - len(outs)), outs[0].numel()),
        key=f"{step} {'-'.join(name_of(x.dtype) for x in operands[:2])}",
        STEP=step,
    )


def _stepped(step: str, like: int) -> Callable[..., Any]:
    """The function of an op with one result, which has the dtype of the operand ``like``."""

    def run(*operands: Tensor) -> Tensor:
        *latents, coeffs = operands
        out = torch.empty(latents[0].shape, dtype=latents[like].dtype, device=coeffs.device)
        _launch(step, latents, coeffs, [out])
        return out

    return run


def _unipc_step(
    sample: Tensor, velocity: Tensor, last: Tensor, newer: Tensor, older: Tensor, coeffs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    following, corrected, x0 = (sample.new_empty(sample.shape) for _ in range(3))
    _launch("unipc_step", (sample, velocity, last, newer, older), coeffs, (following, corrected, x0))
    return following, corrected, x0


@tiled(
    Tile({"SIZE": 1024}, warps=4, stages=1),
    Tile({"SIZE": 2048}, warps=8, stages=1),
    Tile({"SIZE": 4096}, warps=8, stages=1),
    interpreted=Tile({"SIZE": 4096}),
)
@triton.jit
def _products(cond, uncond, sums, count, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """One program's part of ⟨cond, uncond⟩ and ⟨uncond, uncond⟩ of one video, to ``sums`` ``[video, 2, PARTS]``."""
    part, video = tl.program_id(0), tl.program_id(1).to(tl.int64)
    mixed = tl.zeros((SIZE,), tl.float32)
    square = tl.zeros((SIZE,), tl.float32)
    for start in range(part * SIZE, count, PARTS * SIZE):
        at = start + tl.arange(0, SIZE)
        x = _read(cond + video * count, at, at < count)
        y = _read(uncond + video * count, at, at < count)
        mixed += x * y
        square += y * y
    tl.store(sums + video * 2 * PARTS + part, tl.sum(mixed, 0))
    tl.store(sums + (video * 2 + 1) * PARTS + part, tl.sum(square, 0))


@tiled(
    Tile({"SIZE": 1024}, warps=4, stages=1),
    Tile({"SIZE": 2048}, warps=8, stages=1),
    Tile({"SIZE": 4096}, warps=8, stages=1),
    interpreted=Tile({"SIZE": 65536}),
)
@triton.jit
def _projected(cond, uncond, coeffs, sums, out, count, eps, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """Guidance against ``uncond`` scaled to its projection, from the sums of all parts."""
    video = tl.program_id(1).to(tl.int64)
    parts = sums + video * 2 * PARTS + tl.arange(0, PARTS)
    scale = tl.div_rn(tl.sum(tl.load(parts), 0), tl.sum(tl.load(parts + PARTS), 0) + eps)
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    at += video * count
    _write(out, at, _guide(_read(cond, at, inside), scale * _read(uncond, at, inside), coeffs), inside)


def _cfg_zero_star(cond: Tensor, uncond: Tensor, coeffs: Tensor, *, eps: float) -> Tensor:
    cond, uncond = cond.contiguous(), uncond.contiguous()
    videos, count = cond.shape[0], cond[0].numel() if cond.shape[0] else 0
    parts = min(PARTS, triton.next_power_of_2(max(1, triton.cdiv(count, PART))))
    sums = torch.empty((videos, 2, parts), dtype=torch.float32, device=cond.device)
    out = cond.new_empty(cond.shape)
    key = f"{name_of(cond.dtype)}-{name_of(uncond.dtype)}"
    _products.launch(lambda size: (parts, videos), cond, uncond, sums, count, key=key, PARTS=parts)
    _projected.launch(
        lambda size: (triton.cdiv(count, size["SIZE"]), videos),
        *(cond, uncond, coeffs.contiguous(), sums, out, count, eps),
        key=key,
        PARTS=parts,
    )
    return out


LIKE = {
    "blend": 0,
    "cfg": 0,
    "dmd_step": 2,
    "euler_step": 0,
    "unipc_correct": 0,
    "unipc_predict": 0,
    "velocity_to_x0": 0,
}
"""Ops of one result, and which operand gives it its dtype."""

KERNELS = {
    **{step: Kernel(_stepped(step, like)) for step, like in LIKE.items()},
    "cfg_zero_star": Kernel(_cfg_zero_star),
    "unipc_step": Kernel(_unipc_step),
}
