"""An engine that runs: its tensors by name, a context for each of its graphs, addresses, and the call."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helios.errors import BackendError
from helios_trt import library
from helios_trt.build import dynamic_shapes
from helios_trt.kinds import KINDS
from helios_trt.machine import ALIGNMENT, Machine
from helios_trt.units import Unit

__all__ = ["Engine", "deserialized"]


class Engine:
    """One engine, deserialised.

    Args:
        module, log: TensorRT, and its log.
        path: of the serialised engine.
        unit: that it was built of.
        names: what the model calls the unit's outputs, in their order.
        machine: that it runs on.

    Raises:
        BackendError: TensorRT does not take it, or its tensors are not the unit's.
    """

    def __init__(self, module: Any, log: Any, path: Path, unit: Unit, names: Sequence[str], machine: Machine) -> None:
        self.unit, self._module, self._log, self._machine = unit, module, log, machine
        log.clear()
        self._runtime = library.started(lambda: module.Runtime(log), "runtime", log)
        self._engine = deserialized(self._runtime, path, log)
        self._outputs = tuple(names)
        self._bound = self._checked()
        self._contexts: list[Any] = []

    def _checked(self) -> frozenset[str]:
        """Names of the engine's tensors; each is one of the unit's, of its type."""
        engine, graph = self._engine, self.unit.graphs[0]
        known = {v.name: v for v in self.unit.inputs(graph)}
        known |= {name: value for name, (_, value) in zip(self._outputs, graph.outputs, strict=True)}
        found = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        for name in found:
            kind = getattr(self._module.DataType, KINDS[known[name].dtype]) if name in known else None
            if engine.get_tensor_dtype(name) != kind:
                came = engine.get_tensor_dtype(name)
                raise BackendError(f"the engine of {graph.name} has a tensor {name!r} of {came}, the graph {kind}")
        missing = set(self._outputs) - set(found)
        if missing:
            raise BackendError(f"the engine of {graph.name} has no output {sorted(missing)[0]!r}")
        return frozenset(found)

    @property
    def workspace(self) -> list[int] | None:
        """Bytes of activations in each graph; ``None`` where this TensorRT cannot share memory between contexts."""
        engine = self._engine
        if not hasattr(engine, "get_device_memory_size_for_profile_v2"):
            return None
        return [engine.get_device_memory_size_for_profile_v2(at) for at in self._profiles()]

    def _profiles(self) -> list[int]:
        """The profile of each graph."""
        return list(range(len(self.unit.graphs))) if dynamic_shapes(self.unit) else [0] * len(self.unit.graphs)

    def open(self, arena: Tensor | None) -> None:
        """Make the contexts.

        Args:
            arena: bytes on the device, at least the largest of ``workspace``, which contexts of many engines may share
                as long as they run one after another; ``None`` gives each context memory of its own.
        """
        self._log.clear()
        strategies = self._module.ExecutionContextAllocationStrategy
        with self._machine.queue() as stream:
            for at in self._profiles():
                strategy = strategies.STATIC if arena is None else strategies.USER_MANAGED
                context = library.started(
                    lambda kind=strategy: self._engine.create_execution_context(kind), "context", self._log
                )
                self._require(context.set_optimization_profile_async(at, stream), "takes its profile")
                for name, shapes in dynamic_shapes(self.unit).items():
                    if name in self._bound:
                        self._require(context.set_input_shape(name, shapes[at]), f"takes the shape of {name}")
                if arena is not None:
                    context.set_device_memory(arena.data_ptr(), arena.nbytes)
                self._require(not context.infer_shapes(), "knows all sizes")
                self._contexts.append(context)

    def run(self, at: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Queue one of the graphs; new tensors for its outputs.

        Args:
            at: its place among the unit's graphs.
            inputs: what ``Unit.inputs`` names, in that order, on the device, of any strides.
        """
        graph, context = self.unit.graphs[at], self._contexts[at]
        self._log.clear()
        given = [self._machine.plain(tensor) for tensor in inputs]
        made = [self._machine.empty(value.shape, value.dtype) for _, value in graph.outputs]
        first = self.unit.graphs[0]
        names = [*(v.name for v in self.unit.inputs(first)), *self._outputs]
        for name, tensor in zip(names, (*given, *made), strict=True):
            if name in self._bound:  # what nothing reads is not in the engine
                address = tensor.data_ptr() if tensor.numel() else self._nowhere.data_ptr()
                self._require(context.set_tensor_address(name, address), f"takes an address for {name}")
        with self._machine.queue() as stream:
            self._require(context.execute_async_v3(stream), "is run")
        return made

    @functools.cached_property
    def _nowhere(self) -> Tensor:
        """Memory for a tensor without elements: TensorRT wants an address all the same."""
        return self._machine.empty((ALIGNMENT,), torch.uint8)

    def _require(self, done: bool, what: str) -> None:
        if not done:
            why = self._log.last("TensorRT says not why")
            raise BackendError(f"the engine of {self.unit.name}: not true that it {what}: {why}")


def deserialized(runtime: Any, path: Path, log: Any) -> Any:
    """The engine of a file, which is mapped and not read into memory first.

    Raises:
        BackendError: the file is empty, or TensorRT does not take it.
    """
    if not path.stat().st_size:  # which cannot be mapped
        raise BackendError(f"the engine {path} is empty", f"remove it: rm {path}; it is built anew when it is needed")
    log.clear()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        # Only the file itself is a reason to remove it: a full device refuses every engine.
        fix = "close what else uses the GPU" if log.memory else f"remove it: rm {path}; it is built anew when needed"
        raise BackendError(f"TensorRT does not take {path}: {log.last('it says not why')}", fix)
    return engine
