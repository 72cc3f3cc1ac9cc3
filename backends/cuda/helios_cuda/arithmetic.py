"""torch's switches for arithmetic that is less exact than the dtypes say, off while a program runs.

They belong to the process, and whoever set them may count on them: so they are set for one evaluation and put back.
Kernels read them when they are launched, and a captured graph keeps what it was captured with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["as_declared"]

_REDUCTIONS = (
    "allow_bf16_reduced_precision_reduction",  # partial sums of a split product in bfloat16
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


@contextlib.contextmanager
def as_declared() -> Iterator[None]:
    """Within, float32 is multiplied as float32, never as TF32, and every product and sum of 16-bit numbers accumulates
    in float32."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    saved = {name: _reduction(matmul, name) for name in _REDUCTIONS if hasattr(matmul, name)}
    with _no_tf32(matmul, matmul), _no_tf32(cudnn, cudnn.conv):
        try:
            for name in saved:
                setattr(matmul, name, False)
            yield
        finally:
            for name, value in saved.items():
                setattr(matmul, name, value)


def _reduction(matmul: Any, name: str) -> Any:
    """A switch as it may be set again; newer versions of torch have a second one behind some."""
    splits = f"{name}_split_k"
    value = getattr(matmul, name)
    return (value, getattr(matmul, splits)) if hasattr(matmul, splits) else value


@contextlib.contextmanager
def _no_tf32(old: Any, new: Any) -> Iterator[None]:
    """Both of torch's switches, the one of old and that of 2.9 on; torch refuses to tell the old one if they differ."""
    precision, allowed = new.fp32_precision, _told(lambda: old.allow_tf32)
    overall = _told(torch.get_float32_matmul_precision)
    try:
        if allowed:
            old.allow_tf32 = False
        new.fp32_precision = "ieee"
        yield
    finally:
        if allowed:
            old.allow_tf32 = True
            if overall is not None:  # the old switch knows no more than on and off, and it moved this one
                torch.set_float32_matmul_precision(overall)
        new.fp32_precision = precision


def _told(read: Callable[[], Any]) -> Any:
    """What a switch says, or None where torch refuses: then nobody else can be reading it either."""
    try:
        return read()
    except RuntimeError:
        return None
