"""Puts the emulation in the place of torch_npu's kernels, for all threads of the process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npu_emulator import aten, attention, norms, pointwise, products  # noqa: F401  (they enter their operators)
from npu_emulator.memory import FRACTAL_NZ, ND, blocked, deep, format_of, host, mark, on_npu, place
from npu_emulator.rules import OPERATORS, Refused
from npu_emulator.stand_in import blocks_allowed, load

__all__ = ["FORMATS", "check_format", "register"]

KEY, AUTOGRAD = "PrivateUse1", "AutogradPrivateUse1"
NATIVE = frozenset(
    # Bookkeeping of storages and pinned memory that launches nothing.
    ("is_pinned", "_pin_memory", "record_stream", "set_.source_Storage_storage_offset", "set_.source_Tensor")
)
_libraries: list[Any] = []


def register() -> None:
    """Once; torch_npu is loaded if it was not."""
    if _libraries:
        return
    load()
    keys = {key: set(torch._C._dispatch_get_registrations_for_dispatch_key(key)) for key in (KEY, AUTOGRAD)}
    for namespace, kernel in (("aten", _aten), ("npu", _npu)):
        library = torch.library.Library(namespace, "IMPL")
        _libraries.append(library)
        for key, names in keys.items():
            for full in sorted(names):
                space, _, name = full.partition("::")
                fn = kernel(name) if space == namespace else None
                if fn is not None:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # that there is a kernel already is the point
                        library.impl(name, fn, key)


def _aten(name: str) -> Callable[..., Any] | None:
    entry = aten.allowed().get(name)
    if name in NATIVE or (entry is not None and entry.kind == "view") or name.startswith("empty"):
        return None
    if entry is not None and entry.kind == "composed":
        return _contiguous if name == "contiguous" else None
    if name == "copy_":
        return _copy
    if entry is not None:
        return aten.computed(name)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        aten.check(name, args, kwargs)

    return refuse


def _contiguous(x: Tensor, *, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return x if x.is_contiguous(memory_format=memory_format) else x.clone(memory_format=memory_format)


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    aten.check("copy_", (to, source), {})
    if blocked(to):
        raise Refused("aten::copy_ into a tensor in FRACTAL_NZ")
    (host(to) if on_npu(to) else to).copy_(host(source) if on_npu(source) else source)
    return to


def _npu(name: str) -> Callable[..., Any] | None:
    if name in FORMATS:
        return FORMATS[name]
    if name not in OPERATORS:

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise Refused(f"npu::{name} is not emulated")

        return refuse

    def run(*args: Any, **kwargs: Any) -> Any:
        given = (list(args), kwargs)
        if any(blocked(x) for x in [*args, *kwargs.values()]) and name != "npu_linear":
            raise Refused(f"npu::{name} of a tensor in FRACTAL_NZ")
        on_host = deep(given[0], lambda x: host(x) if on_npu(x) else x)
        named = {key: host(x) if on_npu(x) else x for key, x in given[1].items()}
        result = OPERATORS[name](*on_host, **named)  # looked up here, so that a mutant can stand in its place
        return deep(result, lambda x: place(x) if isinstance(x, Tensor) else x)

    return run


def _format_cast(x: Tensor, acl_format: int, *_: Any, **options: Any) -> Tensor:
    """A copy in another format. Without ``allow_internal_format`` there are no blocks, whatever is asked for."""
    check_format(x, acl_format, **options)
    out = place(host(x))
    return mark(out) if acl_format == FRACTAL_NZ and blocks_allowed() else out


def check_format(x: Tensor, acl_format: int, *_: Any, **options: Any) -> None:
    """Refuse formats other than these two, blocks of anything but matrices of 16 bits, and casts along with them."""
    if any(value is not None for value in options.values()):
        raise Refused("npu_format_cast: casting dtypes along is not emulated")
    if acl_format not in (ND, FRACTAL_NZ):
        raise Refused(f"npu_format_cast: format {acl_format} is not emulated")
    if acl_format == FRACTAL_NZ and (x.dim() < 2 or x.dtype not in (torch.float16, torch.bfloat16)):
        raise Refused(f"npu_format_cast: FRACTAL_NZ of {x.dtype} {list(x.shape)}: wants matrices of 16 bits")


FORMATS: dict[str, Callable[..., Any]] = {"npu_format_cast": _format_cast, "get_npu_format": format_of}
