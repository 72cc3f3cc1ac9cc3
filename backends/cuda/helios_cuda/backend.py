"""The backend class: what this machine can run, which kernels there are, and how graphs become programs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from helios import op
from helios.backend import Backend, DeviceInfo, Kernel
from helios.errors import InputError
from helios.lower import compile_kernels
from helios.passes import Plan
from helios.program import Program
from helios_cuda import gemm, interpreter, probe
from helios_cuda.program import CudaProgram

__all__ = ["CudaBackend"]

INTERPRET = "interpret"


class CudaBackend(Backend):
    """Runs on one NVIDIA GPU, sm_80 and newer.

    Args:
        provider: "" for the GPU; ``interpret`` runs the same kernels in Triton's interpreter on the CPU: slow, and
            labelled emulated wherever its results show.
        index: of the GPU.
    """

    name = "cuda"
    precisions = ("bf16", "fp32")
    fusions = (
        "adaln",
        "gated_add_adaln",
        "linear_gelu",
        "qk_norm_rope",
        "qkv_linear",
        "renoise_upsample",
        "unipc_step",
    )

    def __init__(self, provider: str = "", index: int = 0) -> None:
        if provider not in ("", INTERPRET):
            raise InputError(f"backend 'cuda' has no provider {provider!r}", fix=f"cuda, cuda:1 or cuda:{INTERPRET}")
        super().__init__("", index)
        self._interpreted = provider == INTERPRET
        if self._interpreted:
            interpreter.interpret()
        self.emulated = "Triton's interpreter on the CPU" if self._interpreted else ""

    def devices(self) -> Sequence[DeviceInfo]:
        if self._interpreted:
            probe.require_triton()
            return [DeviceInfo(0, "Triton's interpreter on the CPU")]
        return probe.devices()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self._interpreted else torch.device("cuda", self.index)

    @functools.cached_property
    def kernels(self) -> Mapping[str, Kernel]:  # type: ignore[override]
        from helios_cuda.kernels import KERNELS

        bodies = {name: Kernel(op.get(name).fn) for name in op.names() if op.get(name).kind != "fused"}
        return {**bodies, **gemm.KERNELS, **KERNELS}

    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        return compile_kernels(plan, self, fallback=fallback, program=CudaProgram)

    def synchronize(self) -> None:
        if not self._interpreted:
            torch.cuda.synchronize(self.device)

    def memory(self) -> tuple[int, int] | None:
        return None if self._interpreted else torch.cuda.mem_get_info(self.device)

    @property
    def label(self) -> str:
        return f"{self.name}:{INTERPRET}" if self._interpreted else super().label
