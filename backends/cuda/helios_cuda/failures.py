"""What goes wrong on a GPU, as Helios says it: what was needed, what was free, what to do next.

A kernel that fails is noticed by whatever asks the device next, so these may surface in another call than their own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import torch

from helios.errors import BackendError

__all__ = ["Memory", "explain", "explained", "require_room", "sized"]

Memory = Callable[[], tuple[int, int] | None]
"""Tells free and total bytes of the device, where it can."""

_LOST = (
    "context is destroyed",
    "device-side assert",
    "driver shutting down",
    "ecc error",
    "fallen off the bus",
    "hardware stack error",
    "illegal instruction",
    "illegal memory access",
    "launch timed out",
    "misaligned address",
    "no longer available",
    "unknown error",
    "unspecified launch failure",
)
"""What CUDA says when nothing in this process can use the GPU any more."""

_NO_ROOM = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")

RESUME = "finished chunks are kept: the same command with --resume goes on after them"


@contextlib.contextmanager
def explained(doing: str, device: str, memory: Memory) -> Iterator[None]:
    """Within, a full or a lost GPU is a BackendError; any other error stays what it is. Arguments as of ``explain``."""
    try:
        yield
    except RuntimeError as error:  # torch's OutOfMemoryError and AcceleratorError are kinds of it
        told = explain(error, doing, device, memory)
        if told is None:
            raise
        raise told from error


def explain(error: BaseException, doing: str, device: str, memory: Memory) -> BackendError | None:
    """What an error means, if the GPU is full, taken or lost.

    Args:
        doing: for the sentence "no room for …", such as ``the weights``.
        device: as messages call it.
        memory: asked when the device is full.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in _NO_ROOM):
        return _full(doing, device, text, memory)
    if "busy or unavailable" in text.lower():
        return BackendError(
            f"{device} is taken: another process has the GPU for itself, in exclusive mode",
            f"{_OTHERS}; end that, or choose another (cuda:1); {RESUME}",
        )
    if any(sign in text.lower() for sign in _LOST):
        return _gone(doing, device, text)
    return None


def _full(doing: str, device: str, text: str, memory: Memory) -> BackendError:
    wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    needed = f"{wanted[1]} more" if wanted else "more memory"
    try:
        told = memory()
    except RuntimeError:  # a device too full to answer
        told = None
    free = f"; {sized(told[0])} of {sized(told[1])} is free" if told else ""
    return BackendError(
        f"{device} has no room for {doing}: it needs {needed}{free}",
        f"a smaller --height and --width need less, and `helios fit` says how much; {_OTHERS}; {RESUME}",
    )


_OTHERS = "`nvidia-smi` lists what else is on the GPU"
_LOW = "--memory low (--backend-option memory=low)"


def _gone(doing: str, device: str, text: str) -> BackendError:
    first = next(line for line in text.splitlines() if line.strip()).strip()
    return BackendError(
        f"{device} was lost during {doing}: {first}",
        f"{RESUME}, in a new process; if `nvidia-smi` does not list the GPU, it has to be reset first",
    )


def require_room(needed: int, told: tuple[int, int] | None, held: int, device: str) -> None:
    """Refuse to begin with weights that cannot fit.

    Args:
        needed: bytes of the weights.
        told: free and total bytes of the device; ``None`` asks nothing.
        held: bytes that this process has taken from the device and can use again.
        device: as messages call it.

    Raises:
        BackendError: says what is needed, what is free, and how much others hold.
    """
    if told is None or needed <= told[0] + held:
        return
    free, total = told[0] + held, told[1]
    if needed > total:
        what, fix = "", f"stream them from the host: {_LOW}; `helios fit` says what fits"
    else:
        what = f", {sized(total - free)} is in use"
        fix = f"{_OTHERS}; end that, choose another (cuda:1), or stream the weights: {_LOW}"
    raise BackendError(
        f"the weights need {sized(needed)} on {device}; {sized(free)} of {sized(total)} is free{what}", fix
    )


def sized(count: int) -> str:
    """Bytes for a reader.

    >>> sized(28_600_000_000)
    '26.6 GiB'
    """
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
