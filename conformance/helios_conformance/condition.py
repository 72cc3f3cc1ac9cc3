"""The condition of a draw: what rounding alone makes of every element of its outputs, and what that allows a device.

The bounds of ``budget`` presume that a draw is an ordinary one and that all elements of an output err alike. Where a
bound is passed, the scene is computed some times more with exact operations whose results are rounded, each time with
other errors of rounding. Nothing of a device, nor of a host's own arithmetic, is in that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from helios_conformance import budget
from helios_conformance.budget import Errors
from helios_conformance.draws import Root
from helios_conformance.golden import Scene, golden, rounded

__all__ = ["DEVIATIONS", "Draw", "Seen"]

DEVIATIONS = 4.0
"""Of its error by which an element may be off: as many as the largest of a few thousand normals has, which stands in
the floor of the worst element too."""

_SETS = 3
"""Of rounding errors, for each draw of the reference: 36 of a small scene. The deviation that so many show is less than
half of the true one in one element of a million."""

_FEW = 4
"""Sets that are computed first, and inputs that say what is ordinary."""

_HOPELESS = 8.0
"""Times its bound beyond which a result is after few sets, where more would not save it: four show less than an eighth
of a deviation in one element of two thousand."""


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """One output of a device, as far as it is kept.

    Attributes:
        name: of the output.
        values: what is kept, 1-D.
        oracle: the same elements, float64.
        choose: takes these elements of a whole output.
        bound: the budget of these elements for a reference that errs so.
    """

    name: str
    values: Tensor
    oracle: Tensor
    choose: Callable[[Tensor], Tensor]
    bound: Callable[[Errors], Errors]


@dataclasses.dataclass(frozen=True, slots=True)
class Draw:
    """A scene in a precision, its inputs by root; ``draws``: how many the reference's errors are the largest of."""

    scene: Scene
    root: Root
    precision: str
    draws: int

    def bounds(self, seen: Seen, reference: Errors) -> Errors:
        """The bounds on this draw, where those on ordinary ones are passed."""
        every = _SETS * self.draws
        found = self._bounds(seen, reference, min(_FEW, every))
        came = budget.measure(seen.values, seen.oracle)
        hopeless = came.norm > _HOPELESS * found.norm or came.worst > _HOPELESS * found.worst
        return found if hopeless or every <= _FEW else self._bounds(seen, reference, every)

    def _bounds(self, seen: Seen, reference: Errors, sets: int) -> Errors:
        """With n for how many times the norm of rounding alone, on ordinary draws, a right device may have: in each
        element it may have n times the deviation that rounding alone has there, and be off by ``DEVIATIONS`` of it.

        The norm of such errors is that of the deviations where many elements share in it. Where few decide it is theirs
        to draw: it lies beyond by up to ``DEVIATIONS`` times the largest, as one element does. By as much as that is
        more than on ordinary draws the reference counts as erring more.
        """
        usual = seen.bound(reference)
        ordinary = _ordinary(self.scene, self.precision, min(self.draws, _FEW))[seen.name]
        deviation = seen.choose(_deviations(self.scene, self.root, self.precision, sets)[seen.name])
        right = seen.oracle.isfinite()
        size = float(seen.oracle[right].norm())
        if not size or not ordinary:
            return usual
        here = float(deviation[right].norm() + DEVIATIONS * deviation[right].max()) / size
        wider = seen.bound(budget.conditioned(reference, here, ordinary))
        return budget.uneven(wider, seen.values, seen.oracle, DEVIATIONS * usual.norm / ordinary * deviation)


@functools.lru_cache(maxsize=4)
def _deviations(scene: Scene, root: Root, precision: str, sets: int) -> dict[str, Tensor]:
    """The root mean square of every element's error, by output, over that many sets of rounding errors. One may spare
    the very element that is sensitive."""
    right = golden(scene, root, scene.dtype(precision)).outputs
    squares = {name: torch.zeros_like(x) for name, x in right.items()}
    for number in range(sets):
        for name, came in rounded(scene, root, precision, number).items():
            squares[name] += (came.double() - right[name]).square()
    return {name: (square / sets).sqrt() for name, square in squares.items()}


@functools.lru_cache(maxsize=64)
def _ordinary(scene: Scene, precision: str, draws: int) -> dict[str, float]:
    """‖error‖ / ‖oracle‖ of rounding alone, by output, the largest of some ordinary draws: a norm is an average, and
    needs one set of rounding errors of each."""
    norms: dict[str, float] = {}
    for draw in range(draws):
        root = Root(draw, "ordinary draws")
        right = golden(scene, root, scene.dtype(precision)).outputs
        for name, came in rounded(scene, root, precision, 0).items():
            norms[name] = max(norms.get(name, 0.0), budget.measure(came, right[name]).norm)
    return norms
