"""Torch's own operators of the written list, computed by torch on the host; all others refused."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npu_emulator.memory import blocked, deep, host, on_npu, place
from npu_emulator.norms import standardized
from npu_emulator.products import coarse
from npu_emulator.rules import Refused
from npu_emulator.stand_in import hf32

__all__ = ["Entry", "allowed", "check", "computed", "overload"]

LIST = Path(__file__).parents[1] / "allowed.toml"
PRODUCTS = {"addmm": "matmul", "baddbmm": "matmul", "bmm": "matmul", "matmul": "matmul", "mm": "matmul"}
CUBE = {**PRODUCTS, "convolution": "conv"}
"""What the cube unit computes, and the switch that lets it round float32 first."""
COPIES = ("copy_", "clone", "_to_copy")


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What the list says of an operator. ``dtypes`` is empty where none are computed with."""

    kind: str
    dtypes: frozenset[torch.dtype]


@functools.cache
def allowed() -> Mapping[str, Entry]:
    """The list, by overload: ``add.Tensor``, ``silu``."""
    groups = tomllib.loads(LIST.read_text())["aten"]
    return {
        name: Entry(group["kind"], frozenset(getattr(torch, dtype) for dtype in group.get("dtypes", ())))
        for group in groups
        for name in group["ops"]
    }


def overload(name: str) -> Any:
    """The operator that the dispatcher calls by a name such as ``add.Tensor``."""
    base, _, variant = name.partition(".")
    return getattr(getattr(torch.ops.aten, base), variant or "default")


def check(name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse what is not on the list, or not in these dtypes."""
    entry = allowed().get(name)
    if entry is None:
        raise Refused(f"aten::{name} is not on the list of what may reach the device (tools/ascend/allowed.toml)")
    tensors: list[Tensor] = []
    deep((list(args), list(kwargs.values())), lambda x: tensors.append(x) if on_npu(x) else None)
    for x in tensors:
        if entry.dtypes and x.dtype not in entry.dtypes:
            raise Refused(f"aten::{name} of {x.dtype}: listed are {sorted(map(str, entry.dtypes))}")
    _check_blocks(name, tensors)


def _check_blocks(name: str, tensors: list[Tensor]) -> None:
    """Only products read blocks, and only in their second matrix."""
    if not any(blocked(x) for x in tensors):
        return
    at = 2 if name in ("addmm", "baddbmm") else 1
    fits = name in PRODUCTS and not any(blocked(x) for i, x in enumerate(tensors) if i != at)
    if not fits and name not in COPIES:
        raise Refused(f"aten::{name} of a tensor in FRACTAL_NZ")
    if fits and 1 in tensors[at].shape[-2:]:
        raise Refused(f"aten::{name} with a matrix {list(tensors[at].shape)} in FRACTAL_NZ: no size may be 1")


def computed(name: str) -> Callable[..., Any]:
    """An operator of the list as a function of device tensors."""
    op = overload(name)
    returns_first = any(r.alias_info is not None and r.alias_info.is_write for r in op._schema.returns)

    def run(*args: Any, **kwargs: Any) -> Any:
        check(name, args, kwargs)
        own = {key: "cpu" if key == "device" else value for key, value in kwargs.items()}
        to = kwargs.get("device")
        if own.get("pin_memory") is not None:
            own["pin_memory"] = False
        given = deep(list(args), _seen)
        own = {key: deep(value, _seen) for key, value in own.items()}
        own_or_torchs = functools.partial(_wide, op, CUBE[name]) if name in CUBE else OWN.get(name, op)
        result = own_or_torchs(*given, **own)
        if returns_first:
            return kwargs["out"] if "out" in kwargs else args[0]
        if name == "_local_scalar_dense":
            return result
        leaves = to is not None and torch.device(to).type != "npu"
        return result.clone() if leaves else deep(result, lambda x: place(x) if isinstance(x, Tensor) else x)

    return run


def _native_layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As aclnnLayerNorm writes it; torch on the host sums otherwise, so that a flat row of 16 bits is not 0 there."""
    if any(w is not None and w.dtype not in (x.dtype, torch.float32) for w in (weight, bias)):
        raise Refused("aten::native_layer_norm: weights are of the input's dtype, or float32")
    y, mean, rstd = standardized(x.float(), tuple(range(x.dim() - len(shape), x.dim())), eps)
    y = y if weight is None else y * weight.float()
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype), mean, rstd


OWN: Mapping[str, Callable[..., Any]] = {"native_layer_norm": _native_layer_norm}
"""What torch does not compute on the host as CANN documents it."""


def _seen(x: Any) -> Any:
    return host(x) if on_npu(x) else x


def _wide(op: Any, switch: str, *args: Any, **kwargs: Any) -> Tensor:
    """Sums in float32, one rounding; with float32's own rounding first where HF32 is on."""
    dtype = next(x.dtype for x in args if isinstance(x, Tensor))
    rounded = dtype == torch.float32 and hf32(switch)
    if {x.dtype for x in args if isinstance(x, Tensor)} != {dtype}:
        raise Refused(f"{op}: operands of different dtypes")

    def widen(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return coarse(x) if rounded and x.dim() > 1 else x.float()

    result: Tensor = op(*(widen(x) for x in args), **kwargs)
    return result.to(dtype)
