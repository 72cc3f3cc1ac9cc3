"""The backend class: what this machine can run, which kernels there are, and how graphs become programs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor

from helios import op
from helios.backend import Backend, DeviceInfo, Kernel
from helios.errors import BackendError, InputError
from helios.graph import Node
from helios.lower import compile_kernels
from helios.passes import Plan
from helios.program import Program
from helios_ascend import (
    attention,
    failures,
    layout,
    norm,
    operators,
    pointwise,
    probe,
    products,
    rope,
    sampler,
    streams,
)
from helios_ascend import video as vae
from helios_ascend.program import AscendProgram
from helios_ascend.recorders import Recorder, recorder
from helios_ascend.supports import refusal

__all__ = ["AscendBackend"]

EMULATED = "emulated"
STAND_IN = "CANN's stand-in: operators computed by their documentation on the CPU"
FAMILIES = (attention, layout, norm, pointwise, products, rope, sampler, vae)


class AscendBackend(Backend):
    """Runs on one Ascend NPU of the 910B or 910C; of a 910C, on one of its two dies, which is a device of its own.

    Args:
        provider: "" for the NPU; ``emulated`` computes the operators by their documentation on the CPU: slow, and
            labelled wherever its results show.
        index: of the NPU.
        options: ``graphs``: how steps run: kernel by kernel, captured as NPU graphs, or compiled by torchair.
            ``overlap``: whether chunks are decoded on a second stream while the next one is denoised.
    """

    name = "ascend"
    precisions = ("bf16", "fp16", "fp32")
    vae_precisions: Mapping[str, str] = {"bf16": "bf16", "fp16": "fp16"}
    """The cube unit multiplies float32 at a fraction of the rate, and convolutions are most of decoding."""
    fusions = ("adaln", "channel_norm_silu", "gated_add_adaln", "qk_norm_rope")
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "graphs": ("off", "npu", "torchair"),
        "overlap": ("off", "on"),
    }

    def __init__(self, provider: str = "", index: int = 0, **options: str) -> None:
        if provider not in ("", EMULATED):
            raise InputError(
                f"backend 'ascend' has no provider {provider!r}", fix=f"ascend, ascend:1 or ascend:{EMULATED}"
            )
        super().__init__("", index, **options)
        self._emulated = provider == EMULATED
        self.emulated = STAND_IN if self._emulated else ""

    def devices(self) -> Sequence[DeviceInfo]:
        if self._emulated:
            self._begin()
            return [DeviceInfo(0, "Ascend NPU, emulated on the CPU")]
        return probe.devices()

    @functools.cached_property
    def device(self) -> torch.device:
        self._begin()
        return torch.device("npu", self.index)

    @functools.cached_property
    def _begun(self) -> bool:
        if self._emulated:
            importlib.import_module("helios_ascend.emulation").enter()
        operators.begin()
        return True

    def _begin(self) -> None:
        """torch knows the device, and arithmetic is as the dtypes say; once."""
        assert self._begun

    @functools.cached_property
    def kernels(self) -> Mapping[str, Kernel]:  # type: ignore[override]
        bodies = {name: Kernel(op.get(name).fn) for name in ("full", "rope_table")}  # constants, made on the host
        return {**bodies, **{name: kernel for family in FAMILIES for name, kernel in family.KERNELS.items()}}

    def supports(self, node: Node) -> str | None:
        return super().supports(node) or refusal(node)

    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        self._begin()
        return compile_kernels(plan, self, fallback=fallback, program=AscendProgram)

    def synchronize(self) -> None:
        with self.explained("its work"):
            streams.npu().synchronize(self.device)

    def mark(self) -> Any:
        if self._emulated:
            return super().mark()
        with self.explained("its work"):
            event = streams.npu().Event(enable_timing=True)
            event.record(streams.npu().current_stream(self.device))
            return event

    def seconds_between(self, first: Any, second: Any) -> float:
        if self._emulated:
            return super().seconds_between(first, second)
        with self.explained("its work"):
            second.synchronize()
            return float(first.elapsed_time(second)) / 1e3

    @property
    def overlaps(self) -> bool:
        return self.chosen["overlap"] == "on" and not self._emulated

    @contextlib.contextmanager
    def beside(self, *tensors: Tensor) -> Iterator[None]:
        with self.explained("its work"), streams.beside(self.device, tensors) if self.overlaps else super().beside():
            yield

    def explained(self, doing: str) -> AbstractContextManager[None]:
        return failures.explained(doing, self.label, self.memory)

    def memory(self) -> tuple[int, int] | None:
        if self._emulated:
            return None
        free, total = streams.npu().mem_get_info(self.device)
        return int(free), int(total)

    def reusable(self) -> int:
        """Bytes that this process has taken from the device and does not use."""
        if self._emulated:
            return 0
        npu = streams.npu()
        return int(npu.memory_reserved(self.device)) - int(npu.memory_allocated(self.device))

    def recorder(self) -> Recorder | None:
        """What makes the steps of one program replayable; None where they run kernel by kernel."""
        return None if self._emulated else recorder(self.chosen["graphs"], self.device)

    def execution_plan(self) -> Mapping[str, Any]:
        """What bits depend on besides the graphs."""
        self._begin()
        return {
            "torch_npu": importlib.metadata.version("torch-npu"),
            "cann": _cann(),
            "device": str(streams.npu().get_device_name(self.index)),
            "graphs": self.chosen["graphs"],
        }

    def use_execution_plan(self, plan: Mapping[str, Any]) -> None:
        here = self.execution_plan()
        for name, value in plan.items():
            if here.get(name) != value:
                raise BackendError(
                    f"the run was begun with {name} {value!r}, and here it would be {here.get(name)!r}",
                    "go on where it was begun, with the same versions and options, or begin another run",
                )

    @property
    def label(self) -> str:
        return f"{self.name}:{EMULATED}" if self._emulated else super().label


def _cann() -> str:
    """The version that the runtime tells, where it does."""
    tell = getattr(streams.npu().utils, "get_cann_version", None)
    return str(tell()) if tell is not None else ""
