"""Attention on Helios' lengths by every library that is there.

In memory the heads are inside the tokens (BSHD), outside (BHSD), or inside with q, k and v of a token side by side, as
a fused projection leaves them (QKV). Of our own kernels' figures each is one of their source: in bfloat16; in e4m3 with
quantising, as the plan of precision *fp8-attention* has it; and by itself, of operands that are quantised and laid.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import shapes
import torch
import torch.nn.functional as F
from environment import ROOT
from results import Item, NotThereError, Record
from rig import BOUNDS, Rig, Trial, error_of, spread_of, take
from shapes import Attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["items"]

E4M3 = torch.float8_e4m3fn
OURS = [
    ROOT / "backends" / "cuda" / "helios_cuda" / "kernels" / f"{name}.py"
    for name in ("attention", "attention_rows", "scaled_attention")
]
FP8_BOUND = 0.1
"""fp8 attention rounds operands and probabilities to three bits: a figure of its own, never one for bf16."""

SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
NO_KERNEL = ("No available kernel", "No viable backend")
"""What torch raises where a device or a build lacks the backend that was asked for."""
LIBRARIES = {"FA2": "flash_attn", "FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}
"""Modules that have ``flash_attn_func(q, k, v)`` on BSHD tensors, by what people call them."""


def items(rig: Rig) -> Iterator[Item]:
    """Every library on every length; shapes outermost, so that what stands in one row was measured close together."""
    for attention in shapes.attentions(rig.tiny):
        for name, backend in SDPA.items():
            for layout in ("BSHD", "BHSD", "QKV") if attention.q == attention.k else ("BSHD", "BHSD"):
                yield _item(rig, attention, f"{name} {layout}", _sdpa(backend), layout)
        for name, module in LIBRARIES.items():
            yield _item(rig, attention, name, _library(name, module), "BSHD")
        yield _item(rig, attention, "FA3 fp8", _fa3_fp8, "BSHD", E4M3, _narrowed)
        yield from _ours(rig, attention)
        if not rig.cuda:
            yield _item(rig, attention, "math BSHD", _sdpa(SDPBackend.MATH), "BSHD")


def _ours(rig: Rig, attention: Attention) -> Iterator[Item]:
    """Our kernels, in bfloat16 and e4m3 in turns."""
    version = hashlib.sha256(b"".join(path.read_bytes() for path in OURS)).hexdigest()[:8]
    layout = "QKV" if attention.q == attention.k else "BSHD"
    for column, call, prepare in (
        ("Triton", _flash, None),
        ("fp8 rows, Triton", _quantised, None),
        ("fp8 rows, laid", _attend, _laid),
    ):
        item = _item(
            rig, attention, column, call, layout, E4M3 if "fp8" in column else torch.bfloat16, prepare or _kept
        )
        yield dataclasses.replace(item, id=f"{item.id}/{version}")


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from helios_cuda.kernels.attention import flash  # which imports Triton, as those below

    return flash(q, k, v)


def _quantised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from helios_cuda.kernels.scaled_attention import quantized

    return quantized(q, k, v)


def _laid(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Any]:
    from helios_cuda.kernels.scaled_attention import operands

    return operands(q, k, v, None)


def _attend(q: Any, k: Any, v: Any) -> Tensor:
    from helios_cuda.kernels.scaled_attention import attend

    return attend(q, k, v, torch.bfloat16)


def _kept(*operands: Tensor) -> Sequence[Any]:
    return operands


def _narrowed(*operands: Tensor) -> Sequence[Any]:
    return [x.to(E4M3) for x in operands]


def _item(
    rig: Rig,
    attention: Attention,
    column: str,
    call: Callable[..., Tensor],
    layout: str,
    dtype: torch.dtype = torch.bfloat16,
    prepare: Callable[..., Sequence[Any]] = _kept,
) -> Item:
    """``call`` takes what ``prepare`` makes of q, k and v in bfloat16, outside the timing."""
    name = str(dtype).removeprefix("torch.")
    return Item(
        f"attention/{column}/{attention.row}",
        f"{attention.q} queries, {attention.k} keys, {attention.heads} heads of {attention.dim}, {column}",
        attention.row,
        column,
        lambda: _run(rig, attention, call, layout, dtype, prepare),
        counts={attention.stage: attention.count},
        fields={"shape": [attention.q, attention.k, attention.heads, attention.dim], "dtype": name},
    )


def _run(
    rig: Rig,
    attention: Attention,
    call: Callable[..., Tensor],
    layout: str,
    dtype: torch.dtype,
    prepare: Callable[..., Sequence[Any]],
) -> Record:
    if dtype == E4M3 or call is _flash:
        rig.need_cuda(f"attention by {call.__name__.strip('_')}")
    sets = rig.sets(lambda: _operands(rig, attention, layout))
    calls = [functools.partial(call, *prepare(*s)) for s in sets]
    read = (attention.q + 2 * attention.k) * (2 if prepare is _kept else dtype.itemsize)
    moved = attention.heads * attention.dim * (read + 2 * attention.q)
    rate = str(dtype).removeprefix("torch.")
    bound = BOUNDS["bfloat16"] if dtype == torch.bfloat16 else FP8_BOUND
    record = take(rig, Trial(calls, attention.flops, moved, lambda out: _error(out, *sets[0]), bound, rate))
    # If so, the projection that follows reads it as [tokens, heads · dim] without a copy.
    return {**record, "result_is_bshd": calls[0]().is_contiguous()}


def _operands(rig: Rig, attention: Attention, layout: str) -> Sequence[Tensor]:
    """q, k and v as ``[1, tokens, heads, dim]``, whatever lies in memory."""

    def make(tokens: int) -> Tensor:
        if layout == "BHSD":
            return rig.normal(1, attention.heads, tokens, attention.dim).transpose(1, 2)
        return rig.normal(1, tokens, attention.heads, attention.dim)

    if layout == "QKV":
        return rig.normal(1, attention.q, 3, attention.heads, attention.dim).unbind(2)
    return make(attention.q), make(attention.k), make(attention.k)


def _error(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Of some rows of all heads, against float64."""
    rows = spread_of(q.shape[1])
    wide_q, wide_k, wide_v = q[0, rows].double(), k[0].double(), v[0].double()
    scores = torch.einsum("rhd,khd->hrk", wide_q, wide_k) * q.shape[-1] ** -0.5
    return error_of(out[0, rows], torch.einsum("hrk,khd->rhd", scores.softmax(-1), wide_v))


def _sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        try:
            return plain(q, k, v).transpose(1, 2)
        except RuntimeError as error:
            if not any(text in str(error) for text in NO_KERNEL):
                raise
            raise NotThereError(f"torch has no {backend.name} kernel for this{_reasons(plain, q, k, v)}") from error

    return call


def _reasons(plain: Callable[[Tensor, Tensor, Tensor], Tensor], *operands: Tensor) -> str:
    """Why torch refuses, which it says in warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with contextlib.suppress(RuntimeError):
            plain(*operands)
    return "".join(f"; {str(warning.message).splitlines()[0]}" for warning in said)


def _library(name: str, module: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _output(_function(name, module)(q, k, v))

    return call


def _fa3_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ones = torch.ones(1, k.shape[2], device=q.device)
    function = _function("FA3", LIBRARIES["FA3"])
    return _output(function(q, k, v, q_descale=ones, k_descale=ones, v_descale=ones))


def _function(name: str, module: str) -> Callable[..., Any]:
    """``flash_attn_func`` of a module. Raises NotThereError with the reason."""
    try:
        found: Callable[..., Any] = importlib.import_module(module).flash_attn_func
    except (ImportError, OSError, AttributeError) as error:
        raise NotThereError(f"{name}: {error}") from error
    return found


def _output(result: Any) -> Tensor:
    """Some versions give the logarithms of the sums beside the result."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out
