"""Results of one part: a log of JSON lines that a later run goes on with.

A line is ``{"header": …}`` (what the lines after it were measured on), ``{"start": id}``, or a record. A record has an
``id`` and a ``status``: ``measured``, ``wrong`` (timed, but its values are not right), ``not there`` (a library or a
device lacks it), ``not measured`` (out of time), ``failed`` or ``died`` (it took the device or the process with it).
The last record of an id stands, if its header agrees with the present one on everything in ``SAME``.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

__all__ = ["Clock", "DeviceLostError", "Item", "LaterError", "NotThereError", "Record", "Results", "run_items"]

Record: TypeAlias = dict[str, Any]

SAME = ("part", "device", "driver", "torch", "triton", "cudnn", "tiny", "code")
"""Fields of the header without which a figure means something else; ``code`` is the commit, where ours is measured."""
FINISHED = ("measured", "wrong", "died")
MOST_STARTS = 2


class NotThereError(Exception):
    """A library, or a feature of it, that this machine does not have; the text says why."""


class LaterError(Exception):
    """There was not time enough for all of it; a later run goes on. The text says how far it came."""


class DeviceLostError(Exception):
    """The process can use the device no more: a fresh one has to go on."""


@dataclass(frozen=True, slots=True)
class Item:
    """One measurement to take.

    Attributes:
        id: ``group/column/…``, unique in its part.
        what: in words.
        row, column: where its figure stands in the table of its group.
        run: takes it and gives the fields of its record.
        seconds: that must be left for it to be begun.
        counts: how often the work occurs, by what it occurs in: ``{"stage2": 39}``.
        fields: of the record that are known before: shape, dtype.
    """

    id: str
    what: str
    row: str
    column: str
    run: Callable[[], Record]
    seconds: float = 4.0
    counts: Mapping[str, int] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    def record(self, status: str, **more: object) -> Record:
        """The record of this item."""
        known = {"id": self.id, "what": self.what, "row": self.row, "column": self.column, "counts": dict(self.counts)}
        return {**known, **self.fields, "status": status, **more}


class Clock:
    """What is left of a budget of seconds that began when this was made."""

    def __init__(self, budget: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = now() + budget

    def left(self) -> float:
        """Seconds; negative when overdrawn."""
        return self._end - self._now()


class Results:
    """The log at ``path``: what it holds that agrees with ``header``, and more as it is added."""

    def __init__(self, path: Path, header: Record) -> None:
        self.path, self.header = path, header
        self.records: dict[str, Record] = {}
        self._starts: dict[str, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read(path.read_text(encoding="utf-8").splitlines())
        self._write({"header": header})

    def _read(self, lines: Iterable[str]) -> None:
        agrees = False
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the process was killed while it wrote this line
            if "header" in entry:
                agrees = all(entry["header"].get(name) == self.header.get(name) for name in SAME)
            elif agrees and "start" in entry:
                self._starts[entry["start"]] = self._starts.get(entry["start"], 0) + 1
            elif agrees and "id" in entry:
                self.records[entry["id"]] = entry
                self._starts.pop(entry["id"], None)

    def _write(self, entry: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def finished(self, id_: str) -> bool:
        """Whether nothing is left to do for it; what was not there or failed is tried again."""
        return self.records.get(id_, {}).get("status") in FINISHED

    def fatal(self, id_: str) -> bool:
        """Whether it was begun so often without an end that it must have killed its processes."""
        return self._starts.get(id_, 0) >= MOST_STARTS

    def start(self, id_: str) -> None:
        """Note that it begins, so that a crash can be put down to it."""
        self._write({"start": id_})

    def add(self, record: Record) -> None:
        """Keep a record, in memory and on disk."""
        self.records[record["id"]] = record
        self._write(record)


def run_items(
    items: Iterable[Item], results: Results, clock: Clock, show: Callable[[Record], None] = lambda _: None
) -> None:
    """Take what is not finished, in order, while there is time; each gets a record whatever happens.

    Raises:
        DeviceLostError: after a record of what lost it.
    """
    for item in items:
        if results.finished(item.id):
            continue
        record = _attempt(item, results, clock)
        results.add(record)
        show(record)
        if record["status"] == "died" and not results.fatal(item.id):
            raise DeviceLostError(item.id)


def _attempt(item: Item, results: Results, clock: Clock) -> Record:
    if results.fatal(item.id):
        return item.record("died", why=f"begun {MOST_STARTS} times, and the process never came back")
    if clock.left() < item.seconds:
        return item.record("not measured", why="not measured: out of time")
    results.start(item.id)
    try:
        taken = item.run()
        return item.record("wrong" if taken.get("correct") is False else "measured", **taken)
    except NotThereError as error:
        return item.record("not there", why=f"not there: {error}")
    except LaterError as error:
        return item.record("not measured", why=f"not measured: {error}")
    except Exception as error:  # a library may raise anything, and the next measurement has to go on
        why = f"{type(error).__name__}: {_first_line(error)}"
    return item.record("failed" if _device_lives() else "died", why=why)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no text"])[0][:300]


def _device_lives() -> bool:
    """Whether the device still answers; memory that the failure held is given back."""
    gc.collect()
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
