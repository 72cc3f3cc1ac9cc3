"""Triton's interpreter: the same kernels, program by program in numpy on CPU tensors.

Triton reads the choice when it is first imported, since its own library of device functions is built then; so one
process either compiles or interprets. Nothing here imports it before that is settled.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator

import numpy as np

from helios.errors import BackendError

__all__ = ["as_a_gpu_would", "interpret", "interpreting"]

SWITCH = "TRITON_INTERPRET"


def interpret() -> None:
    """Have the interpreter run all kernels of this process.

    Raises:
        BackendError: Triton was imported for the compiler already.
    """
    if "triton" not in sys.modules:
        os.environ[SWITCH] = "1"
    if not interpreting():
        raise BackendError(
            "this process has Triton for the compiler already, so its interpreter comes too late",
            fix=f"use cuda:interpret in a process of its own, or set {SWITCH}=1 from the start",
        )


def interpreting() -> bool:
    """Whether kernels of this process run in the interpreter. Imports Triton."""
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    return not isinstance(tl.sum, JITFunction)


@contextlib.contextmanager
def as_a_gpu_would() -> Iterator[None]:
    """Within, numpy says nothing of NaN and Inf: they are results."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "All-NaN slice", RuntimeWarning
        )  # of a maximum; no floating-point error to it
        yield
