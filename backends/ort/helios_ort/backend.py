"""The backend class: which provider, what it computes in, and which nodes it takes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from helios.backend import Backend, DeviceInfo
from helios.errors import BackendError, BackendUnavailable
from helios.graph import Node
from helios.passes import Plan
from helios.program import Program
from helios_ort import probe, providers
from helios_ort.installed import runtime
from helios_ort.providers import Provider

__all__ = ["OrtBackend"]


_FIXES = {
    "onnxruntime": "install the version that it was begun with, or begin another run",
    "threads": "set OMP_NUM_THREADS to that number, or begin another run",
}


class OrtBackend(Backend):
    """Runs whole graphs by ONNX Runtime: ``ort`` on the CPU, ``ort:cuda`` … by any provider that is installed."""

    name = "ort"
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"weights": ("shared", "packed")}

    def __init__(self, provider: str = "", index: int = 0, **options: str) -> None:
        super().__init__("", index, **options)
        self._asked = provider

    @functools.cached_property
    def provider(self) -> Provider:
        """The execution provider. Raises BackendUnavailable where ONNX Runtime, or the provider, is not installed."""
        return probe.written_for(providers.find(self._asked, self.index))

    def devices(self) -> Sequence[DeviceInfo]:
        providers.require_usable(self.provider)
        reason = probe.idle(self.provider)
        if reason is not None:
            why = f"the provider {self.provider.short!r} runs none of the ops that Helios needs: {reason}"
            raise BackendUnavailable(why, "HELIOS_BACKEND=ort, which is the provider for the CPU")
        return providers.devices(self.provider)

    @property
    def device(self) -> torch.device:
        return self.provider.device

    @property
    def label(self) -> str:
        short = providers.short_name(self._asked) or "cpu"
        return ":".join([self.name, *([short] if short != "cpu" else []), *([str(self.index)] if self.index else [])])

    @functools.cached_property
    def precisions(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for name in probe.PRECISIONS if name not in self.withheld)

    @functools.cached_property
    def withheld(self) -> Mapping[str, str]:  # type: ignore[override]
        return probe.withheld(self.provider)

    def supports(self, node: Node) -> str | None:
        return probe.supports(node, self.provider) if node.inputs else None

    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        from helios_ort.program import OrtProgram

        return OrtProgram(plan, self, self.provider, fallback=fallback, packed=self.chosen["weights"] == "packed")

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def execution_plan(self) -> Mapping[str, Any]:
        plan: dict[str, Any] = {
            "onnxruntime": str(runtime().__version__),
            "provider": self.provider.name,
            "provider_options": self.provider.options,
            "onnx_opset": self.provider.opset,
        }
        # The CPU's provider cuts products by its threads: with another number of them, last bits differ.
        return plan | ({"threads": torch.get_num_threads()} if self.provider.name == providers.CPU else {})

    def use_execution_plan(self, plan: Mapping[str, Any]) -> None:
        here = self.execution_plan()
        for name, value in plan.items():
            if here.get(name) != value:
                raise BackendError(
                    f"the run was begun with {name} {value!r}, and here it would be {here.get(name)!r}",
                    _FIXES.get(name, "go on as it was begun, or begin another run"),
                )
