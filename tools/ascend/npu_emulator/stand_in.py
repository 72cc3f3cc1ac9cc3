"""The real torch_npu over a runtime that computes nothing, in this process."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["RIG", "blocks_allowed", "hf32", "load"]

RIG = Path(__file__).parents[3] / ".ascend"
LIBRARIES = ("ascendcl", "acl_op_compiler", "hccl", "ge_runner", "graph", "acl_tdt_channel")
SETTINGS = {
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # of children that inherit the path: they load it here too, or not at all
    "TORCH_NPU_FALLBACK_CPU_DISABLE": "1",  # an operator without a kernel is refused, not computed on the host
    "TASK_QUEUE_ENABLE": "0",  # an operator that fails does so where it is called
}


def load() -> None:
    """Import torch_npu; once.

    Raises:
        FileNotFoundError: ``setup.sh`` has not built the runtime.
        ImportError: torch_npu does not fit this torch.
    """
    if "torch_npu" in sys.modules:
        return
    if not (RIG / "ready").exists():
        raise FileNotFoundError(f"{RIG} is not there")
    os.environ.update(SETTINGS)
    for name in LIBRARIES:
        ctypes.CDLL(str(RIG / "lib" / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
    sys.path.append(str(RIG / "site"))
    with _silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch_npu")
        torch.empty(1, device="npu")  # the first allocation has warnings of its own


def hf32(unit: str) -> bool:
    """Whether products of float32 may be rounded first, of ``matmul`` or of ``conv``: off and on, unless it was set."""
    torch_npu: Any = sys.modules["torch_npu"]
    return bool(getattr(torch_npu.npu, unit).allow_hf32)


def blocks_allowed() -> bool:
    """Whether ``torch.npu.config.allow_internal_format`` was set: it can be written only, here the option is read."""
    torch_npu: Any = sys.modules["torch_npu"]
    return bool(torch_npu._C._npu_getOption("ALLOW_INTERNAL_FORMAT") == b"enable")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing that C or C++ prints comes through: it says that there is no CANN, which is the point."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, nowhere = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        for number, file in enumerate(kept, 1):
            os.dup2(file, number)
            os.close(file)
        os.close(nowhere)
