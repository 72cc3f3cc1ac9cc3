"""The backend class: which GPU, in what precisions, and how plans become programs of engines."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from helios.backend import Backend, DeviceInfo
from helios.errors import BackendError, InputError
from helios.graph import Node
from helios.passes import Plan
from helios.program import Program
from helios_cuda import failures
from helios_trt import kinds, probe
from helios_trt.machine import CudaMachine, Machine

if TYPE_CHECKING:
    from helios_trt.engines import Engines

__all__ = ["TrtBackend"]


class TrtBackend(Backend):
    """Runs whole graphs as TensorRT engines on one NVIDIA GPU; tensors lie in torch's memory there.

    Args:
        provider: ``inputs`` or ``profiles``, short for the option ``weights`` where a name is all that is asked for.
        index: of the GPU.
        options: ``weights``: ``profiles`` builds them into one engine for all pyramid stages, ``inputs`` hands them to
            an engine for each stage. ``graphs``: whether steps are captured as CUDA graphs and replayed. ``effort``:
            how long TensorRT looks for fast kernels, its builder optimisation level.

    Attributes:
        eager: why steps are not captured; empty where they are.
        machine: the GPU.
    """

    name = "trt"
    precisions = ("bf16", "fp16", "fp32")
    vae_precisions: Mapping[str, str] = {"bf16": "bf16", "fp16": "fp16"}
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weights": ("profiles", "inputs"),
        "graphs": ("on", "off"),
        "effort": ("3", "0", "1", "2", "4", "5"),
    }

    def __init__(self, provider: str = "", index: int = 0, **options: str) -> None:
        if provider:
            if provider not in self.options["weights"]:
                raise InputError(f"backend 'trt' has no provider {provider!r}", fix="trt, trt:1 or trt:inputs")
            if options.setdefault("weights", provider) != provider:
                raise InputError(f"trt:{provider} and weights={options['weights']} contradict", "leave one of them out")
        super().__init__("", index, **options)
        self.eager = "" if self.chosen["graphs"] == "on" else "asked for"
        self.machine = self._machine()

    def _machine(self) -> Machine:
        return CudaMachine(torch.device("cuda", self.index))

    def devices(self) -> Sequence[DeviceInfo]:
        return probe.devices()

    @property
    def device(self) -> torch.device:
        return self.machine.device

    @functools.cached_property
    def engines(self) -> Engines:
        """Of this device, in the user's cache."""
        from helios_trt.build import WORKSPACE, Settings
        from helios_trt.engines import Engines  # which imports onnx_ir
        from helios_trt.store import Store

        told = self.memory()
        workspace = WORKSPACE if told is None else min(WORKSPACE, told[1] // 4)
        return Engines(self.machine, Store(), Settings(int(self.chosen["effort"]), workspace))

    def supports(self, node: Node) -> str | None:
        from helios.export.forms import unsupported  # which imports onnx_ir

        return kinds.unsupported(node) or unsupported(node)

    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        """A program of engines. There is no fallback for single nodes: where one is needed this raises all the same."""
        from helios_trt.program import TrtProgram

        return TrtProgram(plan, self)

    def execution_plan(self) -> dict[str, Any]:
        """TensorRT's version, the device, options, and the digest of each engine that was opened: a build that is
        repeated may choose other kernels, and so give other last bits."""
        return {
            "tensorrt": self.engines.module.__version__,
            "device": dict(self.machine.identity()),
            "weights": self.chosen["weights"],
            "graphs": self.eager or True,
            "engines": dict(self.engines.used),
        }

    def use_execution_plan(self, plan: Mapping[str, Any]) -> None:
        here, then = self.engines.module.__version__, plan.get("tensorrt")
        if then not in (None, here):
            raise BackendError(
                f"the run was made with TensorRT {then}, this is {here}: other kernels, and so other last bits",
                f"install TensorRT {then}, or go on with --from-chunk as a new run",
            )
        self.engines.used.update(plan.get("engines", {}))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
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
    def label(self) -> str:
        way = self.chosen["weights"]
        return (
            self.name + (f":{way}" if way != self.options["weights"][0] else "") + (f":{self.index}" * bool(self.index))
        )

    def explained(self, doing: str) -> AbstractContextManager[None]:
        return failures.explained(doing, self.label, self.memory)

    def memory(self) -> tuple[int, int] | None:
        return torch.cuda.mem_get_info(self.device) if self.device.type == "cuda" else None
