"""A run: what was asked for, what came of it, and the folder that keeps both while it goes on.

The folder holds ``run.json`` (the setup, and what the backend said of itself) and for each finished case
``cases/<n>.json`` with its record and ``cases/<n>.safetensors`` with its kept elements. A file appears whole or not at
all, so a run that was cut off at any moment goes on after its last finished case.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from helios.errors import InputError, StateError
from helios_conformance import FORMAT
from helios_conformance.case import Case, Level, Suite
from helios_conformance.draws import Root

__all__ = ["UNASKED", "RunFolder", "RunResult", "Setup", "in_order", "now"]

UNASKED: Mapping[str, Any] = {
    "api_version": None,
    "kind": "kernels",
    "emulated": "",
    "device": None,
    "precisions": [],
    "kernels": 0,
    "fusions": [],
}
"""What a report says of a backend that could not be asked."""


def now() -> str:
    """This moment in UTC, ISO 8601, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What was asked for.

    Attributes:
        spec: the backend as selected, such as ``cpu`` or ``cuda:1``.
        precision: ``bf16`` or ``fp32``; "" until the backend has said which it offers, then its first.
        suite: ``quick`` or ``full``.
        levels: that run, each with all that it needs.
        filters: ids; empty for all cases.
        root: of all draws.
        variant: published way to sample, for the realtime level.
        model: folder of a checkpoint that the level realtime times, or None: all else draws its weights.
        options: JSON values: size, steps, height, width, chunks, seconds, soak …
        out: the run folder, which becomes the bundle.
        timeout_factor: on the time that each case is given.
    """

    spec: str
    precision: str
    suite: Suite
    levels: tuple[Level, ...]
    filters: tuple[str, ...]
    root: Root
    variant: str = "distilled"
    model: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    out: Path = Path("out/certify")
    timeout_factor: float = 1.0

    def told(self) -> dict[str, Any]:
        """As JSON values; the folder is where they stand."""
        told = dataclasses.asdict(self) | {"levels": list(self.levels), "filters": list(self.filters)}
        del told["out"]
        return told | {"options": dict(self.options)}

    @staticmethod
    def of(told: Mapping[str, Any], out: Path) -> Setup:
        """The setup that ``told`` described. KeyError or TypeError where it is none."""
        given = dict(told)
        root = Root(**given.pop("root"))
        levels, filters = tuple(given.pop("levels")), tuple(given.pop("filters"))
        return Setup(**given, levels=levels, filters=filters, root=root, out=out)


@dataclasses.dataclass
class RunResult:
    """What came of it.

    Attributes:
        setup: what was asked for.
        records: of ``record.record``, in run order, one of each case that belongs to the run.
        backend: as the worker tells it: name, label, class ``module:Class``, distribution and version or None,
            api_version, kind ``kernels`` or ``engine``, emulated, device (name, index, memory), precisions, kernels
            (how many), fusions, threads. Of one that could not start only the names; the device is None then.
        environment: of ``environment.read``, as the run began; one that goes on in another is refused.
        started, finished: UTC, ISO 8601.
        peak_rss: bytes, of ``parent`` and ``worker`` (the largest of all).
        workers: ``started`` and ``lost``.
        problem: why the run could not take place or ended early; empty for one that ended by itself.
        resumed: how often it was interrupted and went on.
    """

    setup: Setup
    records: list[dict[str, Any]]
    backend: dict[str, Any]
    environment: dict[str, Any]
    started: str
    finished: str
    peak_rss: dict[str, int] = dataclasses.field(default_factory=dict)
    workers: dict[str, int] = dataclasses.field(default_factory=dict)
    problem: str = ""
    resumed: int = 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The kept elements of all cases, by ``case/output``; read from the run's folder."""
        return RunFolder(self.setup.out).tensors()


class RunFolder:
    """The files of a run that is not finished."""

    def __init__(self, path: Path) -> None:
        self.path, self.cases = path, path / "cases"
        self._next = 0

    @classmethod
    def create(cls, setup: Setup, suite_hash: str) -> tuple[RunFolder, dict[str, Any]]:
        """A new one, and its ``run.json``. Raises InputError where the folder is in use."""
        path = setup.out
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            unfinished = (path / "run.json").is_file()
            fix = f"`helios certify --resume --out {path}` goes on with it" if unfinished else "choose another --out"
            raise InputError(f"--out {path} exists and is not empty", fix)
        folder = cls(path)
        folder.cases.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "suite_hash": suite_hash, "setup": setup.told(), "started": now()}
        folder.note(about)
        return folder, about

    @classmethod
    def open(cls, path: Path, suite_hash: str) -> tuple[RunFolder, dict[str, Any]]:
        """An interrupted one, and its ``run.json``.

        Raises:
            InputError: there is none, or it is finished.
            StateError: damaged, or made by another suite, whose cases and budgets are others.
        """
        if not (path / "run.json").is_file():
            finished = (path / "report.json").is_file()
            raise InputError(
                f"--resume: the run in {path} is finished" if finished else f"--resume: there is no run in {path}",
                f"`helios verify {path}` judges it anew" if finished else "run without --resume first",
            )
        try:
            about = json.loads((path / "run.json").read_text())
            Setup.of(about["setup"], path)
            same = about["suite_hash"] == suite_hash
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(f"{path / 'run.json'} is damaged: {error}", "start anew with another --out") from error
        if not same:
            raise StateError(
                f"the run in {path} was begun by another version of the suite", "start anew with another --out"
            )
        return cls(path), about

    def note(self, about: Mapping[str, Any]) -> None:
        """Write ``run.json``."""
        _whole(self.path / "run.json", json.dumps(about, indent=1, allow_nan=False).encode())

    def add(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """One finished case: the tensors first, so that whoever finds the record finds them."""
        from safetensors.torch import save

        stem = f"{self._next:05d}"
        self._next += 1
        if tensors:
            _whole(self.cases / f"{stem}.safetensors", save(dict(tensors)))
        _whole(self.cases / f"{stem}.json", json.dumps(record, allow_nan=False).encode())

    def records(self) -> dict[str, dict[str, Any]]:
        """Of finished cases by id; damaged ones count as not run."""
        found: dict[str, dict[str, Any]] = {}
        for file in sorted(self.cases.glob("*.json")):
            self._next = max(self._next, int(file.stem) + 1)
            try:
                record = json.loads(file.read_text())
                found[record["id"]] = record
            except (OSError, ValueError, KeyError, TypeError):
                file.unlink(missing_ok=True)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All kept elements by ``case/output``."""
        from safetensors.torch import load

        found: dict[str, Tensor] = {}
        for file in sorted(self.cases.glob("*.safetensors")):
            found |= load(file.read_bytes())
        return found

    def clear(self) -> None:
        """Take the files of the run away; for when its bundle stands beside them."""
        (self.path / "run.json").unlink(missing_ok=True)
        (self.path / "worker.log").unlink(missing_ok=True)
        shutil.rmtree(self.cases, ignore_errors=True)


def _whole(path: Path, data: bytes) -> None:
    """Write a file so that it appears whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def in_order(cases: Iterable[Case], records: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Records in run order."""
    return [records[case.id] for case in cases if case.id in records]
