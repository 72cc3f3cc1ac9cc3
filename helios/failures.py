"""What goes wrong on a device, as Helios says it: what was needed, what was free, what to do next.

Work is queued, so that a failure may surface in another call than its own. What a vendor's runtime says is data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator

import torch

from helios.errors import BackendError

__all__ = ["RESUME", "Failures", "Memory", "sized"]

Memory = Callable[[], tuple[int, int] | None]
"""Tells free and total bytes of the device, where it can."""

RESUME = "finished chunks are kept: the same command with --resume goes on after them"


@dataclasses.dataclass(frozen=True, slots=True)
class Failures:
    """What a vendor's runtime says of a device, and what to do then. Signs are parts of messages, in lower case.

    Attributes:
        no_room, busy, lost: signs of a full device, of one that somebody else has, and of one that is gone.
        taken: who has a busy one: "another process …".
        others: which command lists what else uses the device.
        another: how another device is chosen: "choose another (cuda:1)".
        reset: when a lost device has to be reset first.
        too_large: what to do with weights that no empty device of this kind holds.
        instead: what can be done beside that, where others hold the memory: ", or …"; may be empty.
    """

    no_room: tuple[str, ...]
    busy: tuple[str, ...]
    lost: tuple[str, ...]
    taken: str
    others: str
    another: str
    reset: str
    too_large: str
    instead: str = ""

    @contextlib.contextmanager
    def explained(self, doing: str, device: str, memory: Memory) -> Iterator[None]:
        """Within, a full, taken or lost device is a BackendError; any other error stays what it is. Arguments as of
        ``explain``."""
        try:
            yield
        except RuntimeError as error:  # torch's OutOfMemoryError and AcceleratorError are kinds of it
            told = self.explain(error, doing, device, memory)
            if told is None:
                raise
            raise told from error

    def explain(self, error: BaseException, doing: str, device: str, memory: Memory) -> BackendError | None:
        """What an error means, if the device is full, taken or lost.

        Args:
            doing: for the sentence "no room for …", such as ``the weights``.
            device: as messages call it.
            memory: asked when the device is full.
        """
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or _any(self.no_room, text):
            return self._full(doing, device, text, memory)
        if self.is_busy(text):
            fix = f"{self.others}; end that, or {self.another}; {RESUME}"
            return BackendError(f"{device} is taken: {self.taken}", fix)
        if _any(self.lost, text):
            first = next(line for line in text.splitlines() if line.strip()).strip()
            why = f"{device} was lost during {doing}: {first[:200]}"
            return BackendError(why, f"{RESUME}, in a new process; {self.reset}")
        return None

    def is_busy(self, text: str) -> bool:
        """Whether the runtime says that somebody else has the device."""
        return _any(self.busy, text)

    def _full(self, doing: str, device: str, text: str, memory: Memory) -> BackendError:
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        needed = f"{wanted[1]} more" if wanted else "more memory"
        try:
            told = memory()
        except RuntimeError:  # a device too full to answer
            told = None
        free = f"; {sized(told[0])} of {sized(told[1])} is free" if told else ""
        return BackendError(
            f"{device} has no room for {doing}: it needs {needed}{free}",
            f"a smaller --height and --width need less, and `helios fit` says how much; {self.others}; {RESUME}",
        )

    def require_room(self, needed: int, told: tuple[int, int] | None, held: int, device: str) -> None:
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
        what, fix = "", self.too_large
        if needed <= total:
            what = f", {sized(total - free)} is in use"
            choices = f"{self.another}, or {self.instead}" if self.instead else f"or {self.another}"
            fix = f"{self.others}; end that, {choices}"
        why = f"the weights need {sized(needed)} on {device}; {sized(free)} of {sized(total)} is free{what}"
        raise BackendError(why, fix)


def _any(signs: tuple[str, ...], text: str) -> bool:
    low = text.lower()
    return any(sign in low for sign in signs)


def sized(count: int) -> str:
    """Bytes for a reader.

    >>> sized(28_600_000_000)
    '26.6 GiB'
    """
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
