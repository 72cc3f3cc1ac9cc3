"""Every exception that Helios raises on purpose.

::

    HeliosError                  has .why (what was wrong) and .fix (what to do next, may be "")
    ├── InputError               what the caller asked for makes no sense: a size, a prompt, a file, a flag
    ├── CheckpointError          a model folder or repository: missing, damaged, or at odds with its config
    ├── StateError               the saved state of a run: damaged, or from other settings
    ├── StorageError             the disk: too little room, not writable
    ├── BackendError
    │   ├── UnknownBackend       no backend of that name; names the nearest
    │   ├── BackendUnavailable   it exists, but cannot run on this machine: why, and one fix
    │   └── UnsupportedNode      an op of the graph that the backend has no kernel for
    ├── OpError                  an op refused its inputs: rank, size, dtype or attribute
    └── GraphError               a graph that is malformed, or text that is not a graph

The command line prints ``why`` and ``fix`` on one line each and exits with code 2; anything that is not a
``HeliosError`` is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BackendError",
    "BackendUnavailable",
    "CheckpointError",
    "GraphError",
    "HeliosError",
    "InputError",
    "OpError",
    "StateError",
    "StorageError",
    "UnknownBackend",
    "UnsupportedNode",
    "unknown_name",
]


class HeliosError(Exception):
    """Base of all errors raised on purpose.

    Args:
        why: what was wrong: what came and what was wanted.
        fix: what to do next, as one sentence or one command to paste; empty where nothing general can be said.
    """

    def __init__(self, why: str, fix: str = "") -> None:
        super().__init__(why, fix)
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.why}\n  fix: {self.fix}" if self.fix else self.why


class InputError(HeliosError, ValueError):
    """What the caller asked for makes no sense."""


class CheckpointError(HeliosError):
    """A model folder or repository is missing, damaged, or contradicts its own config."""


class StateError(HeliosError):
    """The saved state of a run is damaged, or belongs to other settings."""


class StorageError(HeliosError, OSError):
    """The disk has too little room or cannot be written."""


class BackendError(HeliosError):
    """A backend cannot do what was asked of it."""


class UnknownBackend(BackendError, LookupError):
    """No installed backend has that name."""


class BackendUnavailable(BackendError):
    """The backend is installed but cannot run on this machine."""


class UnsupportedNode(BackendError):
    """The backend has no kernel for a node of the graph, and no fallback was allowed."""


class OpError(HeliosError, ValueError):
    """An op refused its inputs."""


class GraphError(HeliosError, ValueError):
    """A graph is malformed, or a text is not a graph."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for a name that nobody knows: the nearest known one, then all of them, sorted.

    >>> unknown_name("size", "minni", ["mini", "tiny", "14b"])
    "unknown size 'minni': did you mean 'mini'? Known: 14b, mini, tiny"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}:{hint} Known: {', '.join(names) or 'none'}"
