"""What goes wrong on an NPU, as Helios says it: what was needed, what was free, what to do next.

Work is queued, so that a failure may surface in another call than its own. Numbers are CANN's error codes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import torch

from helios.errors import BackendError

__all__ = ["Memory", "explain", "explained", "is_busy", "require_room", "sized"]

Memory = Callable[[], tuple[int, int] | None]
"""Tells free and total bytes of the device, where it can."""

_NO_ROOM = ("npu out of memory", "el0004", "207001", "failed to allocate memory")
_BUSY = ("el0005", "resource_busy", "resource busy", "507033")
_LOST = (
    "507014",  # an operator ran too long on the cube cores
    "507015",  # an exception there: a wrong address, an instruction that failed
    "507018",  # on the device's own processor
    "507034",  # too long on the vector cores
    "507035",  # an exception there
    "507057",  # the device answers no more
    "507899",  # the driver failed
    "aicore exception",
    "aicore timeout",
    "device lost",
    "force stop",
    "heartbeat",
    "uce error",
    "vector core exception",
)
_OTHERS = "`npu-smi info` lists what else is on the device"
RESUME = "finished chunks are kept: the same command with --resume goes on after them"


@contextlib.contextmanager
def explained(doing: str, device: str, memory: Memory) -> Iterator[None]:
    """Within, a full, busy or lost NPU is a BackendError; other errors stay what they are. Arguments as ``explain``."""
    try:
        yield
    except RuntimeError as error:  # torch's OutOfMemoryError is one
        told = explain(error, doing, device, memory)
        if told is None:
            raise
        raise told from error


def explain(error: BaseException, doing: str, device: str, memory: Memory) -> BackendError | None:
    """What an error means, if the NPU is full, taken or lost.

    Args:
        doing: for the sentence "no room for …", such as ``the weights``.
        device: as messages call it.
        memory: asked when the device is full.
    """
    text = str(error)
    low = text.lower()
    if isinstance(error, torch.OutOfMemoryError) or any(sign in low for sign in _NO_ROOM):
        return _full(doing, device, text, memory)
    if is_busy(text):
        return BackendError(
            f"{device} is taken: another process, or another container, has it for itself",
            f"{_OTHERS}; end that, or choose another (ascend:1); {RESUME}",
        )
    if any(sign in low for sign in _LOST):
        first = next(line for line in text.splitlines() if line.strip()).strip()
        return BackendError(
            f"{device} was lost during {doing}: {first[:200]}",
            f"{RESUME}, in a new process; if `npu-smi info` does not show the device as OK, it has to be reset first",
        )
    return None


def is_busy(text: str) -> bool:
    """Whether CANN says that somebody else has the device."""
    return any(sign in text.lower() for sign in _BUSY)


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
        what, fix = "", "take a card with more memory: `helios fit` says what fits; weights are not streamed here"
    else:
        what, fix = f", {sized(total - free)} is in use", f"{_OTHERS}; end that, or choose another (ascend:1)"
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
