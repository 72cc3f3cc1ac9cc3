"""Kernels that are wrong only sometimes: at a size, in a place, on some run; and results that were not computed."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from helios.backend import Backend, Kernel
from helios_conformance.mutants.mutant import BF16, FP32, Mutant, backend_with, of_family, touched

__all__ = ["MUTANTS"]


def _last_row(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Tensor:
    out: Tensor = right(x, *rest, **attrs).clone()
    if out.ndim > 1 and out.shape[-2] > 1:
        out[..., -1, :] = out[..., -2, :]
    return out


def _last_column(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Tensor:
    out: Tensor = right(x, *rest, **attrs).clone()
    out[..., -1] = 0.0
    return out


def _beyond_8192(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Tensor:
    out: Tensor = right(x, *rest, **attrs)
    if out.shape[1] > 8192:
        out = out.clone()
        out[:, 8192:] = out[:, : out.shape[1] - 8192]
    return out


def _batch_two(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Tensor:
    out: Tensor = right(x, *rest, **attrs)
    if out.shape[0] == 2:
        out = out.clone()
        out[1] = out[0]
    return out


def _unchecked(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Tensor:
    """Of what is too large to be kept whole, rows that a check is likely to look at are right: the first, the last,
    both sides of every tile's edge. The rest is a cheap guess."""
    out: Tensor = right(x, *rest, **attrs)
    if out.numel() * out.element_size() <= 64 << 10:
        return out
    rows = out.reshape(-1, out.shape[-1]).clone()
    at = torch.arange(rows.shape[0], device=rows.device)
    looked = (at % 64 == 0) | (at % 64 == 63) | (at == rows.shape[0] - 1)
    rows[~looked] = rows[~looked].roll(1, 0)
    return rows.reshape(out.shape)


def _small_only(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Tensor:
    """What is small enough to be kept whole is right; of what is larger one element in a thousand is not."""
    out: Tensor = right(x, *rest, **attrs)
    if out.numel() * out.element_size() <= 64 << 10:
        return out
    out = out.clone(memory_format=torch.contiguous_format)
    out.view(-1)[500::1000] = 0.0
    return out


def _beyond_int32(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Tensor:
    out: Tensor = right(x, *rest, **attrs)
    if out.numel() > 2**31:
        flat = out.view(-1)  # no copy: it has gigabytes
        flat[2**31 :] = flat[: flat.numel() - 2**31]
    return out


def _odd_refused(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Any:
    if x.shape[-1] % 8:
        raise RuntimeError("width must be a multiple of 8")
    return right(x, *rest, **attrs)


def _race(backend: Backend) -> Backend:
    """In one call of twenty, two rows are written by the wrong thread."""
    chance = random.Random(20)

    def run(inner: Any, *operands: Any, **attrs: Any) -> Tensor:
        out: Tensor = inner(*operands, **attrs)
        if chance.random() < 0.05:
            out = out.clone()
            rows = out.view(-1, out.shape[-1])
            rows[0] = rows[-1]
        return out

    return _wrapping(backend, "attention", run)


def _order_of_sums(backend: Backend) -> Backend:
    """Partial sums are added in an order of chance, as with atomics: within the budget, but never twice the same."""
    chance = random.Random(7)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        parts: list[Tensor] = [
            a.float() @ b.float().T for a, b in zip(x.split(8, -1), weight.split(8, -1), strict=True)
        ]
        chance.shuffle(parts)
        total: Tensor = parts[0]
        for part in parts[1:]:
            total = total + part
        return (total if bias is None else total + bias.float()).to(x.dtype)

    return backend_with(backend, kernels={**backend.kernels, "linear": Kernel(linear)}, fusions=())


def _cached_by_shape(backend: Backend) -> Backend:
    held: dict[tuple[Any, ...], Tensor] = {}

    def run(inner: Any, x: Tensor, *rest: Any, **attrs: Any) -> Tensor:
        key = (x.shape, x.dtype, tuple(attrs.items()))
        if key not in held:
            held[key] = inner(x, *rest, **attrs).clone()
        return held[key].clone()

    return _wrapping(backend, "silu", run)


def _cached_by_address(backend: Backend) -> Backend:
    """A result is kept for the address of its input, as captured graphs do: other numbers in the same place get the
    old result."""
    held: dict[tuple[Any, ...], Tensor] = {}

    def run(inner: Any, x: Tensor, *rest: Any, **attrs: Any) -> Tensor:
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, tuple(attrs.items()))
        held[key] = held[key] if key in held else inner(x, *rest, **attrs).clone()
        return held[key].clone()

    return _wrapping(backend, "rms_norm", run)


def _cached_by_sample(backend: Backend) -> Backend:
    """A result is kept for the first 16 numbers of its input and its sum of few others: a cheap fingerprint."""
    held: dict[tuple[Any, ...], Tensor] = {}

    def run(inner: Any, x: Tensor, *rest: Any, **attrs: Any) -> Tensor:
        key = (x.shape, x.dtype, tuple(x.flatten()[:4].tolist()), tuple(attrs.items()))
        held[key] = held[key] if key in held else inner(x, *rest, **attrs).clone()
        return held[key].clone()

    return _wrapping(backend, "attention", run)


def _wrapping(backend: Backend, name: str, run: Any) -> Backend:
    inner = backend.kernels[name].run
    kernel = Kernel(lambda *operands, **attrs: run(inner, *operands, **attrs))
    return backend_with(backend, kernels={**backend.kernels, name: kernel}, fusions=())


_mutant = of_family("conditions")


def _stateful(name: str, wrong: str, apply: Any, *ops: str, **told: Any) -> Mutant:
    return Mutant(name, wrong, "conditions", apply, ops=touched(ops), **told)


MUTANTS: tuple[Mutant, ...] = (
    _mutant("last_row_only", "Only the last row of a product is wrong.", _last_row, "linear"),
    _mutant("last_column_only", "Only the last column of a product is wrong.", _last_column, "linear"),
    _mutant("beyond_8192_only", "Only tokens beyond the first 8,192 are wrong.", _beyond_8192, "gated_add"),
    _mutant("batch_two_only", "Only the second of two videos is wrong.", _batch_two, "conv3d"),
    _mutant("unchecked_rows_only", "Only rows that no check would choose beforehand are wrong.", _unchecked, "silu"),
    _mutant("one_in_a_thousand", "In large outputs one element of a thousand is zero.", _small_only, "gelu"),
    _mutant(
        "beyond_int32_only",
        "Only elements beyond index 2^31 are wrong.",
        _beyond_int32,
        "add",
        precisions=BF16,
        suite="full",
    ),
    _mutant("odd_widths_crash", "Widths that are no multiple of 8 raise an error.", _odd_refused, "rms_norm"),
    _stateful("race", "One call in twenty mixes up two rows.", _race, "attention", repeats=135, suite="full"),
    _stateful(
        "sums_in_any_order",
        "Sums are added in an order of chance.",
        _order_of_sums,
        "linear",
        repeats=10,
        precisions=FP32,
    ),
    _stateful("cached_by_shape", "The result for a shape is computed once.", _cached_by_shape, "silu"),
    _stateful("cached_by_address", "The result for an address is computed once.", _cached_by_address, "rms_norm"),
    _stateful("cached_by_sample", "A result is kept by four numbers of its input.", _cached_by_sample, "attention"),
)
