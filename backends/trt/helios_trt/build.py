"""From an ONNX model to a serialised engine: parser, profiles, configuration, timing cache.

Networks are strongly typed: every tensor has the type that the graph gives it, and TensorRT chooses kernels, not
precisions. TF32 is off, since float32 means float32 here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helios.errors import BackendError, UnsupportedNode
from helios_trt import library, locks, progress
from helios_trt.units import Unit

__all__ = ["Settings", "Timings", "dynamic_shapes", "serialized"]

WORKSPACE = 8 << 30
"""Bytes of scratch memory that one kernel may take at most; a quarter of the device's memory where that is less."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How engines are built; part of what they depend on.

    Args:
        effort: TensorRT's builder optimisation level, 0 to 5: how long it looks for fast kernels.
        workspace: bytes of scratch memory for a kernel.
    """

    effort: int = 3
    workspace: int = WORKSPACE


class Timings:
    """Measured kernels of earlier builds, in a file that builds of one TensorRT on one device share."""

    def __init__(self, folder: Path, environment: Mapping[str, Any]) -> None:
        text = json.dumps({key: environment[key] for key in ("tensorrt", "device")}, sort_keys=True)
        self.path = folder / f"timing-{hashlib.sha256(text.encode()).hexdigest()[:16]}.cache"

    def load(self, config: Any) -> None:
        """Give a build what is known. A file that TensorRT refuses counts as empty: it costs time alone."""
        known = self.path.read_bytes() if self.path.exists() else b""
        cache = config.create_timing_cache(known) or config.create_timing_cache(b"")
        if cache is not None:
            config.set_timing_cache(cache, ignore_mismatch=False)

    def keep(self, config: Any) -> None:
        """Add what a build measured to the file, where another build may have added to it meanwhile."""
        cache = config.get_timing_cache()
        if cache is None:
            return
        with contextlib.suppress(OSError), locks.exclusive(self.path.with_suffix(".lock"), wait=True):
            if self.path.exists():
                other = config.create_timing_cache(self.path.read_bytes())
                if other is not None:
                    cache.combine(other, ignore_mismatch=False)
            part = self.path.with_suffix(".part")
            part.write_bytes(memoryview(cache.serialize()))
            part.replace(self.path)


def dynamic_shapes(unit: Unit) -> dict[str, list[tuple[int, ...]]]:
    """By input of the engine, its shape in each of the graphs; of those inputs whose shapes differ."""
    columns = zip(*(unit.inputs(graph) for graph in unit.graphs), strict=True)
    shapes = {values[0].name: [v.shape for v in values] for values in columns}
    return {name: found for name, found in shapes.items() if len(set(found)) > 1}


def serialized(
    module: Any, log: Any, onnx: Path, unit: Unit, settings: Settings, timings: Timings, line: progress.Line
) -> Any:
    """The engine, as an object with the buffer protocol.

    Raises:
        UnsupportedNode: TensorRT's parser does not take the model; says which node and why.
        BackendError: the build failed; says what TensorRT logged.
    """
    log.clear()
    builder = library.started(lambda: module.Builder(log), "builder", log)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(module, log, network, onnx, unit)
    config = builder.create_builder_config()
    config.clear_flag(module.BuilderFlag.TF32)
    config.builder_optimization_level = settings.effort
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # for `helios trt inspect`; nothing runs slower
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, settings.workspace)
    _add_profiles(builder, config, unit)
    timings.load(config)
    watch = progress.monitor(module, unit.name, line)
    config.progress_monitor = watch
    log.clear()  # a timing cache that was refused is no reason
    made = builder.build_serialized_network(network, config)
    if watch.stopped is not None:
        raise watch.stopped
    if made is None:
        raise BackendError(
            f"TensorRT built no engine of {unit.name}: {log.last('it says not why')}",
            "close what else uses the GPU, or build with --backend-option effort=1; `nvidia-smi` shows its memory",
        )
    timings.keep(config)
    return made


def _parse(module: Any, log: Any, network: Any, onnx: Path, unit: Unit) -> None:
    parser = library.started(lambda: module.OnnxParser(network, log), "parser", log)
    if parser.parse_from_file(str(onnx)):
        return
    found = [parser.get_error(i) for i in range(parser.num_errors)]
    told = "; ".join(f"{e.node_operator()} {e.node_name()}: {' '.join(e.desc().split())}" for e in found[:3])
    raise UnsupportedNode(
        f"TensorRT {module.__version__} does not take the graph {unit.name}: {told or log.last('it says not why')}",
        "a newer TensorRT takes more ops of ONNX; HELIOS_BACKEND=cuda runs every op",
    )


def _add_profiles(builder: Any, config: Any, unit: Unit) -> None:
    """A profile of exact sizes for each graph; kernels are chosen for these."""
    shapes = dynamic_shapes(unit)
    for at in range(len(unit.graphs) if shapes else 0):
        profile = builder.create_optimization_profile()
        for name, found in shapes.items():
            profile.set_shape(name, found[at], found[at], found[at])
        if config.add_optimization_profile(profile) != at:
            raise BackendError(f"TensorRT refuses the sizes of {unit.graphs[at].name}: {shapes}")
