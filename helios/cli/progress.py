"""How far a video is: a bar where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

import typer

from helios.cli import output

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from helios.pipeline import Progress

__all__ = ["Report"]

QUIET_SECONDS = 10.0
"""Between two plain lines about steps."""


class Report:
    """Tells on standard error what a run does, and keeps what the summary says.

    Args:
        chunks: of the whole video.
        terminal: whether to draw a bar; default: whether standard error is a terminal.

    Attributes:
        frames: made so far. seconds: of each part of the work, together.
    """

    def __init__(self, chunks: int, *, terminal: bool | None = None) -> None:
        self.chunks, self.frames = chunks, 0
        self.seconds: Counter[str] = Counter()
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._begin = self._told = time.perf_counter()
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    @property
    def fps(self) -> float:
        """Frames a second so far, everything included."""
        return self.frames / (time.perf_counter() - self._begin)

    def __enter__(self) -> Report:
        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[fps]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("preparing", total=None, fps="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, done: Progress) -> None:
        """After a solver step."""
        text = f"chunk {done.chunk + 1}/{self.chunks} stage {done.stage} step {done.step}/{done.steps}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=text, completed=done.step, total=done.steps, fps=self._fps())
        elif time.perf_counter() - self._told >= QUIET_SECONDS:
            self._say(f"{text}, {output.seconds(done.seconds)}")

    def chunk(self, index: int, frames: int, timings: Mapping[str, float], writing: float) -> None:
        """After a chunk is on disk."""
        self.frames += frames
        self.seconds.update({**timings, "write": writing})
        parts = ", ".join(
            f"{name} {output.seconds(timings[name])}" for name in ("denoise", "decode") if name in timings
        )
        total = output.seconds(timings.get("total", 0.0) + writing)
        self._say(f"chunk {index + 1}/{self.chunks}: {frames} frames in {total} ({parts}); {self._fps()}")

    def warn(self, text: str) -> None:
        """What the user should know about the video."""
        self._say(f"warning: {text}")

    def _fps(self) -> str:
        return f"{self.fps:.3g} FPS so far" if self.frames else ""

    def _say(self, text: str) -> None:
        self._told = time.perf_counter()
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            typer.echo(text, err=True)
