"""Small charts as inline SVG: no library, no network, no script; colours come from the page's style sheet.

Every position is a per cent of the plot, so a chart is as wide as the page while its text keeps its size on a phone.
Labels stand outside the plot, in room that the style sheet leaves. What a chart shows also stands in a table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from markupsafe import Markup

from helios_conformance.plain import plain

__all__ = ["Axis", "Dot", "Line", "Row", "engineering", "plot", "strips"]

_LONGEST = 60
"""Characters of a label."""

ROW = 20
"""Pixels between the rows of a strip chart."""


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """Numbers to positions between 0 and 1; values beyond the ends are drawn at the ends.

    Args:
        low, high: the ends.
        log: logarithmic; both ends positive.
        name: what the numbers are, with their unit.
        show: a number as a tick's text.
    """

    low: float
    high: float
    name: str = ""
    log: bool = False
    show: Callable[[float], str] = "{:g}".format

    def at(self, value: float) -> float:
        """The position of a value: 0 for the low end, 1 for the high one."""
        if math.isnan(value):
            return 1.0
        if self.log:
            value = math.log10(value) if value > 0 else -math.inf
        part = (value - self._low) / ((self._high - self._low) or 1.0)
        return min(1.0, max(0.0, part))

    @property
    def _low(self) -> float:
        return math.log10(self.low) if self.log else self.low

    @property
    def _high(self) -> float:
        return math.log10(self.high) if self.log else self.high

    def ticks(self, most: int = 5) -> list[float]:
        """At most that many round numbers between the ends."""
        if self.log:
            low, high = math.ceil(self._low - 1e-9), math.floor(self._high + 1e-9)
            every = max(1, math.ceil((high - low) / max(1, most - 1)))
            return [10.0**power for power in range(low, high + 1, every)]
        rough = (self.high - self.low) / most or 1.0
        scale = 10.0 ** math.floor(math.log10(rough))
        step = scale * next(m for m in (1, 2, 5, 10) if m * scale >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclasses.dataclass(frozen=True, slots=True)
class Dot:
    """A mark: its class in the style sheet chooses the colour, ``title`` says on hover what it is."""

    x: float
    y: float
    kind: str = "a"
    title: str = ""
    label: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A line through points; ``label`` stands at its end."""

    points: Sequence[tuple[float, float]]
    kind: str = "a"
    label: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One strip: a name at the left, and (value, class, title) marks along the axis."""

    name: str
    marks: Sequence[tuple[float, str, str]]


def engineering(value: float) -> str:
    """A number with its SI prefix.

    >>> engineering(1.5e12), engineering(2e3), engineering(7)
    ('1.5 T', '2 k', '7')
    """
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


_MARK = Markup('<use href="#m-{}" x="{}%" y="{}" class="m {}"><title>{}</title></use>')
_SVG = Markup('<svg class="chart" role="img" aria-label="{}" width="100%" height="{}">{}</svg>')
_TEXT = Markup('<text x="{}" y="{}" class="{}"{}>{}</text>')
_RULE = Markup('<line x1="{}%" y1="{}" x2="{}%" y2="{}" class="{}"/>')


def _mark(kind: str, x: float, y: Any, title: str) -> Markup:
    return _MARK.format(kind, _percent(x), y, kind, plain(title))


def _text(x: Any, y: Any, kind: str, words: str, more: str = "") -> Markup:
    short = words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…"
    return _TEXT.format(x, y, kind, more, plain(short))


def _svg(title: str, height: int, parts: Sequence[Markup]) -> Markup:
    return _SVG.format(plain(title), height, Markup("").join(parts))


def _percent(part: float) -> str:
    return f"{100 * part:.2f}"


def strips(rows: Sequence[Row], axis: Axis, bound: float, title: str) -> Markup:
    """Rows of marks along one shared axis, with a rule at ``bound``.

    Marks of one kind that would lie on one another are drawn once, so that ten thousand cases stay a small picture.
    """
    height = ROW * len(rows)
    parts: list[Markup] = []
    for tick in axis.ticks():
        at = _percent(axis.at(tick))
        parts += [_RULE.format(at, 0, at, height, "grid")]
        parts += [_text(f"{at}%", height + 16, "tick mid", axis.show(tick))]
    at = _percent(axis.at(bound))
    parts.append(_RULE.format(at, -4, at, height + 2, "bound"))
    for i, row in enumerate(rows):
        middle = ROW * i + ROW // 2
        parts.append(_RULE.format(0, middle, 100, middle, "grid"))
        parts.append(_text(-10, middle + 4, "name end", row.name))
        parts += _marks(row, axis, middle)
    parts.append(_text("50%", height + 34, "axis mid", axis.name))
    return _svg(title, height, parts)


def _marks(row: Row, axis: Axis, middle: int) -> list[Markup]:
    """Worst last, so that it lies on top."""
    seen: dict[tuple[str, float], list[str]] = {}
    for value, kind, title in sorted(row.marks):
        seen.setdefault((kind, round(axis.at(value), 2)), []).append(title)
    drawn = []
    for (kind, at), titles in sorted(seen.items(), key=lambda item: item[0][1]):
        more = f" (and {len(titles) - 1} more)" if len(titles) > 1 else ""
        drawn.append(_mark(kind, at, middle, titles[-1] + more))
    return drawn


def plot(
    x: Axis, y: Axis, title: str, *, dots: Iterable[Dot] = (), lines: Iterable[Line] = (), height: int = 260
) -> Markup:
    """A chart of two axes."""

    def down(value: float) -> str:
        return f"{height * (1 - y.at(value)):.1f}"

    parts: list[Markup] = []
    for tick in x.ticks():
        at = _percent(x.at(tick))
        parts += [
            _RULE.format(at, 0, at, height, "grid"),
            _text(f"{at}%", height + 16, "tick mid", x.show(tick)),
        ]
    for tick in y.ticks():
        parts += [_RULE.format(0, down(tick), 100, down(tick), "grid")]
        parts += [_text(-8, float(down(tick)) + 4, "tick end", y.show(tick))]
    parts.append(_text("50%", height + 34, "axis mid", x.name))
    parts.append(_text(-8, -12, "axis", y.name))
    for line in lines:
        parts += _line(line, x, y, height)
    for dot in dots:
        parts.append(_mark(dot.kind, x.at(dot.x), down(dot.y), dot.title))
        if dot.label:
            left = x.at(dot.x) > 0.7
            shift = Markup(' dx="{}" dy="4"').format(-9 if left else 9)
            at = f"{_percent(x.at(dot.x))}%"
            parts.append(_text(at, down(dot.y), "label end" if left else "label", dot.label, shift))
    return _svg(title, height, parts)


def _line(line: Line, x: Axis, y: Axis, height: int) -> list[Markup]:
    """A polyline knows no per cents: it lives in a square of its own that is stretched over the plot."""
    points = " ".join(f"{100 * x.at(a):.2f},{100 * (1 - y.at(b)):.2f}" for a, b in line.points)
    box = Markup(
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="{}" class="over">'
        '<polyline points="{}" class="line {}"/></svg>'
    )
    drawn = [box.format(height, points, line.kind)]
    if line.label and line.points:
        end = f"{height * (1 - y.at(line.points[-1][1])) - 6:.1f}"
        side = "label end" if x.at(line.points[-1][0]) > 0.5 else "label"
        drawn.append(_text(f"{_percent(x.at(line.points[-1][0]))}%", end, side, line.label))
    return drawn
