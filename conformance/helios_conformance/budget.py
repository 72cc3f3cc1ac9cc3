"""The error budget: how far from the float64 oracle a result may be. Nothing else in the suite has a tolerance.

Four statistics compare a result y with the oracle o. Each bound follows from the error of the reference in the working
dtype, which is committed with the suite, and from a floor that any right kernel keeps; ``docs/conformance.md`` derives
both.
u is the unit roundoff: 2⁻²⁴ for float32, 2⁻⁸ for bfloat16. K is the number of terms of the longest sum.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from helios.op import Kind

__all__ = [
    "NONE",
    "Errors",
    "allowed",
    "bounds",
    "conditioned",
    "directions",
    "exact",
    "exceeded",
    "largest",
    "measure",
    "of_chain",
    "rounds_once",
    "uneven",
    "unit",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Errors:
    """The statistics of one output, or the bounds on them.

    Attributes:
        norm: ‖y − o‖ / ‖o‖.
        worst: max |y − o| / rms(o).
        gain: ⟨y, o⟩ / ⟨o, o⟩ − 1, signed; truncation shows here.
        misrounded: part of the elements that are not the oracle rounded to the output's dtype.
        count: elements compared.
    """

    norm: float
    worst: float
    gain: float
    misrounded: float
    count: int


NONE = Errors(0.0, 0.0, 0.0, 0.0, 0)
"""No error: what data movement is allowed."""


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def measure(result: Tensor, oracle: Tensor) -> Errors:
    """Compare a result with the oracle, element by element, in float64.

    Args:
        result: of any shape and dtype, host.
        oracle: float64, of the same shape.

    Elements where the oracle is not finite are left out here; what must happen to them is another check's. A result
    that is not finite where the oracle is makes every statistic infinite.
    """
    right = oracle.isfinite()
    y, o = result.double()[right], oracle[right]
    count = o.numel()
    if not count:
        return NONE
    if not bool(y.isfinite().all()):
        return Errors(math.inf, math.inf, math.inf, 1.0, count)
    difference = y - o
    size = float(o.norm())
    off = float((y != o.to(result.dtype).double()).double().mean())
    if size == 0.0:
        wrong = math.inf if bool(difference.any()) else 0.0
        return Errors(wrong, wrong, wrong, off, count)
    rms = size / math.sqrt(count)
    return Errors(
        float(difference.norm()) / size,
        float(difference.abs().max()) / rms,
        float((difference * (o / size)).sum()) / size,
        off,
        count,
    )


def exact(result: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors agree bit by bit, dtype and shape included; any NaN equals any NaN."""
    if result.shape != wanted.shape or result.dtype != wanted.dtype:
        return False
    if not result.is_floating_point():
        return bool((result == wanted).all())
    if result.dtype.itemsize == 1:  # torch compares no numbers of eight bits
        result, wanted = result.float(), wanted.float()
    return bool(((result == wanted) | (result.isnan() & wanted.isnan())).all())


def directions(oracle: Tensor) -> float:
    """Over how many elements the gain is an average: (Σo²)² / Σo⁴, which is their number where all are of one size, and
    less where a few large ones decide."""
    size = oracle[oracle.isfinite()].double()
    if not bool(size.any()):
        return 1.0
    square = (size / size.abs().max()).square()
    return float(square.sum().square() / square.square().sum())


def rounds_once(reference: Errors) -> bool:
    """Whether the reference gives the oracle rounded, but for a few elements: no rounding stands between."""
    return reference.misrounded < 0.02


def bounds(
    kind: Kind,
    dtype: torch.dtype,
    terms: int,
    count: int,
    reference: Errors,
    along: float | None = None,
    top: float = 4.0,
) -> Errors:
    """What a result may err.

    Args:
        kind: of the op, ``round`` or ``reduce`` or ``fused``; a whole graph counts as ``fused``.
        dtype: of the output.
        terms: K.
        count: elements compared.
        reference: errors of the reference in the working dtype, the largest of several seeds.
        along: ``directions`` of the oracle; ``None`` for the count.
        top: its largest element over its rms; 4 is that of a few thousand normals.
    """
    u = unit(dtype)
    # In float32 nothing but a single operation rounds once, and whether several of them seem to hangs on the draw: a
    # coefficient of few bits makes a product exact. So a right element errs by up to 2 u there.
    once = dtype != torch.float32 and rounds_once(reference)
    grown = math.sqrt(max(terms, 4)) if dtype == torch.float32 else 1.0
    # Rounding to nearest errs by 0.37 u to 0.58 u in the norm, truncation by twice that: the floor lies between.
    floor = u * grown if dtype == torch.float32 else 0.6 * u
    norm = max(floor, (1.15 if once and kind == "round" else 1.5) * reference.norm)
    # A composition that rounds twice may do so upwards both times: the largest element then errs by 2 u of itself.
    again = 1.0 if kind == "fused" and dtype != torch.float32 and not rounds_once(reference) else 0.0
    worst = max((1.25 + again) * max(top, 4.0) * u * grown, 2 * reference.worst)
    # The gain of errors that have no direction is about norm / √n: four of these never happen by chance.
    gain = abs(reference.gain) + u / 8 + 4 * norm / math.sqrt(max(count if along is None else along, 1.0))
    off = 0.05 + 3 * math.sqrt(0.05 * 0.95 / max(count, 1)) if once else 1.0
    return Errors(norm, worst, gain, min(off, 1.0), count)


def allowed(
    kind: Kind, dtype: torch.dtype, terms: int, oracle: Tensor, reference: Errors, factors: int | None = None
) -> Errors:
    """``bounds`` for a result that is compared with this oracle (float64, all elements compared).

    ``factors``: how many computed numbers multiply all elements, where there are any. In float32 their errors are as
    large as those of the products, and all products of one share them: the gain is an average over so many.

    No result can be better than the oracle rounded, and what that costs depends on the draw: a factor just above 1
    rounds a whole head of keys back to where it was, with a gain of −u/2. So the reference counts as no better.
    """
    rounded = measure(oracle.to(dtype), oracle)
    along = directions(oracle)
    if factors is not None and dtype == torch.float32:
        along = min(along, float(factors))
    return bounds(kind, dtype, terms, rounded.count, largest(reference, rounded), along, _top(oracle))


def of_chain(reference: Errors) -> Errors:
    """The reference's errors as they count for a chain of forwards, each from the device's own result before.

    What such a chain makes of a rounding is the condition of the draw's worst token, not the kernel's doing: in exact
    arithmetic one token may answer a small change ten times as strongly as the others. Each forward by itself is
    judged elsewhere, without this allowance.
    """
    return dataclasses.replace(reference, norm=reference.norm * 4 / 3, worst=reference.worst * 3)


def conditioned(reference: Errors, here: float, ordinary: float) -> Errors:
    """The reference's errors as they count on an ill-conditioned draw.

    Args:
        reference: as committed.
        here: what the norm of the error of exact operations whose results are rounded may come to on this draw.
        ordinary: what it is on ordinary draws, of which the reference's own are some.
    """
    grown = max(1.0, here / ordinary) if ordinary else 1.0
    return dataclasses.replace(reference, norm=reference.norm * grown)


def uneven(bound: Errors, result: Tensor, oracle: Tensor, allowance: Tensor) -> Errors:
    """The bounds where elements err unevenly: each may be off by the bound of all or by its own, whichever is more.

    The bound on the worst element becomes that of the element which comes nearest to its own, or lies farthest beyond
    it, in proportion: a result is within it where every element is.

    Args:
        bound: of all elements alike.
        result, oracle: as for ``measure``.
        allowance: of each element, absolute, float64, of the same shape.
    """
    right = oracle.isfinite()
    y, o = result.double()[right], oracle[right]
    rms = float(o.square().mean().sqrt()) if o.numel() else 0.0
    if not rms or not bool(y.isfinite().all()):
        return bound
    off = (y - o).abs()
    nearest = float((off / allowance[right].clamp(min=bound.worst * rms)).max())
    return dataclasses.replace(bound, worst=float(off.max()) / rms / nearest) if nearest else bound


def _top(oracle: Tensor) -> float:
    sizes = oracle[oracle.isfinite()].abs()
    rms = float(sizes.square().mean().sqrt()) if sizes.numel() else 0.0
    return float(sizes.max()) / rms if rms else 0.0


def largest(one: Errors, other: Errors) -> Errors:
    """Statistic by statistic, the gain with its sign."""
    return Errors(
        max(one.norm, other.norm),
        max(one.worst, other.worst),
        max(one.gain, other.gain, key=abs),
        max(one.misrounded, other.misrounded),
        max(one.count, other.count),
    )


def exceeded(errors: Errors, allowed: Errors) -> list[str]:
    """One phrase for each statistic beyond its bound; empty is within budget."""
    lines = []
    for name, words in (
        ("norm", "norm of the error"),
        ("worst", "worst element"),
        ("gain", "gain"),
        ("misrounded", "part of the elements rounded wrongly"),
    ):
        came, bound = getattr(errors, name), getattr(allowed, name)
        if not abs(came) <= bound:
            lines.append(f"{words} {came:.3g} is beyond {bound:.3g}")
    return lines
