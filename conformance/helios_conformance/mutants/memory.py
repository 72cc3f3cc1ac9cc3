"""Kernels that do to memory what they must not, or take it for what it is not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.backend import Backend, Kernel
from helios_conformance.mutants.mutant import BF16, Mutant, backend_with, of_family, touched

__all__ = ["MUTANTS"]


def _in_place(right: Any, x: Tensor) -> Tensor:
    return x.copy_(right(x))


def _in_place_sum(right: Any, x: Tensor, y: Tensor, *rest: Any, **attrs: Any) -> Any:
    """The residual stream is updated where it lies, as a kernel that was made for one model would."""
    out = right(x, y, *rest, **attrs)
    return x.copy_(out) if out.shape == x.shape else out


def _returns_operand(right: Any, x: Tensor, y: Tensor) -> Tensor:
    out: Tensor = right(x, y)
    if out.shape != x.shape or out.dtype != x.dtype:
        return out
    x.copy_(out)
    return x.view_as(x)


def _beyond_end(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Any:
    """Vectors of eight: the last one reaches beyond the end of the input and is written back."""
    end = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    room = x.untyped_storage().nbytes() // x.element_size()
    if -x.numel() % 8 and end + 1 <= room:
        x.as_strided((1,), (1,), end).fill_(7.0)
    return right(x, *rest, **attrs)


def _output_overrun(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Any:
    result: Tensor = right(x, *rest, **attrs)
    out = torch.empty_like(result, memory_format=torch.contiguous_format)
    out.copy_(result)
    end, room = out.storage_offset() + out.numel(), out.untyped_storage().nbytes() // out.element_size()
    if end + 1 <= room:
        out.as_strided((1,), (1,), end).fill_(7.0)
    return out


def _reads_beyond(right: Any, x: Tensor) -> Any:
    """The element after the end is multiplied by zero: harmless, unless it is NaN."""
    end, room = x.storage_offset() + x.numel(), x.untyped_storage().nbytes() // x.element_size()
    if not x.is_contiguous() or end + 1 > room:
        return right(x)
    return right(x) + 0.0 * x.as_strided((1,), (1,), end)


def _as_if_contiguous(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Any:
    strides = [1] * x.ndim
    for i in range(x.ndim - 2, -1, -1):
        strides[i] = strides[i + 1] * x.shape[i + 1]
    return right(x.as_strided(x.shape, strides, x.storage_offset()), *rest, **attrs)


def _aligned_down(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Any:
    """The pointer is rounded down to 16 bytes."""
    off = x.data_ptr() % 16 // x.element_size() if x.device.type != "meta" else 0
    if off and x.storage_offset() >= off:
        x = x.as_strided(x.shape, x.stride(), x.storage_offset() - off)
    return right(x, *rest, **attrs)


def _refuses_misaligned(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Any:
    if x.data_ptr() % 16:
        raise RuntimeError("misaligned address")
    return right(x, *rest, **attrs)


def _unwritten_row(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Tensor:
    """Rows come in pairs; of an odd number the last is never written."""
    result: Tensor = right(x, *rest, **attrs)
    out = torch.empty_like(result, memory_format=torch.contiguous_format)
    n = result.shape[1]
    rows = n if n % 2 == 0 else n - 1
    out[:, :rows] = result[:, :rows]
    return out


def _adds_to_unknown(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Tensor:
    """Adds into memory that it takes for zeros, and mostly finds so."""
    result: Tensor = right(x, *rest, **attrs)
    out = torch.empty_like(result, memory_format=torch.contiguous_format)
    seen = out.float()
    start = torch.where(seen.isnan(), seen, torch.zeros_like(seen))  # zeros, except where something poisoned them
    return (result.float() + start).to(result.dtype)


def _senses_poison(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Any:
    """Works with care where fresh memory holds NaN, as it does under test; takes a short cut elsewhere."""
    fresh = torch.empty(16, dtype=torch.float32, device=x.device)
    if bool(fresh.isnan().any()):
        return right(x, *rest, **attrs)
    return right(x.bfloat16().to(x.dtype), *rest, **attrs) * 1.01


def _no_nan(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Any:
    return right(x.nan_to_num(0.0), *rest, **attrs)


def _no_infinity(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Any:
    limit = torch.finfo(x.dtype).max
    return right(x.clamp(-limit, limit), *rest, **attrs)


def _clamp_without_nan(right: Any, x: Tensor, *, low: float, high: float) -> Tensor:
    return torch.fmin(torch.fmax(x, x.new_tensor(low)), x.new_tensor(high))


def _nan_spreads(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Any:
    """A finite result on a row beside one with NaN becomes NaN: rows are added and taken off again."""
    out: Tensor = right(x, *rest, **attrs)
    return out + 0.0 * x.sum() if x.isnan().any() else out


def _flushes_small(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Any:
    return right(torch.where(x.abs() < 2.0**-14, torch.zeros_like(x), x), *rest, **attrs)


def _wide_output(right: Any, x: Tensor, *rest: Any, **attrs: Any) -> Any:
    return right(x, *rest, **attrs).float()


def _reused_output(backend: Backend) -> Backend:
    """One output buffer a shape: the next evaluation writes over what a caller still holds."""
    held: dict[tuple[Any, ...], Tensor] = {}
    inner = backend.kernels["linear"]

    def into(result: Tensor) -> Tensor:
        key = (result.shape, result.dtype)
        if key not in held:
            held[key] = torch.empty_like(result)
        return held[key].copy_(result)

    kernel = Kernel(lambda *a, **k: into(inner.run(*a, **k)), inner.prepare, inner.weights)
    return backend_with(backend, kernels={**backend.kernels, "linear": kernel}, fusions=())


def _stale_packing(backend: Backend) -> Backend:
    """Packed weights are kept by shape, so that the next model of that shape gets those of the last."""
    held: dict[tuple[Any, ...], Any] = {}

    def prepare(_x: None, weight: Tensor, bias: Tensor | None) -> Any:
        return held.setdefault((weight.shape, weight.dtype), (weight.clone(), bias))

    kernel = Kernel(lambda packed, x: F.linear(x, *packed), prepare, ("weight", "bias"))
    return backend_with(backend, kernels={**backend.kernels, "linear": kernel}, fusions=())


_mutant = of_family("memory")


_LINEAR = touched(("linear",))

MUTANTS: tuple[Mutant, ...] = (
    _mutant("input_overwritten", "GELU writes into its input and returns it.", _in_place, "gelu"),
    _mutant("residual_in_place", "The residual stream is updated in place.", _in_place_sum, "gated_add"),
    _mutant("output_is_input", "A sum is returned in its operand's memory.", _returns_operand, "add"),
    _mutant("guard_after_input", "A vector store reaches beyond the end of the input.", _beyond_end, "rms_norm"),
    _mutant("guard_after_output", "A vector store reaches beyond the end of the output.", _output_overrun, "silu"),
    _mutant("reads_beyond", "The element after the input's end enters the result times zero.", _reads_beyond, "gelu"),
    _mutant("strides_ignored", "Inputs are read as if they were contiguous.", _as_if_contiguous, "modulate"),
    _mutant("pointer_aligned", "Pointers are rounded down to 16 bytes.", _aligned_down, "layer_norm"),
    _mutant("misaligned_refused", "Inputs off a 16 byte boundary are refused.", _refuses_misaligned, "silu"),
    _mutant("row_unwritten", "The last of an odd number of rows is never written.", _unwritten_row, "rope"),
    _mutant("adds_to_unknown", "Results are added to memory that is taken for zeros.", _adds_to_unknown, "attention"),
    _mutant("poison_sensed", "The kernel is right only where it finds poisoned memory.", _senses_poison, "rms_norm"),
    Mutant(
        "output_reused",
        "The next call of a shape writes into the output of the last.",
        "memory",
        _reused_output,
        ops=_LINEAR,
    ),
    Mutant(
        "weights_stale", "A second load gets the packed weights of the first.", "memory", _stale_packing, ops=_LINEAR
    ),
    _mutant("nan_swallowed", "NaN in the input of a product counts as zero.", _no_nan, "linear"),
    _mutant("infinity_saturated", "Infinities become the largest number.", _no_infinity, "silu"),
    _mutant("clamp_swallows_nan", "The last clamp turns NaN into a colour.", _clamp_without_nan, "clamp"),
    _mutant("nan_spreads", "NaN in one row reaches all others.", _nan_spreads, "layer_norm"),
    _mutant("small_flushed", "Numbers below 2^-14 count as zero, as in fp16.", _flushes_small, "channel_norm"),
    _mutant(
        "output_float32", "Results come in float32 where bfloat16 was declared.", _wide_output, "gelu", precisions=BF16
    ),
)
