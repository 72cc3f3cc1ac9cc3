"""What the parts of ``tools/on_tensorrt.sh`` share: the sizes, the ways of holding weights, and a scene on engines."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import running
from film import Scene
from rig import Rig

from helios.backend import select

if TYPE_CHECKING:
    from helios.backend import Backend

__all__ = ["PICTURE", "WAYS", "EngineScene", "arguments", "scenes", "sizes"]

WAYS = ("profiles", "inputs")
"""Values of the backend's option ``weights``."""

PICTURE = {"tiny": (64, 64, 16), "mini": (128, 128, 64), "14b": (384, 640, 512)}
"""Height, width and text tokens, by size."""


def arguments(part: str, about: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of every part; nothing is short of time here by default."""
    made = running.parser(part, about)
    made.add_argument("--size", choices=tuple(PICTURE), help="one size alone")
    given = made.parse_args(argv)
    if "--budget" not in (argv or ()):
        given.budget = max(given.budget, 24 * 3600.0)
    return given


def sizes(args: argparse.Namespace) -> tuple[str, ...]:
    """From small to large; with ``--tiny`` the smallest alone."""
    return (args.size,) if args.size else ("tiny",) if args.tiny else tuple(PICTURE)


class EngineScene(Scene):
    """A pipeline on engines, or on another backend beside them.

    Args:
        of: name of the backend.
        way: of holding weights; of ``trt`` alone.
    """

    def __init__(self, rig: Rig, size: str, precision: str, way: str, of: str = "trt") -> None:
        super().__init__(rig, size, *PICTURE[size], precision)
        self.way, self.of = way, of

    @functools.cached_property
    def backend(self) -> Backend:
        return select(self.of, {"weights": self.way} if self.of == "trt" else {})

    @property
    def label(self) -> str:
        """As tables call it."""
        return f"{self.of} {self.way}".strip()

    def release(self) -> None:
        super().release()
        self.__dict__.pop("backend", None)


def scenes(rig: Rig, size: str, precision: str, beside: str = "") -> Iterator[EngineScene]:
    """One for each way, and one on another backend."""
    for way in WAYS:
        yield EngineScene(rig, size, precision, way)
    if beside:
        yield EngineScene(rig, size, precision, "", beside)
