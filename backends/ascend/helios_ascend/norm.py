"""Norms, modulation and gated residuals: whole tensors in as few operators as give one rounding.

**Modulation is the affine part of a layer norm.** aclnnLayerNorm takes float32 weight and bias beside an input of 16
bits, so ``1 + scale`` and ``shift`` go there as they are: statistics, modulation and the one rounding in one operator.
Two rows (history, noisy tokens) are two such norms. The first covers all tokens with the row of the longer part; the
second does the shorter part again and is copied over it, which moves less than joining two parts would.

**Residuals.** ``gate · y`` of a float32 gate and a 16-bit branch is float32 by torch's rules, the sum with x as well,
and only that is rounded. Without a gate the sum is one operator; and with a norm behind it, one for both
(``npu_add_layer_norm``), where the branch covers exactly one row of the modulation: the cross-attention's residual.

=================  =============================================  ========
op, two rows       operators                                      launches
=================  =============================================  ========
``adaln``          2 gains, 2 norms, a copy                       5
``gated_add``      2 products, a copy, a sum, a cast              5
the same, no gate  a sum, a concatenation                         2
=================  =============================================  ========
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from helios.backend import Kernel
from helios_ascend import operators

__all__ = ["KERNELS"]

F32 = torch.float32


class Part(NamedTuple):
    """Tokens start to stop, which take this row of the modulation."""

    row: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def _parts(rows: int, split: int, tokens: int) -> list[Part]:
    """The longest first; none is empty, unless there are no tokens at all."""
    found = [Part(0, 0, tokens)] if rows == 1 else [Part(0, 0, split), Part(1, split, tokens)]
    filled = [part for part in found if part.length] or found[:1]
    return sorted(filled, key=lambda part: -part.length)


def _by_row(x: Tensor, parts: list[Part], compute: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``compute(tokens, row)`` of each part of ``[1, s, d]``, contiguous."""
    longest, *rest = parts
    out = compute(x, longest.row)
    for part in rest:
        out[:, part.start : part.stop].copy_(compute(x[:, part.start : part.stop], part.row))
    return out


def _each(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The videos of a batch, each ``[1, s, d]`` and contiguous."""
    whole = x.contiguous()
    return ((i, whole[i : i + 1]) for i in range(x.shape[0]))


def _joined(videos: list[Tensor]) -> Tensor:
    return videos[0] if len(videos) == 1 else torch.cat(videos)


# --- norms ------------------------------------------------------------------------------------------------------------


def _rms_norm(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    """In the dtype of x where the weight has it too: the operator widens to float32 inside and rounds once."""
    gamma = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device) if weight is None else weight.contiguous()
    if gamma.dtype == x.dtype:
        return operators.rms_norm(x.contiguous(), gamma, eps)
    return operators.rms_norm(x.contiguous().to(F32), gamma.to(F32), eps).to(x.dtype)


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, dtype: torch.dtype | None
) -> Tensor:
    affine = [None if row is None else row.contiguous() for row in (weight, bias)]
    kinds = {row.dtype for row in affine if row is not None}
    if len(kinds) > 1 or not kinds <= {x.dtype, F32}:
        affine = [None if row is None else row.to(F32) for row in affine]
    if dtype in (None, x.dtype):
        return operators.layer_norm(x.contiguous(), affine[0], affine[1], eps)
    gamma, beta = (None if row is None else row.to(F32) for row in affine)
    return operators.layer_norm(x.contiguous().to(F32), gamma, beta, eps).to(dtype)


def _adaln(x: Tensor, scale: Tensor, shift: Tensor, *, split: int, eps: float) -> Tensor:
    parts = _parts(scale.shape[1], split, x.shape[1])
    return _joined([_by_row(one, parts, _Modulated(scale[i], shift[i], eps)) for i, one in _each(x)])


class _Modulated:
    """The layer norm of tokens with a row ``[d]`` of scale and shift, in float32, as its affine part."""

    def __init__(self, scale: Tensor, shift: Tensor, eps: float) -> None:
        self._scale, self._shift, self._eps = scale, shift, eps

    def row(self, row: int) -> tuple[Tensor, Tensor]:
        """gamma and beta: slices of a row, contiguous whatever the rows' own strides are."""
        return self._scale[row].contiguous().to(F32) + 1.0, self._shift[row].contiguous().to(F32)

    def __call__(self, tokens: Tensor, row: int) -> Tensor:
        gamma, beta = self.row(row)
        return operators.layer_norm(tokens, gamma, beta, self._eps)


def _modulate(x: Tensor, scale: Tensor, shift: Tensor, *, split: int, dtype: torch.dtype | None) -> Tensor:
    parts = _parts(scale.shape[1], split, x.shape[1])

    def one(i: int, tokens: Tensor) -> Tensor:
        affine = _Modulated(scale[i], shift[i], 0.0)

        def compute(part: Tensor, row: int) -> Tensor:
            gain, bias = affine.row(row)
            return (part * gain).add_(bias)

        return _by_row(tokens, parts, compute).to(dtype or x.dtype)

    return _joined([one(i, tokens) for i, tokens in _each(x)])


# --- residuals --------------------------------------------------------------------------------------------------------


def _gated_add(x: Tensor, y: Tensor, gate: Tensor | None, *, gate_split: int) -> Tensor:
    if gate is None:
        return _joined([_sum(one, y[i : i + 1].contiguous()) for i, one in _each(x)])
    parts = _parts(gate.shape[1], gate_split, y.shape[1])
    return _joined([_gated(one, y[i : i + 1].contiguous(), gate[i], parts) for i, one in _each(x)])


def _sum(x: Tensor, y: Tensor) -> Tensor:
    """``x + y`` on the last tokens of x."""
    skipped = x.shape[1] - y.shape[1]
    return _behind(x[:, :skipped], (x[:, skipped:] + y).to(x.dtype))


def _gated(x: Tensor, y: Tensor, gate: Tensor, parts: list[Part]) -> Tensor:
    skipped = x.shape[1] - y.shape[1]
    branch = _by_row(y, parts, lambda tokens, row: tokens * gate[row].contiguous().to(F32))
    return _behind(x[:, :skipped], branch.add_(x[:, skipped:]).to(x.dtype))


def _behind(head: Tensor, tail: Tensor) -> Tensor:
    return torch.cat((head, tail), dim=1) if head.shape[1] else tail


def _gated_add_adaln(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, *, split: int, gate_split: int, eps: float
) -> tuple[Tensor, Tensor]:
    skipped = x.shape[1] - y.shape[1]
    parts = sorted(_parts(scale.shape[1], split, x.shape[1]), key=lambda part: part.start)
    if gate is not None or x.dtype != y.dtype or parts[-1].start != skipped:
        total = _gated_add(x, y, gate, gate_split=gate_split)
        return total, _adaln(total, scale, shift, split=split, eps=eps)
    pairs = [
        _added(one, y[i : i + 1].contiguous(), _Modulated(scale[i], shift[i], eps), parts, eps) for i, one in _each(x)
    ]
    return _joined([total for total, _ in pairs]), _joined([normed for _, normed in pairs])


def _added(x: Tensor, y: Tensor, affine: _Modulated, parts: list[Part], eps: float) -> tuple[Tensor, Tensor]:
    """The branch covers the last part alone: its sum and norm in one operator, the norm of the others by themselves."""
    *before, last = parts
    total, normed = operators.add_layer_norm(x[:, last.start :], y, *affine.row(last.row), eps)
    if not before:
        return total, normed
    head = x[:, : last.start]
    return _behind(head, total), _behind(affine(head, before[0].row), normed)


KERNELS = {
    "adaln": Kernel(_adaln),
    "gated_add": Kernel(_gated_add),
    "gated_add_adaln": Kernel(_gated_add_adaln),
    "layer_norm": Kernel(_layer_norm),
    "modulate": Kernel(_modulate),
    "rms_norm": Kernel(_rms_norm),
}
