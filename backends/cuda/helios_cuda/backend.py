"""The backend class: what this machine can run, which kernels there are, and how graphs become programs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor

from helios import op
from helios.backend import Backend, DeviceInfo, Kernel
from helios.errors import InputError
from helios.graph import Node
from helios.lower import compile_kernels
from helios.passes import Plan
from helios.program import Program
from helios_cuda import failures, gemm, interpreter, probe, record, streams
from helios_cuda.attention import Chooser, forms
from helios_cuda.attention_libraries import describe
from helios_cuda.graphs import CudaRecorder, Recorder
from helios_cuda.later import Later
from helios_cuda.program import CudaProgram
from helios_cuda.staging import CudaLink, Landing, Link

__all__ = ["CudaBackend"]

INTERPRET = "interpret"
E4M3_FROM = (8, 9)
"""The first compute capability whose tensor cores multiply e4m3 numbers."""
OF_E4M3 = frozenset(
    ("quantized_attention", "quantized_linear", "quantized_qkv_linear", "scaled_attention", "scaled_linear")
)
"""Ops that multiply them."""


class CudaBackend(Backend):
    """Runs on one NVIDIA GPU, sm_80 and newer.

    Args:
        provider: "" for the GPU; ``interpret`` runs the same kernels in Triton's interpreter on the CPU: slow, and
            labelled emulated wherever its results show.
        index: of the GPU.
        options: ``memory``: ``full`` has all weights on the GPU, ``low`` keeps those that do not fit in host memory.
            ``graphs``: whether steps are captured as CUDA graphs and replayed. ``overlap``: whether chunks are decoded
            on a second stream while the next one is denoised.

    Attributes:
        eager: why steps run kernel by kernel; empty where they are captured.
        low: whether weights may stay in host memory.
    """

    name = "cuda"
    precisions = ("bf16", "fp16", "fp32", "fp8", "fp8-attention", "fp8-weights")
    vae_precisions: Mapping[str, str] = {
        # No tensor cores multiply in float32: convolutions would take the longest part of a chunk.
        **dict.fromkeys(("bf16", "fp8", "fp8-attention", "fp8-weights"), "bf16"),
        "fp16": "fp16",
    }
    fusions = (
        "adaln",
        "adaln_quantize",
        "channel_norm_silu",
        "gated_add_adaln",
        "gated_add_adaln_quantize",
        "gelu_quantize",
        "layer_norm_quantize",
        "linear_gelu",
        "packed_linear",
        "qk_norm_rope",
        "qkv_linear",
        "quantized_attention",
        "quantized_linear",
        "quantized_qkv_linear",
        "renoise_upsample",
        "unipc_step",
    )

    options: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "memory": ("full", "low"),
        "graphs": ("on", "off"),
        "overlap": ("off", "on"),
    }

    def __init__(self, provider: str = "", index: int = 0, **options: str) -> None:
        if provider not in ("", INTERPRET):
            raise InputError(f"backend 'cuda' has no provider {provider!r}", fix=f"cuda, cuda:1 or cuda:{INTERPRET}")
        super().__init__("", index, **options)
        self.low, graphs = self.chosen["memory"] == "low", self.chosen["graphs"] == "on"
        self._interpreted = provider == INTERPRET
        if self._interpreted:
            interpreter.interpret()
        self.emulated = "Triton's interpreter on the CPU" if self._interpreted else ""
        self.eager = "asked for" if not graphs else "the interpreter has no graphs" if self._interpreted else ""

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
        core = (name for name in op.names() if op.get(name).kind != "fused")
        return Later([*core, *self.fusions], lambda: {**_kernels(), "attention": Kernel(self.attention.run)})

    @functools.cached_property
    def attention(self) -> Chooser:
        """Which library runs attention. Before a program is compiled it can be told: ``backend.attention.use(...)``."""
        return Chooser(self.device)

    def supports(self, node: Node) -> str | None:
        had = self._capability
        if node.op in OF_E4M3 and had is not None and had < E4M3_FROM:
            return f"only GPUs from sm_89 on multiply e4m3 numbers, this is sm_{had[0]}{had[1]}: take fp8-weights"
        return super().supports(node)

    @functools.cached_property
    def _capability(self) -> tuple[int, int] | None:
        """Of the GPU; None where there is none to ask."""
        there = not self._interpreted and torch.cuda.is_available()
        return torch.cuda.get_device_capability(self.device) if there else None

    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        program = compile_kernels(plan, self, fallback=fallback, program=CudaProgram)
        with self.explained("the choice of attention"):
            self.attention.settle(forms(plan))
        self._settle_others(plan)
        return program

    def _settle_others(self, plan: Plan) -> None:
        if self._interpreted:
            return
        from helios_cuda import convolution, scaled  # which import Triton

        described = str(describe(self.device))
        with self.explained("the choice of convolutions"):
            convolution.settle(convolution.forms(plan), self.device, described)
        with self.explained("the choice of products of e4m3 numbers"):
            scaled.settle(scaled.forms(plan), self.device, described)

    def synchronize(self) -> None:
        if not self._interpreted:
            with self.explained("its work"):
                torch.cuda.synchronize(self.device)

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return super().mark()
        with self.explained("its work"):
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event

    def seconds_between(self, first: Any, second: Any) -> float:
        if self.device.type != "cuda":
            return super().seconds_between(first, second)
        with self.explained("its work"):
            second.synchronize()
            return float(first.elapsed_time(second)) / 1e3

    @property
    def overlaps(self) -> bool:
        return self.chosen["overlap"] == "on" and not self._interpreted

    @contextlib.contextmanager
    def beside(self, *tensors: Tensor) -> Iterator[None]:
        with self.explained("its work"), streams.beside(self.device, tensors) if self.overlaps else super().beside():
            yield

    def fetch(self, tensor: Tensor) -> Tensor:
        if tensor.device.type in ("cpu", "meta") or self._landing is None:
            return super().fetch(tensor)
        with self.explained("its work"):
            return self._landing.fetch(tensor)

    @functools.cached_property
    def _landing(self) -> Landing | None:
        link = self.link()
        return None if link is None else Landing(link)

    def explained(self, doing: str) -> AbstractContextManager[None]:
        return failures.explained(doing, self.label, self.memory)

    def memory(self) -> tuple[int, int] | None:
        return None if self._interpreted else torch.cuda.mem_get_info(self.device)

    def reusable(self) -> int:
        """Bytes that this process has taken from the device and does not use."""
        if self._interpreted:
            return 0
        return torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def recorder(self) -> Recorder | None:
        """What captures the steps of one program."""
        return None if self.eager else CudaRecorder(self.device)

    def link(self) -> Link | None:
        """How host and device exchange tensors while both work."""
        return None if self._interpreted else CudaLink(self.device)

    def execution_plan(self) -> dict[str, Any]:
        """What a run on this backend depends on, as JSON values; see ``record.execution_plan``."""
        return record.execution_plan(self)

    def use_execution_plan(self, plan: Mapping[str, Any]) -> None:
        self.attention.use(plan.get("attention", {}))
        if plan.get("convolution"):
            from helios_cuda import convolution  # which imports Triton

            convolution.CHOICES.replay(plan["convolution"], str(describe(self.device)))
        if plan.get("scaled"):
            from helios_cuda import scaled  # which imports Triton

            scaled.CHOICES.replay(plan["scaled"], str(describe(self.device)))

    @property
    def label(self) -> str:
        return f"{self.name}:{INTERPRET}" if self._interpreted else super().label


def _kernels() -> Mapping[str, Kernel]:
    """All kernels by op name. Imports Triton."""
    from helios_cuda import convolution, packed, scaled
    from helios_cuda.kernels import KERNELS

    bodies = {name: Kernel(op.get(name).fn) for name in op.names() if op.get(name).kind != "fused"}
    return {**bodies, **gemm.KERNELS, **convolution.KERNELS, **scaled.KERNELS, **packed.KERNELS, **KERNELS}
