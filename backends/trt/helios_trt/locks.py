"""Locks between processes: files that the system unlocks when a process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Held", "exclusive", "shared"]


class Held:
    """A lock that is held as long as this object is there; at the latest until the process ends."""

    def __init__(self, descriptor: int) -> None:
        self.release = weakref.finalize(self, os.close, descriptor)


def shared(path: Path) -> Held:
    """A lock that many may hold, and that keeps ``exclusive`` out. Waits for whoever has it alone."""
    return Held(_locked(path, fcntl.LOCK_SH))


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool) -> Iterator[bool]:
    """A lock for one. Yields whether it is held: without ``wait`` it may not be.

    The file stays: were it removed, a process that had opened it before would hold a lock that nobody sees.
    """
    try:
        descriptor = _locked(path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        os.close(descriptor)


def _locked(path: Path, how: int) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, how)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
