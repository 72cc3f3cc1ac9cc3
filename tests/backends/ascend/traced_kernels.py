"""Traces kernels that a test writes: ``python traced_kernels.py '[["silu", "lambda x: …"], …]'``."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType


def trace() -> ModuleType:
    """The module of the tool that traces, behind the rig."""
    from npu_emulator.stand_in import load

    load()
    path = Path(__file__).parents[3] / "tools" / "ascend" / "trace_kernels.py"
    spec = importlib.util.spec_from_file_location("ascend_trace", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrong(tracing: ModuleType, name: str, written: str) -> list[str]:
    """What the trace says of one line of a test."""
    import torch

    from helios import op
    from helios.backend import Kernel
    from helios_ascend import AscendBackend

    backend = AscendBackend()
    kernel = eval(written, {"torch": torch})  # noqa: S307
    backend.__dict__["kernels"] = {**backend.kernels, name: Kernel(kernel)}
    found: list[str] = tracing.traced(backend, name, op.get(name).samples()[0], "bf16").wrong
    return found


if __name__ == "__main__":
    tracing = trace()
    sys.stdout.write(json.dumps([wrong(tracing, name, written) for name, written in json.loads(sys.argv[1])]))
