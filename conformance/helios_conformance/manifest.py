"""``MANIFEST.json``: size and SHA-256 of every file of a bundle. A bundle is the files that it names, and no others."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helios_conformance import FORMAT
from helios_conformance.intake import Refused, read_json

__all__ = ["MANIFEST", "SIGNATURE", "build", "differences", "files"]

MANIFEST = "MANIFEST.json"
SIGNATURE = f"{MANIFEST}.sig"

FILES = 1000
"""Files that a bundle may have."""
FILE_BYTES = 1 << 30
"""Bytes that one may have; ``report.json`` less, see ``intake``."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_MANIFEST_BYTES = 1 << 20


def files(folder: Path) -> dict[str, int]:
    """Sizes of all files below a folder by their names in it, without the manifest and its signature.

    Raises Refused for a link, anything that is no plain file, an odd name, too many files or too large a one: nothing
    outside the folder is ever opened.
    """
    found: dict[str, int] = {}
    for name, size in _walk(folder, "", 3):
        found[name] = size
        if len(found) > FILES:
            raise Refused(str(folder), f"more than {FILES} files")
    return {name: found[name] for name in sorted(found) if name not in (MANIFEST, SIGNATURE)}


def _walk(folder: Path, prefix: str, depth: int) -> Iterator[tuple[str, int]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise Refused(prefix or str(folder), f"it cannot be read: {error.strerror}") from error
    for entry in entries:
        name = prefix + entry.name
        told = entry.stat(follow_symlinks=False)
        if not _NAME.fullmatch(entry.name):
            raise Refused(name, "no file of a bundle has such a name")
        if stat.S_ISDIR(told.st_mode):
            if depth <= 1:
                raise Refused(name, "folders are nested too deeply")
            yield from _walk(folder / entry.name, f"{name}/", depth - 1)
        elif not stat.S_ISREG(told.st_mode):
            raise Refused(name, "neither a plain file nor a folder; links are not followed")
        elif told.st_size > FILE_BYTES:
            raise Refused(name, f"{told.st_size:,} bytes are more than a bundle's file may have ({FILE_BYTES:,})")
        else:
            yield name, told.st_size


def build(folder: Path) -> dict[str, Any]:
    """The manifest of what is in a folder."""
    listed = {name: {"bytes": size, "sha256": _sha256(folder / name)} for name, size in files(folder).items()}
    return {"format": FORMAT, "files": listed}


def differences(folder: Path) -> list[tuple[str, str]]:
    """Where a folder is not what its manifest says: (file, what is wrong). Raises Refused without a manifest."""
    told = read_json(folder / MANIFEST, MANIFEST, _MANIFEST_BYTES)
    if not _well_formed(told):
        raise Refused(MANIFEST, "it is not {format, files: {name: {bytes, sha256}}}")
    listed: dict[str, dict[str, Any]] = told["files"]
    present = files(folder)
    wrong = [(name, "the manifest names it, but it is missing") for name in sorted(set(listed) - set(present))]
    wrong += [(name, "the manifest does not name it") for name in sorted(set(present) - set(listed))]
    for name in sorted(set(listed) & set(present)):
        if listed[name]["bytes"] != present[name]:
            wrong.append((name, f"it has {present[name]:,} bytes, the manifest says {listed[name]['bytes']:,}"))
        elif listed[name]["sha256"] != _sha256(folder / name):
            wrong.append((name, "its SHA-256 is not that of the manifest: it was changed"))
    return wrong


def _well_formed(told: Any) -> bool:
    return (
        isinstance(told, dict)
        and set(told) == {"format", "files"}
        and told["format"] == FORMAT
        and isinstance(told["files"], dict)
        and all(
            isinstance(entry, dict)
            and set(entry) == {"bytes", "sha256"}
            and type(entry["bytes"]) is int
            and isinstance(entry["sha256"], str)
            for entry in told["files"].values()
        )
    )


def _sha256(path: Path) -> str:
    # The folder was walked without following links; a link that takes a file's place meanwhile is not followed either.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
