"""From a unit to an engine that runs: found on disk, or built while others wait."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helios.errors import BackendError, InputError
from helios.ops import opset_hash
from helios.program import WeightReader
from helios_trt import build, library
from helios_trt.engine import Engine
from helios_trt.machine import Machine
from helios_trt.model import Written, digest_of, written
from helios_trt.progress import Line
from helios_trt.room import failing, gigabytes
from helios_trt.store import Entry, Store
from helios_trt.units import Unit

__all__ = ["Engines", "Wanted"]

_CHUNK = 1 << 26  # bytes that are written at a time


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """An engine that is wanted.

    Attributes:
        written: its model.
        environment: all that it depends on.
        name: of its entry.
    """

    written: Written
    environment: Mapping[str, Any]
    name: str


class Engines:
    """Makes engines for one machine.

    Args:
        machine: that they run on.
        store: where they are kept.
        settings: how they are built.
        line: what is told on the way.

    Attributes:
        used: SHA-256 of each engine that was opened, by the name of its entry; see ``follow``.
    """

    def __init__(self, machine: Machine, store: Store, settings: build.Settings, line: Line | None = None) -> None:
        self.machine, self.store, self.settings, self.line = machine, store, settings, line or Line()
        self.used: dict[str, str] = {}

    @functools.cached_property
    def module(self) -> Any:
        """TensorRT. Raises BackendUnavailable."""
        self.store.clean()
        return library.tensorrt()

    @functools.cached_property
    def log(self) -> Any:
        return library.logger(self.module)

    @functools.cached_property
    def lacks(self) -> tuple[str, ...]:
        """Ops of opset 23 that TensorRT's parser does not take. It is asked once for each version, which is kept."""
        known = self.store.folder / f"parser-{self.module.__version__}.lacks"
        try:
            found = tuple(json.loads(known.read_text(encoding="utf-8"))["lacks"])
            if set(found) <= set(library.OPSET_23):
                return found
        except (OSError, ValueError, KeyError, TypeError):
            pass
        found = library.lacking(self.module, self.log)
        with failing(self.store.folder):
            self.store.folder.mkdir(parents=True, exist_ok=True)
            part = known.with_name(f".{known.name}.{os.getpid()}")
            part.write_text(json.dumps({"lacks": found}), encoding="utf-8")
            part.replace(known)
        return found

    def wanted(self, unit: Unit, weights: WeightReader | None) -> Wanted:
        """What would be built of a unit: everything but the build.

        Args:
            weights: read for what is built in; ``None`` where nothing is.
        """
        model = written(unit, self.lacks)
        if unit.baked and weights is None:
            raise InputError(f"the engine of {unit.name} has weights built in, and there are none to build in")
        environment = {
            "model": model.sha256,
            "weights": digest_of(unit, weights) if weights is not None and unit.baked else "",
            "shapes": {g.name: [list(v.shape) for v in unit.inputs(g)] for g in unit.graphs},
            "opset": opset_hash(),
            "tensorrt": self.module.__version__,
            "device": dict(self.machine.identity()),
            "options": dataclasses.asdict(self.settings),
        }
        return Wanted(model, environment, Store.entry_name(unit.name, environment))

    def ready(self, unit: Unit, weights: WeightReader | None) -> Wanted:
        """See to it that the engine of a unit is on disk, and whole."""
        wanted = self.wanted(unit, weights)
        self.obtain(wanted, weights)
        return wanted

    def open(self, wanted: Wanted, weights: WeightReader | None) -> Engine:
        """An engine that is ready, without contexts yet.

        Raises:
            BackendError: TensorRT does not take it, nor one that was built anew; or the device is full.
        """
        try:
            return self._engine(self.store.use(wanted.name), wanted)
        except BackendError as error:
            if self.log.memory:
                raise  # a full device refuses every engine
            # Its bytes are those that were built, but this TensorRT does not take them: once more, and then it is told.
            self.line.say(f"{wanted.name} is built anew: {error.why}")
            return self._engine(self.obtain(wanted, weights, anew=True), wanted)

    def _engine(self, entry: Entry, wanted: Wanted) -> Engine:
        unit = wanted.written.unit
        made = Engine(self.module, self.log, entry.path, unit, wanted.written.outputs, self.machine)
        sha = str(entry.facts["sha256"])
        if self.used.setdefault(entry.name, sha) != sha:
            raise InputError(
                f"the run went on with another engine of {unit.name} than the one that is here, and bits may differ",
                "--from-chunk goes on from its latents, as a new run",
            )
        return made

    def obtain(self, wanted: Wanted, weights: WeightReader | None, *, anew: bool = False) -> Entry:
        """The entry, whole and of this machine; built if there is none. Says why in one line."""
        store, name = self.store, wanted.name
        store.hold(name)
        if not anew and store.fault(name, wanted.environment) is None:
            return store.use(name)
        with store.turn(name, wait=False) as mine:
            if not mine:
                self.line.say(f"waiting for another process that builds {name}")
        with store.turn(name):
            fault = "it was refused" if anew else store.fault(name, wanted.environment)
            if fault is None:
                return store.use(name)
            other = "" if fault else store.others(name, wanted.environment)
            if fault or other:
                self.line.say(f"{name} is built anew: {fault or 'the engine that is here is for another: ' + other}")
            return self._built(wanted, weights)

    def _built(self, wanted: Wanted, weights: WeightReader | None) -> Entry:
        unit, began = wanted.written.unit, time.monotonic()
        # The weights lie there once for the parser and once in the engine.
        with self.store.building(wanted.name, 2 * unit.weight_bytes) as folder:
            onnx = wanted.written.save(folder, weights)
            timings = build.Timings(self.store.folder, wanted.environment)
            made = build.serialized(self.module, self.log, onnx, unit, self.settings, timings, self.line)
            part = folder / "engine"
            size = _write(part, memoryview(made))
            facts = {
                "name": unit.name,
                "graphs": {graph.name: graph.digest for graph in unit.graphs},
                "outputs": list(wanted.written.outputs),
                "weights_built_in": unit.weight_bytes,
                "environment": dict(wanted.environment),
                "seconds": round(time.monotonic() - began, 1),
            }
            self.store.put(wanted.name, part, facts)
        over = self.store.excess()
        if over:
            self.line.say(
                f"all engines take {gigabytes(over)} more than HELIOS_TRT_BUDGET, {gigabytes(self.store.budget)}: "
                "those in use are not removed"
            )
        self.line.say(f"built {wanted.name}: {size / 1e6:.1f} MB in {time.monotonic() - began:.0f} s")
        return self.store.use(wanted.name)


def _write(path: Path, data: memoryview) -> int:
    """Piece by piece: the system takes at most 2 GB at once."""
    with path.open("xb") as file:
        for at in range(0, data.nbytes, _CHUNK):
            file.write(data.cast("B")[at : at + _CHUNK])
    return data.nbytes
