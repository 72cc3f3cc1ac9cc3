"""The parent's hold on a worker process: it starts one, hands it cases, and tells how it died."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helios_conformance.case import Case, Observation
from helios_conformance.protocol import Channel, Closed, Late, Malformed, decode, told_of

__all__ = ["Lost", "Refused", "Worker", "peak_rss"]

START_SECONDS = 180.0
"""For imports and the backend's probe; scaled like the time of cases, but never less."""
LOG_BYTES = 16 << 20
"""Beyond this a log is emptied between two cases: a backend that prints must not fill the disk."""
_TICK = 0.5


class Lost(Exception):
    """The worker is gone, or was killed because nothing came back; the text is the reason for the record."""


class Refused(Exception):
    """The backend cannot run here, by its own word."""

    def __init__(self, why: str, fix: str) -> None:
        super().__init__(why)
        self.why, self.fix = why, fix


def peak_rss(pid: int | str = "self") -> int:
    """Largest resident memory of a process so far, in bytes; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class Worker:
    """A warm process that serves cases.

    Args:
        start: what it is told at first: backend, seed, nonce, model, options, threads.
        folder: for its log and the files that it hands over; there already.
        patience: factor on all times.

    Attributes:
        backend: what the backend says of itself.
        peak: largest resident memory so far, bytes.

    Raises:
        Refused: the backend cannot run.
        Lost: the process ended, or said nothing in time.
    """

    def __init__(self, start: Mapping[str, Any], folder: Path, patience: float = 1.0) -> None:
        self._log, self._file = folder / "worker.log", folder / "kept.safetensors"
        self.peak, self._since, self._what = 0, 0, "while it started"
        self._process, self._channel = self._spawn()
        try:
            self._send({"start": dict(start)})
            message = self._receive(START_SECONDS * max(1.0, patience))
            if "refused" in message:
                told = message["refused"]
                raise Refused(str(told["why"]), str(told["fix"]))
            self.backend: dict[str, Any] = message["ready"]
            self.withheld: dict[str, str] = message.get("withheld", {})
        except KeyError as error:
            self.stop()
            raise Lost(f"the worker did not start: it said {message!r}"[:500]) from error
        except BaseException:
            self.stop()
            raise

    def _spawn(self) -> tuple[subprocess.Popen[bytes], Channel]:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # -P: no module of the working folder may stand in for torch.
        command = [sys.executable, "-P", "-m", "helios_conformance.worker", str(theirs_in), str(theirs_out)]
        try:
            with self._log.open("ab") as log:
                self._since = log.tell()
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs_in, theirs_out),
                    start_new_session=True,  # a group of its own: Ctrl-C passes it by, and all of it can be killed
                )
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        return process, Channel(ours_in, ours_out)

    @property
    def pid(self) -> int:
        return self._process.pid

    def observe(self, case: Case, timeout: float) -> tuple[Observation, float]:
        """What came back, and seconds by the parent's clock.

        Raises Lost; the worker is of no more use then.
        """
        self._trim_log()
        self._what = f"in {case.id}"
        begin = time.monotonic()
        self._send({"run": told_of(case), "file": str(self._file)})
        arrived: list[list[Any]] = []
        while True:
            message = self._receive(timeout - (time.monotonic() - begin), timeout)
            seconds = time.monotonic() - begin
            if "told" not in message:
                break
            arrived.append([round(seconds, 6), message["told"]])
        self.peak = max(self.peak, peak_rss(self.pid))
        return self._observed(case, message, arrived), seconds

    def _observed(self, case: Case, message: Mapping[str, Any], arrived: list[list[Any]]) -> Observation:
        if "unfit" in message:
            return Observation(facts={"error": f"a result that cannot be handed over: {message['unfit']}"[:2000]})
        try:
            if message.get("done", {}).get("id") != case.id:
                raise Malformed("a result that is not of this case")
            observation = decode(message["done"], self._file)
        except (Malformed, AttributeError) as error:
            raise self._given_up(f"sent {error}"[:1000]) from error
        if not arrived:
            return observation
        return dataclasses.replace(observation, facts={**observation.facts, "told": arrived})

    def _send(self, message: Mapping[str, Any]) -> None:
        try:
            self._channel.send(message)
        except Closed:
            raise self._died() from None

    def _receive(self, left: float, allowed: float | None = None) -> dict[str, Any]:
        """The next message, looking now and then whether the process still is: a child of its own that it left behind
        may hold its pipe open."""
        deadline = time.monotonic() + left
        while True:
            gone = self._process.poll() is not None
            try:
                return self._channel.receive(0.0 if gone else min(_TICK, max(0.0, deadline - time.monotonic())))
            except Closed:
                raise self._died() from None
            except Malformed as error:
                raise self._given_up(f"sent {error}") from error
            except Late:
                self.peak = max(self.peak, peak_rss(self.pid))  # of a process that dies later, nobody could ask
                if gone:
                    raise self._died() from None
                if time.monotonic() >= deadline:
                    raise self._hung(left if allowed is None else allowed) from None

    def _hung(self, allowed: float) -> Lost:
        with contextlib.suppress(OSError):
            self._process.send_signal(signal.SIGUSR1)  # it then writes into its log where it is
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.3)
        return self._given_up(f"gave no result in {allowed:g} s (timeout) and was killed")

    def _given_up(self, what: str) -> Lost:
        self.stop()
        return Lost(f"the worker {what} {self._what}{self._last_words()}")

    def _died(self) -> Lost:
        self.peak = max(self.peak, peak_rss(self.pid))
        try:
            code: int | None = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            code = None
        self.stop()
        return Lost(f"the worker {_ending(code)} {self._what}{self._last_words()}")

    def _last_words(self) -> str:
        words = _tail(self._log, self._since)
        return f"; last lines of its log: {words}" if words else ""

    def _trim_log(self) -> None:
        with contextlib.suppress(OSError):
            self._since = self._log.stat().st_size
            if self._since > LOG_BYTES:
                os.truncate(self._log, 0)
                self._since = 0

    def stop(self) -> None:
        """Kill it and all that it started; nothing if it is gone."""
        self.peak = max(self.peak, peak_rss(self.pid))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._channel.close()
        self._file.unlink(missing_ok=True)


def _ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "closed its pipe"
    if code >= 0:
        return f"exited with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    by_kernel = " (by the system for want of memory, or by hand)" if name == "SIGKILL" else ""
    return f"was killed by {name}{by_kernel}"


def _tail(log: Path, since: int, lines: int = 8) -> str:
    """The lines that tell most: after a crash those that follow its headline, otherwise the last."""
    try:
        with log.open("rb") as file:
            file.seek(max(since, log.stat().st_size - (64 << 10)))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    found = [line.strip()[:200] for line in text.splitlines() if line.strip()]
    found = [line for line in found if not line.startswith("Extension modules:")]
    headlines = [i for i, line in enumerate(found) if line.startswith("Fatal Python error")]
    headlines += [i for i, line in enumerate(found) if line.endswith("(most recent call first):")]
    chosen = found[headlines[0] :][:lines] if headlines else found[-lines:]
    return " | ".join(chosen)[:1500]
