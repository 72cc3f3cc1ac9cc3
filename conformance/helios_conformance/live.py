"""How far a run is: a table on a terminal, plain lines where there is none."""

from __future__ import annotations

import collections
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from helios_conformance.case import LEVELS, Case, is_diagnostic
from helios_conformance.draws import Root

__all__ = ["Progress", "reproduce"]

QUIET_SECONDS = 10.0
"""Between two plain lines that say no more than how far it is."""
_COLUMNS = (
    ("pass", "passed", "green"),
    ("fail", "failed", "bold red"),
    ("diag", "diag", "magenta"),
    ("unsupported", "unsupported", "yellow"),
)
"""``diag`` are failures that decide nothing: single ops of an engine."""


def reproduce(spec: str, case: str, root: Root) -> str:
    """The command that runs one case again, on the same draws."""
    words = ["helios", "certify", "--backend", spec, "--filter", case, "--seed", str(root.seed)]
    return shlex.join(words + (["--nonce", root.nonce] if root.nonce else []))


def _cases(number: int) -> str:
    return f"{number} case" + "s" * (number != 1)


class Progress:
    """A ``runner.Watcher`` that tells on standard error; a context manager around the run.

    Args:
        spec, root: the backend as it was selected, and the run's draws: for commands to paste.
        terminal: whether to draw a table; default: whether standard error is a terminal.
    """

    def __init__(self, spec: str, root: Root, *, terminal: bool | None = None) -> None:
        self._spec, self._root = spec, root
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._totals: collections.Counter[str] = collections.Counter()
        self._states: dict[str, collections.Counter[str]] = {level: collections.Counter() for level in LEVELS}
        self._case, self._title = "", "starting the worker"
        self._begin = self._told = time.monotonic()
        self._earlier = 0
        self._reasons: set[str] = set()
        self._kind = ""
        self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Progress:
        if self._terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._case = ""
        if self._terminal:
            self._live.stop()

    # --- what the run tells -------------------------------------------------------------------------------------------

    def begin(self, cases: Sequence[Case], backend: Mapping[str, Any]) -> None:
        """The cases of the run; those of an earlier part of it are told as finished right after."""
        self._totals.update(case.level for case in cases)
        device = backend["device"]["name"] if backend["device"] else "no device"
        emulated = f", emulated: {backend['emulated']}" if backend["emulated"] else ""
        self._title = f"{backend['label']} on {device}{emulated}"
        self._kind = str(backend.get("kind") or "")
        if not self._terminal:
            self._say(f"{_cases(len(cases))}, {self._title}")

    def at(self, case: Case) -> None:
        """The case that runs now."""
        if not self._case:
            self._begin, self._earlier = time.monotonic(), self.done
        self._case = case.id
        now = time.monotonic()
        if not self._terminal and now - self._told >= QUIET_SECONDS:
            self._told = now
            told = [f"{self.done} of {_cases(sum(self._totals.values()))}", self._rate(), f"at {case.id}"]
            self._say(", ".join(text for text in told if text))

    def finished(self, record: Mapping[str, Any]) -> None:
        """A verdict. Failures are told at once; one reason for many cases not run is told once."""
        level, reason = record["level"], record["reason"]
        state, required = self._counts(record)
        self._states[level][state] += 1
        if state in ("fail", "diag"):
            text = f"{state.upper()} {record['id']}: {reason}\n     {reproduce(self._spec, record['id'], self._root)}"
            self._say(text, "red" if state == "fail" else "magenta")
        elif state in ("unsupported", "not_run") and required and reason not in self._reasons:
            self._reasons.add(reason)
            self._say(f"{state.replace('_', ' ').upper()} {record['id']}: {reason}", "yellow")
        if not self._terminal and self._states[level].total() == self._totals[level]:
            self._say(f"{level}: {self._counted(level)}")

    def _counts(self, record: Mapping[str, Any]) -> tuple[str, bool]:
        """The state that a record is counted as, and whether a certificate needs the case. A backend of kernels that
        runs a case's graph whole is an engine from then on."""
        if record.get("facts", {}).get("engine") is True:
            self._kind = "engine"
        if not is_diagnostic(self._kind, record["level"]):
            return record["state"], record["required"]
        return "diag" if record["state"] == "fail" else record["state"], False

    def note(self, text: str) -> None:
        """A worker was lost. In a case that is told with the case; while it started it is told here."""
        if not self._case:
            self._say(text, "yellow")

    # --- how it looks -------------------------------------------------------------------------------------------------

    @property
    def done(self) -> int:
        """Cases with a verdict."""
        return sum(states.total() for states in self._states.values())

    def _rate(self) -> str:
        seconds = time.monotonic() - self._begin
        return f"{(self.done - self._earlier) / seconds:.1f} cases a second" if seconds > 1 else ""

    def _counted(self, level: str) -> str:
        states = self._states[level]
        return ", ".join(f"{states[s]} {s.replace('pass', 'passed').replace('_', ' ')}" for s in sorted(states))

    def _say(self, text: str, style: str = "") -> None:
        # A line from outside may hold control characters; rich would hand those of colour to the terminal.
        clean = "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
        self._console.print(Text(clean, style=style), soft_wrap=True)

    def _table(self) -> Table:
        seconds = time.monotonic() - self._begin
        shown = Table(title=Text(self._title), title_justify="left", caption_justify="left")
        shown.caption = Text(f"{self._case}  {self._rate()}  {seconds:.0f} s")
        shown.add_column("level")
        for _, name, style in _COLUMNS:
            shown.add_column(name, justify="right", style=style)
        for name in ("not run", "of"):
            shown.add_column(name, justify="right")
        for level in LEVELS:
            total, states = self._totals[level], self._states[level]
            if total:
                counts = (str(states[state] or "") for state, _, _ in _COLUMNS)
                waiting = total - states.total() + states["not_run"]
                shown.add_row(level, *counts, str(waiting or ""), str(total))
        return shown
