"""Room on the disk: what engines may take of it, and what is said where there is none."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from helios.errors import InputError, StorageError

__all__ = ["BUDGET", "budget_bytes", "failing", "gigabytes", "require_room"]

BUDGET = 200
"""Gigabytes (10⁹ bytes) that all engines together may take, unless HELIOS_TRT_BUDGET says otherwise."""


def budget_bytes() -> int:
    """What is allowed, in bytes. Raises InputError where the variable is no number of gigabytes."""
    text = os.environ.get("HELIOS_TRT_BUDGET", "")
    try:
        gigabytes = float(text) if text else BUDGET
    except ValueError:
        gigabytes = -1
    if not gigabytes > 0:
        raise InputError(f"HELIOS_TRT_BUDGET is {text!r}, wanted gigabytes", f"HELIOS_TRT_BUDGET={BUDGET}")
    return int(gigabytes * 10**9)


@contextlib.contextmanager
def failing(path: Path) -> Iterator[None]:
    """Within, a disk that is full or cannot be written is a StorageError that names the place."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO):
            raise  # not of the place: what reads weights may fail within, too
        fix = "free some room there" if full else "check that the folder can be written"
        why = f"cannot keep an engine in {path}: {error.strerror or error}"
        raise StorageError(why, f"{fix}, or set XDG_CACHE_HOME to a place on another disk") from error


def require_room(folder: Path, needed: int) -> None:
    """Raises StorageError unless so many bytes are free there."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"building an engine needs {gigabytes(needed)} in {folder}, where {gigabytes(free)} are free",
            f"free {gigabytes(needed - free)} there, or set XDG_CACHE_HOME to a place on another disk",
        )


def gigabytes(size: int) -> str:
    """Bytes for a reader, in powers of ten."""
    return f"{size / 1e9:.2f} GB"
