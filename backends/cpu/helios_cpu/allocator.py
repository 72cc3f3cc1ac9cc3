"""Keep freed memory in the process.

glibc gives large blocks back to the kernel when they are freed, and every fresh page is then cleared and mapped anew on
first touch. A step frees and takes the same sizes thousands of times, so that costs more than many of the ops.
"""

from __future__ import annotations

import ctypes
import functools
import platform

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 1 << 30


@functools.cache
def keep_freed_memory() -> bool:
    """Serve blocks up to 1 GiB from the heap and never trim it. Whether this C library could be told so.

    A setting of the whole process, so it is made when the first program is compiled, and never at import.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    done = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(done)
