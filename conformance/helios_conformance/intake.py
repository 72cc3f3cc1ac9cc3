"""Reading what a stranger wrote: bounded in size and depth before it is parsed, and never more than data."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["REPORT_BYTES", "Refused", "read_bytes", "read_json", "shown"]

REPORT_BYTES = 32 << 20
"""Bytes that ``report.json`` may have; that of the full suite has a few million."""
DEPTH = 32
"""Levels of nesting that JSON may have."""
DIGITS = 40
"""Characters that a number may have."""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""Possessive, and its end optional: linear in time whatever the bytes are."""


class Refused(Exception):
    """A file is not what a bundle may hold. Internal: it becomes a finding.

    Args:
        where: the file, or the place in it.
        what: what is wrong with it.
    """

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where, self.what = where, what


def read_bytes(path: Path, name: str, most: int) -> bytes:
    """A plain file of bounded size; links are not followed. Raises Refused."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise Refused(name, f"{size:,} bytes; at most {most:,} are read")
            return file.read(most + 1)
    except FileNotFoundError:
        raise Refused(name, "it is missing") from None
    except OSError as error:
        raise Refused(name, f"it cannot be read: {error.strerror or error}") from error


def read_json(path: Path, name: str, most: int = REPORT_BYTES) -> Any:
    """JSON from a file: no duplicate keys, no NaN, nothing that is nested deeply. Raises Refused."""
    data = read_bytes(path, name, most)
    if _depth(data) > DEPTH:
        raise Refused(name, f"nested more than {DEPTH} levels deep")
    try:
        text = data.decode("utf-8")
        loaded = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
        # Lone surrogates can be written in JSON and nowhere else: no terminal and no file takes them.
        json.dumps(loaded, ensure_ascii=False).encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise Refused(name, f"no valid UTF-8: {error.reason}") from error
    except RecursionError:
        raise Refused(name, "nested too deeply") from None
    except ValueError as error:
        raise Refused(name, f"no valid JSON: {shown(str(error))}") from error
    return loaded


def _depth(data: bytes) -> int:
    """Deepest nesting, without parsing; strings do not count."""
    bare = np.frombuffer(_STRING.sub(b"", data), np.uint8)
    steps = np.zeros(len(bare), np.int8)
    steps[(bare == ord("[")) | (bare == ord("{"))] = 1
    steps[(bare == ord("]")) | (bare == ord("}"))] = -1
    steps = steps[steps != 0]
    return int(np.cumsum(steps, dtype=np.int64).max(initial=0))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key!r} stands twice in one object")
        made[key] = value
    return made


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _float(text: str) -> float:
    value = float(text)
    if len(text) > DIGITS or not math.isfinite(value):
        raise ValueError(f"the number {text[:DIGITS]} is out of range")
    return value


def _int(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"the number {text[:DIGITS]}… is out of range")
    return int(text)


def shown(text: str, most: int = 300) -> str:
    """A stranger's text for a terminal: one line, no control characters, bounded."""
    clean = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: most + 1])
    return clean if len(text) <= most else clean[:most] + "…"
