"""What the parent and a worker say to each other: JSON lines over a private pair of pipes, tensors as safetensors.

Never the worker's standard output, on which a backend prints what it likes; never pickle, which would let the judged
process run code in the judging one.

Parent to worker::

    {"start": {"backend", "seed", "nonce", "model", "options", "threads"}}
    {"run": {case}, "file": path for the kept elements}

Worker to parent::

    {"ready": {what the backend says of itself}, "withheld": {precision: why not}}   or   {"refused": {"why", "fix"}}
    {"told": {…}}                                  any number of times while a case runs
    {"done": {observation}}
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helios_conformance.case import Case, Observation, Verdict
from helios_conformance.record import observation_of, record, tensors_of

__all__ = ["Channel", "Closed", "Late", "Malformed", "case_of", "decode", "encode", "told_of"]

LIMIT = 64 << 20
"""Bytes of one line. What is longer is no message of ours."""


class Closed(Exception):
    """The other side is gone."""


class Late(Exception):
    """Nothing came in time."""


class Malformed(Exception):
    """What came is no message."""


class Channel:
    """One side of the pair of pipes.

    Args:
        read, write: file descriptors; they belong to the channel from now on.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._buffer = bytearray()

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises Closed where nobody reads any more, ValueError or TypeError for what is not JSON (NaN is not)."""
        data = memoryview(json.dumps(message, allow_nan=False).encode() + b"\n")
        try:
            while data:
                data = data[os.write(self._write, data) :]
        except OSError as error:
            raise Closed from error

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message. Raises Closed, Late after ``timeout`` seconds, or Malformed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > LIMIT:
                raise Malformed(f"a line of more than {LIMIT} bytes")
            self._fill(deadline)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return _parsed(line)

    def _fill(self, deadline: float | None) -> None:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        # poll, not select: a process with a thousand open files has descriptors that select refuses.
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        if not poll.poll(None if left is None else left * 1000):
            raise Late
        try:
            piece = os.read(self._read, 1 << 16)
        except OSError as error:
            raise Closed from error
        if not piece:
            raise Closed
        self._buffer += piece

    def close(self) -> None:
        for descriptor in (self._read, self._write):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"a line that is not JSON: {line[:80]!r}") from error
    if not isinstance(message, dict):
        raise Malformed(f"a line that is no JSON object: {line[:80]!r}")
    return message


def told_of(case: Case) -> dict[str, Any]:
    """A case as JSON values."""
    return dataclasses.asdict(case)


def case_of(told: Mapping[str, Any]) -> Case:
    """The case that ``told_of`` described."""
    return Case(**told)


def encode(case: Case, observation: Observation, file: Path) -> dict[str, Any]:
    """An observation as JSON values; its kept elements go to a safetensors file, if there are any."""
    from safetensors.torch import save_file

    tensors = tensors_of(case.id, observation)
    if tensors:
        save_file(tensors, file)
    return record(case, observation, Verdict("not_run"), 0.0)


def decode(told: Any, file: Path) -> Observation:
    """What ``encode`` wrote; the file is taken away. Raises Malformed."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(file.read_bytes()) if told["outputs"] else {}
        return observation_of(told, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError, SafetensorError) as error:
        raise Malformed(f"a result that is no observation: {type(error).__name__}: {error}") from error
    finally:
        file.unlink(missing_ok=True)
