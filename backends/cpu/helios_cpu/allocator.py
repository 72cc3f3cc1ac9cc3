"""When freed memory stays in the process, and when it goes back to the system.

glibc gives large blocks back to the kernel when they are freed, and every fresh page is then cleared and mapped anew on
first touch. A step frees and takes the same sizes thousands of times, so there that costs more than many of the ops.
Between chunks it is the other way round: what one part of the work left behind does not fit the next, and adds up.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_freed_memory", "return_freed_memory", "returning_at_once"]

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_NEVER = 2**31 - 1
_LARGEST = 1 << 30
_LEAST = 1 << 20


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory() -> bool:
    """Serve blocks up to 1 GiB from the heap and never trim it. Whether this C library could be told so.

    A setting of the whole process, so it is made when a program is compiled, and never at import.
    """
    libc = _libc()
    if libc is None:
        return False
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST) and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))


def return_freed_memory() -> None:
    """Give what is free now back to the system."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


@contextmanager
def returning_at_once() -> Iterator[None]:
    """Within, blocks of 1 MiB and more go back when they are freed: weights come and go once, each in another size."""
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _LEAST)
    try:
        yield
    finally:
        keep_freed_memory()
        return_freed_memory()
