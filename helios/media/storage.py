"""The disk: room for what is about to be written, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helios.errors import HeliosError, StorageError

__all__ = ["atomic", "need_space", "writing"]


def need_space(path: str | os.PathLike[str], needed: int, *, purpose: str = "the output") -> None:
    """Raise StorageError unless ``needed`` bytes are free where ``path`` is, or would be made.

    ``purpose`` says in the message what the room is for.
    """
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StorageError(
            f"{purpose} needs {_size(needed)} in {place}, where {_size(free)} are free",
            f"free {_size(needed - free)} there, or name a place on another disk",
        )


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed, otherwise removed.

    So ``path`` holds either what it held before, or the whole new file, also after a crash of the machine.

    Raises:
        StorageError: no room, no permission, any other failure to write.
    """
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            _sync(part)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write ``path`` into StorageError. PyAV's own errors of the system are OSErrors as well."""
    try:
        yield
    except HeliosError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some room on that disk" if full else "check that the folder exists and can be written"
        raise StorageError(f"cannot write {path}: {error.strerror or error}", f"{fix}, then run again") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
