"""Engines on disk: each built once for a graph, a version of TensorRT and a device, and checked before it is used.

An entry is a file ``NAME-KEY.engine`` and a JSON file beside it, which is written last: an entry without it is not one.
Builds happen in a folder of their own and are renamed into place, so a build that was killed leaves nothing but that
folder, which the next start removes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from helios.errors import InputError, StorageError
from helios_trt import locks
from helios_trt.room import budget_bytes, failing, gigabytes, require_room

__all__ = ["FORMAT", "Entry", "Store", "cache_folder", "differs"]

FORMAT = "helios-trt-1"
_PIECE = 1 << 24


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/helios/trt``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "helios" / "trt"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One engine on disk.

    Attributes:
        path: of the engine.
        facts: the JSON beside it.
    """

    path: Path
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def nbytes(self) -> int:
        return int(self.facts["bytes"])


class Store:
    """The engines of one folder.

    Args:
        folder: made when it is first needed.
        budget: bytes that all entries together may take.
    """

    def __init__(self, folder: Path | None = None, budget: int | None = None) -> None:
        self.folder = folder or cache_folder()
        self.budget = budget_bytes() if budget is None else budget
        self._kept: dict[str, locks.Held] = {}

    # Names and files.

    @staticmethod
    def entry_name(name: str, environment: Mapping[str, Any]) -> str:
        """Of an entry: the graph's name for readers, and a hash over all that the engine depends on."""
        text = json.dumps(environment, sort_keys=True)
        return f"{re.sub(r'[^A-Za-z0-9_.]', '_', name)}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.engine"

    def entries(self) -> list[Entry]:
        """All of them that have their JSON, the one that was not used for the longest time first."""
        found = []
        for entry in filter(None, map(self.entry, self._names())):
            with contextlib.suppress(OSError):  # another process may just have removed it
                found.append((entry.path.with_suffix(".json").stat().st_mtime, entry))
        return [e for _, e in sorted(found, key=lambda pair: pair[0])]

    def _names(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def entry(self, name: str) -> Entry | None:
        """As its JSON says it is, ``None`` where that is damaged or of something else; the engine is not looked at."""
        try:
            facts = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return Entry(self.path(name), facts) if _whole(facts) else None

    def named(self, text: str) -> Entry:
        """The one entry whose name or path begins so.

        Raises:
            InputError: there is none, or more than one.
        """
        wanted = Path(text).name.removesuffix(".engine").removesuffix(".json")
        store = Store(Path(text).parent, self.budget) if os.sep in text else self
        found = [entry for entry in store.entries() if entry.name.startswith(wanted)]
        exact = [entry for entry in found if entry.name == wanted]
        if len(exact or found) != 1:
            names = ", ".join(entry.name for entry in found or store.entries()) or "none"
            which = "more than one engine is" if found else "no engine is"
            raise InputError(f"{which} called {text!r} in {store.folder}", f"there are: {names}")
        return (exact or found)[0]

    # Finding and keeping.

    def fault(self, name: str, environment: Mapping[str, Any]) -> str | None:
        """Why an entry cannot be used; empty where there is none, ``None`` where it is good. Reads all of it."""
        path = self.path(name)
        if not path.exists() and not path.with_suffix(".json").exists():
            return ""
        entry = self.entry(name)
        if entry is None or not path.exists():
            return "it is not whole"
        if entry.facts.get("environment") != json.loads(json.dumps(environment)):
            return "it was built for something else: " + differs(entry.facts.get("environment"), environment)
        if path.stat().st_size != entry.nbytes or _sha256(path) != entry.facts.get("sha256"):
            return "its bytes are not those that were built"
        return None

    def others(self, name: str, environment: Mapping[str, Any]) -> str:
        """Of which other device or version there is an engine of the same graphs; empty where there is none."""
        same = [e for e in self.entries() if e.facts.get("environment", {}).get("model") == environment["model"]]
        return differs(same[-1].facts["environment"], environment) if same else ""

    def hold(self, name: str) -> None:
        """Keep an entry from being removed until the process ends, or this object does."""
        if name not in self._kept:
            with failing(self.folder):
                self._kept[name] = locks.shared(self._lock(name, "use"))

    def use(self, name: str) -> Entry:
        """Take an entry into use that was found good."""
        self.hold(name)
        entry = self.entry(name)
        assert entry is not None
        with contextlib.suppress(OSError):  # a cache that is read-only can be used all the same
            os.utime(entry.path.with_suffix(".json"))
        return entry

    @contextlib.contextmanager
    def building(self, name: str, needed: int) -> Iterator[Path]:
        """A folder to build in, for one process at a time; removed in the end.

        Args:
            needed: bytes that will be written there, as far as that is known.
        """
        folder = self.folder / "building"
        with failing(self.folder):
            folder.mkdir(parents=True, exist_ok=True)
            require_room(self.folder, needed)
            scratch = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=folder))
        try:
            with failing(self.folder):
                yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    @contextlib.contextmanager
    def turn(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """One process at a time builds an entry; the others wait for it."""
        with failing(self.folder), locks.exclusive(self._lock(name, "build"), wait=wait) as mine:
            yield mine

    def put(self, name: str, part: Path, facts: Mapping[str, Any]) -> Entry:
        """Move a file that was built into place, and make room for it first.

        Raises:
            StorageError: it alone is larger than the budget, or the disk is full.
        """
        size = part.stat().st_size
        self.make_room(size, keep=name)
        known = {"format": FORMAT, **facts, "bytes": size, "sha256": _sha256(part)}
        known["built"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        path = self.path(name)
        with failing(path):
            beside = part.with_name("facts.json")
            beside.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            for file in (part, beside):
                _sync(file)
            path.with_suffix(".json").unlink(missing_ok=True)  # never beside an engine that it is not of
            os.replace(part, path)
            os.replace(beside, path.with_suffix(".json"))
            _sync(self.folder)
        return Entry(path, known)

    def make_room(self, size: int, keep: str = "") -> list[str]:
        """Remove entries, the longest unused first, until ``size`` bytes fit the budget; never one that is in use, so
        that all together may still be more: see ``excess``.

        Returns:
            Names of what is gone.

        Raises:
            StorageError: ``size`` alone is more than the budget.
        """
        if size > self.budget:
            raise StorageError(
                f"one engine of {gigabytes(size)} is more than all engines may take, {gigabytes(self.budget)}",
                f"HELIOS_TRT_BUDGET={-(-size // 10**9)} or more, in GB",
            )
        entries = [entry for entry in self.entries() if entry.name != keep]
        over = sum(entry.nbytes for entry in entries) + size - self.budget
        gone = []
        for entry in entries:
            if over <= 0:
                break
            if self.remove(entry):
                over -= entry.nbytes
                gone.append(entry.name)
        return gone

    def excess(self) -> int:
        """Bytes that all entries take beyond the budget, 0 where they are within it."""
        return max(0, sum(entry.nbytes for entry in self.entries()) - self.budget)

    def remove(self, entry: Entry) -> bool:
        """Whether it is gone: an entry that somebody uses stays."""
        with locks.exclusive(self._lock(entry.name, "use"), wait=False) as mine:
            if mine:
                entry.path.with_suffix(".json").unlink(missing_ok=True)
                entry.path.unlink(missing_ok=True)
            return mine

    def clean(self) -> list[str]:
        """Remove what processes left behind that were killed; the names of the entries it was of.

        That is the folders of builds, and engines without their JSON, as there are where a process ended between the
        two renames of ``put`` or within ``remove``: nothing would ever count, use or remove them.
        """
        gone = []
        for left in sorted((self.folder / "building").glob("*.*")):
            name = left.name.rpartition(".")[0]
            with self.turn(name, wait=False) as mine:
                if mine:
                    shutil.rmtree(left, ignore_errors=True)
                    gone.append(name)
        return gone + [path.stem for path in sorted(self.folder.glob("*.engine")) if self._orphan_removed(path)]

    def _orphan_removed(self, path: Path) -> bool:
        """Whether this was an engine without its JSON that nobody is about to finish or uses, and is gone."""
        if path.with_suffix(".json").exists():
            return False
        with self.turn(path.stem, wait=False) as mine:  # whoever puts an entry has its turn: look again within
            return mine and not path.with_suffix(".json").exists() and self.remove(Entry(path, {}))

    def _lock(self, name: str, what: str) -> Path:
        return self.folder / "locks" / f"{name}.{what}"


def _whole(facts: Any) -> bool:
    """Whether a JSON has all that is read of an entry without being looked at again."""
    if not isinstance(facts, Mapping) or facts.get("format") != FORMAT:
        return False
    environment = facts.get("environment")
    if not isinstance(environment, Mapping) or "tensorrt" not in environment:
        return False
    device = environment.get("device")
    if not isinstance(device, Mapping) or not {"name", "capability"} <= set(device):
        return False
    kinds = {"bytes": int, "seconds": int | float, "sha256": str, "graphs": Mapping}
    return all(isinstance(facts.get(key), kind) for key, kind in kinds.items()) and facts["bytes"] >= 0


def differs(found: Any, wanted: Mapping[str, Any], under: str = "") -> str:
    """The first thing in which two environments differ, in words; empty where they do not.

    Args:
        found: of an engine.
        wanted: here; what it does not have is not compared.
    """
    found = found if isinstance(found, Mapping) else {}
    for key, value in wanted.items():
        if isinstance(value, Mapping):
            inner = differs(found.get(key), value, f"{under}{key} ")
            if inner:
                return inner
        elif found.get(key) != value:
            return f"{under}{key} is {found.get(key)}, here {value}"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
