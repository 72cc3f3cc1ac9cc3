"""The backend class: which kernels there are, and what this host is."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from helios import op
from helios.backend import Backend, DeviceInfo, Kernel
from helios.lower import compile_kernels
from helios.ops import quantize
from helios.passes import Plan
from helios.program import Program
from helios_cpu import allocator, attention, elementwise, gemm
from helios_cpu.program import CpuProgram

__all__ = ["CpuBackend"]


class CpuBackend(Backend):
    """Runs on the host's cores, with as many threads as torch is set to use.

    It offers no precision with e4m3 numbers: hosts do not multiply them, so they would cost accuracy and time.
    """

    name = "cpu"
    fusions = ("adaln", "gated_add_adaln", "linear_gelu", "qk_norm_rope", "qkv_linear")

    def __init__(self, provider: str = "", index: int = 0) -> None:
        super().__init__(provider, index)
        # Where the cores have no bfloat16 products, bf16 is slower than fp32 and not the default.
        quick = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.precisions = ("bf16", "fp32", "fp64") if quick else ("fp32", "bf16", "fp64")
        core = (name for name in op.names() if op.get(name).kind != "fused" and name not in quantize.__all__)
        bodies = {name: Kernel(op.get(name).fn) for name in core}
        self.kernels: Mapping[str, Kernel] = {**bodies, **attention.KERNELS, **gemm.KERNELS, **elementwise.KERNELS}

    def devices(self) -> Sequence[DeviceInfo]:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        threads = torch.get_num_threads()
        return [DeviceInfo(0, f"{_model()}, {threads} thread{'s' * (threads > 1)}", pages * size)]

    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        allocator.keep_freed_memory()
        return compile_kernels(plan, self, fallback=fallback, program=CpuProgram)


def _model() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()
