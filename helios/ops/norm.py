"""Normalisation, modulation and gated residuals. Statistics are taken in at least float32.

Modulation is *compact*: history tokens share one row (timestep 0) and noisy tokens another, so scale, shift and gate
are ``[b, r, d]``: with r = 2 row 0 belongs to the first ``split`` tokens and row 1 to the rest; with r = 1 the one row
belongs to all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.errors import OpError
from helios.op import Arg, ErrorCase, Fill, Sample, accumulator, op
from helios.ops.pointwise import HUGE, LONG

__all__ = ["adaln", "gated_add", "gated_add_adaln", "layer_norm", "modulate", "rms_norm"]

F32 = torch.float32
TOKENS = {"stage0": (2940, 2400), "stage1": (4560, 2400), "stage2": (11040, 2400)}


def _rms_samples() -> list[Sample]:
    return [
        Sample("small", (Arg((2, 5, 24)), Arg((24,), offset=1.0, scale=0.1))),
        Sample("tiny", (Arg((1, 9, 33), "tiny"), Arg((33,), offset=1.0, scale=0.1))),
        Sample("outliers", (Arg((1, 17, 1536), "outliers"), Arg((1536,), offset=1.0, scale=0.1))),
        Sample("flat", (Arg((1, 9, 64), "flat"), Arg((64,), offset=1.0, scale=0.1))),
        Sample("huge", (Arg((1, 7, 33), scale=HUGE), Arg((33,), offset=1.0, scale=0.1))),
        Sample("noweight", (Arg((2, 3, 8)), None)),
        Sample("long", (Arg((1, LONG, 16)), Arg((16,), offset=1.0, scale=0.1))),
        *(
            Sample(n, (Arg((1, s, 5120), "outliers"), Arg((5120,), offset=1.0, scale=0.1)), big=True)
            for n, (s, _) in TOKENS.items()
        ),
    ]


@op(dims="b s d, d? -> b s d", kind="reduce", samples=_rms_samples)
def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension.

    Helios normalises queries and keys over all heads together (d = 5120), before the head split.

    Args:
        x: ``[b, s, d]``.
        weight: ``[d]``.
        eps: added to the mean of squares.

    Returns:
        ``[b, s, d]`` in the dtype of x; computed in at least float32, rounded once.
    """
    acc = accumulator(x.dtype)
    wide = x.to(acc)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        wide = wide * weight.to(acc)
    return wide.to(x.dtype)


def _ln_samples() -> list[Sample]:
    affine = (Arg((24,), offset=1.0, scale=0.1), Arg((24,), scale=0.1))
    return [
        Sample("small", (Arg((2, 5, 24)), None, None)),
        Sample("affine", (Arg((2, 5, 24)), *affine)),
        Sample("float32_out", (Arg((2, 5, 24)), None, None), {"dtype": F32}),
        Sample("tiny", (Arg((1, 9, 33), "tiny"), None, None)),
        # 64 wide: the mean of a constant row is exact in any order of the sum, or else rounding would show as variance.
        Sample("flat", (Arg((1, 9, 64), "flat"), None, None)),
        Sample("huge", (Arg((1, 7, 33), scale=HUGE), None, None)),
        Sample("outliers", (Arg((1, 17, 1536), "outliers"), None, None)),
        Sample("long", (Arg((1, LONG, 16)), None, None)),
        *(Sample(n, (Arg((1, s, 5120), "outliers"), None, None), big=True) for n, (s, _) in TOKENS.items()),
    ]


@op(dims="b s d, d?, d? -> b s d", kind="reduce", samples=_ln_samples)
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``(x − mean) / sqrt(var + eps) · weight + bias`` over the last dimension, with the biased variance.

    Args:
        x: ``[b, s, d]``.
        weight, bias: ``[d]``, any floating dtype.
        eps: added to the variance.
        dtype: of the output; ``None`` for that of x.

    Returns:
        ``[b, s, d]``; computed in at least float32, rounded once.
    """
    acc = accumulator(x.dtype)
    w = None if weight is None else weight.to(acc)
    b = None if bias is None else bias.to(acc)
    return F.layer_norm(x.to(acc), x.shape[-1:], w, b, eps).to(dtype or x.dtype)


def _rows(x: Tensor, row: Tensor, split: int, name: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """Pairs of (tokens, their row ``[b, 1, d]``)."""
    if row.shape[1] not in (1, 2):
        raise OpError(f"{name}: modulation {list(row.shape)} must have one or two rows")
    if not 0 <= split <= x.shape[1]:
        raise OpError(f"{name}: split {split} lies outside the {x.shape[1]} tokens")
    if row.shape[1] == 1:
        return ((x, row),)
    return (x[:, :split], row[:, :1]), (x[:, split:], row[:, 1:])


def _modulate_inputs(b: int, s: int, d: int, rows: int, x: Fill = "normal", scale: float = 1.0) -> tuple[Arg, ...]:
    return (
        Arg((b, s, d), x, scale=scale),
        Arg((b, rows, d), scale=0.3, dtype=F32),
        Arg((b, rows, d), scale=0.3, dtype=F32),
    )


def _modulate_samples() -> list[Sample]:
    return [
        Sample("two_rows", _modulate_inputs(2, 7, 24, 2), {"split": 3}),
        Sample("one_row", _modulate_inputs(2, 7, 24, 1), {"split": 0}),
        Sample("all_history", _modulate_inputs(1, 5, 33, 2), {"split": 5}),
        Sample("huge", _modulate_inputs(1, 7, 24, 2, scale=HUGE), {"split": 3}),
        Sample("long", _modulate_inputs(1, LONG, 16, 2), {"split": 8200}),
    ]


def _modulate_errors() -> list[ErrorCase]:
    return [
        ErrorCase("three_rows", _modulate_inputs(2, 7, 24, 3), {"split": 3}, "one or two rows"),
        ErrorCase("split", _modulate_inputs(2, 7, 24, 2), {"split": 8}, "outside the 7 tokens"),
        ErrorCase("width", (Arg((2, 7, 24)), Arg((2, 2, 23)), Arg((2, 2, 23))), {"split": 3}, "'d' is 23"),
    ]


@op(dims="b s d, b r d, b r d -> b s d", kind="round", samples=_modulate_samples, errors=_modulate_errors)
def modulate(x: Tensor, scale: Tensor, shift: Tensor, *, split: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """``x · (1 + scale) + shift`` with compact rows.

    Args:
        x: ``[b, s, d]``.
        scale, shift: ``[b, r, d]``, r = 1 or 2; float32 in a published run.
        split: tokens that take row 0 where r = 2.
        dtype: of the output; ``None`` for that of x.

    Returns:
        ``[b, s, d]``; computed in at least float32, rounded once.
    """
    acc = accumulator(x.dtype)
    parts = [
        torch.addcmul(b.to(acc), part.to(acc), 1.0 + a.to(acc))
        for (part, a), (_, b) in zip(
            _rows(x, scale, split, "modulate"), _rows(x, shift, split, "modulate"), strict=True
        )
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return out.to(dtype or x.dtype)


def _adaln_samples() -> list[Sample]:
    big = [Sample(n, _modulate_inputs(1, s, 5120, 2), {"split": h}, big=True) for n, (s, h) in TOKENS.items()]
    tiny = (Arg((1, 9, 33), "tiny"), Arg((1, 2, 33), scale=0.3, dtype=F32), Arg((1, 2, 33), scale=0.3, dtype=F32))
    rows = (Arg((1, 2, 183), scale=0.3, dtype=F32),) * 2
    outliers = Sample("outliers", (Arg((1, 17, 183), "outliers"), *rows), {"split": 9})
    flat = Sample("flat", _modulate_inputs(1, 9, 64, 2, "flat"), {"split": 4})
    return [*_modulate_samples(), Sample("tiny", tiny, {"split": 4}), flat, outliers, *big]


@op(dims="b s d, b r d, b r d -> b s d", kind="fused", samples=_adaln_samples, errors=_modulate_errors)
def adaln(x: Tensor, scale: Tensor, shift: Tensor, *, split: int = 0, eps: float = 1e-6) -> Tensor:
    """Adaptive layer norm: ``modulate(layer_norm(x), scale, shift)``, unrounded in between; output in x's dtype."""
    normed = layer_norm(x, eps=eps, dtype=accumulator(x.dtype))
    return modulate(normed, scale, shift, split=split, dtype=x.dtype)


def _gated_inputs(
    b: int, s: int, n: int, d: int, rows: int | None, fill: Fill = "normal", scale: float = 1.0
) -> tuple[Arg | None, ...]:
    return (
        Arg((b, s, d), fill, scale=scale),
        Arg((b, n, d), fill, scale=scale),
        None if rows is None else Arg((b, rows, d), scale=0.3, dtype=F32),
    )


def _gated_samples() -> list[Sample]:
    return [
        Sample("two_rows", _gated_inputs(2, 7, 7, 24, 2), {"gate_split": 3}),
        Sample("one_row", _gated_inputs(2, 7, 7, 24, 1), {"gate_split": 0}),
        Sample("tail", _gated_inputs(2, 7, 4, 24, None), {"gate_split": 0}),
        Sample("odd", _gated_inputs(1, 5, 5, 33, 2), {"gate_split": 4}),
        Sample("huge", _gated_inputs(1, 7, 7, 24, 2, scale=HUGE), {"gate_split": 3}),
        Sample("long", _gated_inputs(1, LONG, LONG, 16, 2), {"gate_split": 8200}),
        *(Sample(n, _gated_inputs(1, s, s, 5120, 2), {"gate_split": h}, big=True) for n, (s, h) in TOKENS.items()),
    ]


def _gated_errors() -> list[ErrorCase]:
    return [ErrorCase("longer", _gated_inputs(1, 5, 6, 24, None), {"gate_split": 0}, "has 6 tokens, x only 5")]


@op(dims="b s d, b n d, b r d? -> b s d", kind="round", samples=_gated_samples, errors=_gated_errors)
def gated_add(x: Tensor, y: Tensor, gate: Tensor | None = None, *, gate_split: int = 0) -> Tensor:
    """Residual: ``x + gate · y`` on the last n tokens of x; the tokens before them stay as they are.

    Args:
        x: the residual stream ``[b, s, d]``.
        y: the branch ``[b, n, d]``, n ≤ s.
        gate: ``[b, r, d]``, r = 1 or 2, float32 in a published run; ``None`` for 1.
        gate_split: tokens **of y** that take row 0 of the gate where r = 2.

    Returns:
        ``[b, s, d]`` in the dtype of x; computed in at least float32, rounded once.
    """
    s, n = x.shape[1], y.shape[1]
    if n > s:
        raise OpError(f"gated_add: y has {n} tokens, x only {s}")
    acc = accumulator(x.dtype)
    branch = y.to(acc)
    if gate is not None:
        parts = [part * row.to(acc) for part, row in _rows(branch, gate, gate_split, "gated_add")]
        branch = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    tail = (x[:, s - n :].to(acc) + branch).to(x.dtype)
    return tail if n == s else torch.cat((x[:, : s - n], tail), dim=1)


def _gated_adaln_samples() -> list[Sample]:
    def case(
        name: str, s: int, n: int, d: int, rows: int | None, split: int, tail: int, big: bool = False, b: int = 1
    ) -> Sample:
        row = Arg((b, 2, d), scale=0.3, dtype=F32)
        return Sample(name, (*_gated_inputs(b, s, n, d, rows), row, row), {"split": split, "gate_split": tail}, big)

    faint, row = Arg((1, 9, 33), "tiny"), Arg((1, 2, 33), scale=0.3, dtype=F32)
    even = Arg((1, 2, 64), scale=0.3, dtype=F32)
    peaks, wide = Arg((1, 17, 183), "outliers"), Arg((1, 2, 183), scale=0.3, dtype=F32)
    return [
        case("gated", 7, 7, 24, 2, 3, 3),
        case("batch", 7, 7, 24, 2, 3, 3, b=2),
        case("tail", 7, 4, 33, None, 3, 0),
        Sample("tiny", (faint, faint, row, row, row), {"split": 4, "gate_split": 4}),
        Sample("flat", (*_gated_inputs(1, 9, 9, 64, 2, "flat"), even, even), {"split": 4, "gate_split": 4}),
        Sample("huge", (*_gated_inputs(1, 9, 9, 33, 2, scale=HUGE), row, row), {"split": 4, "gate_split": 4}),
        Sample("outliers", (peaks, peaks, wide, wide, wide), {"split": 9, "gate_split": 9}),
        case("long", LONG, LONG, 16, 2, 8200, 8200),
        *(case(n, s, s, 5120, 2, h, h, True) for n, (s, h) in TOKENS.items()),
    ]


@op(dims="b s d, b n d, b q d?, b r d, b r d -> b s d, b s d", kind="fused", samples=_gated_adaln_samples)
def gated_add_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    split: int = 0,
    gate_split: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """A residual and the adaptive layer norm of its sum: both are needed, one pass over memory makes them.

    Returns:
        the sum ``[b, s, d]``, and ``adaln`` of it ``[b, s, d]``, both in the dtype of x.
    """
    total = gated_add(x, y, gate, gate_split=gate_split)
    normed = layer_norm(total, eps=eps, dtype=accumulator(x.dtype))
    return total, modulate(normed, scale, shift, split=split, dtype=x.dtype)
