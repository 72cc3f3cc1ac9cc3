"""How far a build is, in one line with an estimate: a build of minutes that says nothing looks like one that hangs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

__all__ = ["Line", "Phases", "monitor"]

QUIET_SECONDS = 10.0
"""Between two lines where there is no terminal to write one line anew."""


class Line:
    """Lines on standard error: rewritten in place on a terminal, seldom elsewhere."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._told = float("-inf")
        self._open = False

    def now(self, text: str) -> None:
        """What is going on; shown if it is time to."""
        now = self._clock()
        terminal = self._stream.isatty()
        if now - self._told < (0.2 if terminal else QUIET_SECONDS):
            return
        self._told = now
        self._stream.write(f"\r\x1b[K{text}" if terminal else f"{text}\n")
        self._stream.flush()
        self._open = terminal

    def say(self, text: str) -> None:
        """A line that stays."""
        self._stream.write(("\r\x1b[K" if self._open else "") + text + "\n")
        self._stream.flush()
        self._open, self._told = False, float("-inf")


class Phases:
    """The nested phases that TensorRT reports, as one part between 0 and 1.

    A phase of n steps that has done k counts k/n, and a phase inside it counts as part of its next step. Phases differ
    in length, so the estimate is a rough one and is called so.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._begin = clock, clock()
        self._open: list[tuple[str, int, int]] = []

    def start(self, name: str, steps: int) -> None:
        self._open.append((name, 0, max(steps, 1)))

    def step(self, name: str, step: int) -> None:
        self._open = [(n, max(done, step + 1) if n == name else done, steps) for n, done, steps in self._open]

    def finish(self, name: str) -> None:
        at = next((i for i in reversed(range(len(self._open))) if self._open[i][0] == name), None)
        if at is not None:
            del self._open[at]

    @property
    def done(self) -> float:
        part, scale = 0.0, 1.0
        for _, done, steps in self._open:
            part += scale * min(done / steps, 1.0)
            scale /= steps
        return min(part, 1.0)

    def text(self, what: str) -> str:
        """One line.

        >>> from itertools import count
        >>> phases = Phases(count(0, 30).__next__)
        >>> phases.start("build", 4); phases.step("build", 0)
        >>> phases.text("denoise.0")
        'building the engine of denoise.0: build, 25 %, 30 s, some 2 min left'
        """
        seconds, done = self._clock() - self._begin, self.done
        left = f", some {_long(seconds / done - seconds)} left" if done >= 0.02 else ""
        inner = f"{self._open[-1][0]}, " if self._open else ""
        return f"building the engine of {what}: {inner}{done:.0%}, {_long(seconds)}{left}".replace("%", " %")


def _long(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min"


def monitor(module: Any, what: str, line: Line) -> Any:
    """What TensorRT reports to. An interrupt ends the build: an exception must not cross it, so it is kept and the
    build is told to stop.

    Attributes:
        stopped: the exception that was raised while it was told something.
    """

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.stopped: BaseException | None = None
            self._phases = Phases()

        def _told(self, update: Callable[..., None], *given: Any) -> bool:
            try:
                update(*given)
                line.now(self._phases.text(what))
            except BaseException as error:  # C++ calls this
                self.stopped = self.stopped or error
            return self.stopped is None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._told(self._phases.start, phase_name, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self._told(self._phases.finish, phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._told(self._phases.step, phase_name, step)

    return Monitor()
