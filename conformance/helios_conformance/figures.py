"""The report's figures: from its JSON to charts and the rows of the tables beside them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from helios_conformance.charts import Axis, Dot, Line, Row, engineering, plot, strips

__all__ = [
    "STATISTICS",
    "Share",
    "budget_chart",
    "divergence_charts",
    "exact",
    "latency_chart",
    "number",
    "roofline",
    "shares",
]

STATISTICS: Mapping[str, str] = {
    "norm": "norm of the error",
    "worst": "worst element",
    "gain": "gain",
    "misrounded": "elements rounded wrongly",
}
"""The four statistics of the error budget, in words."""

_MOST_ROWS = 60


def number(value: Any) -> float | None:
    """A JSON value as a number; the string ``inf`` is one too. None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and value not in ("inf", "-inf"):
        return None
    return None if math.isnan(float(value)) else float(value)


def numbers(values: Any) -> list[float]:
    """The finite numbers of a JSON list."""
    found = [number(v) for v in values] if isinstance(values, list | tuple) else []
    return [v for v in found if v is not None and math.isfinite(v)]


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Share:
    """One statistic of one output of a case as a fraction of its bound."""

    fraction: float
    case: str
    output: str
    statistic: str
    came: float
    bound: float


def shares(cases: Iterable[Mapping[str, Any]]) -> list[Share]:
    """Every statistic that has a bound, the largest fraction first."""
    found = []
    for case in cases:
        for output, told in case.get("outputs", {}).items():
            errors, bounds = told.get("errors") or {}, told.get("bounds") or {}
            for statistic in STATISTICS:
                came, bound = number(errors.get(statistic)), number(bounds.get(statistic))
                # Infinity bounds nothing, nor does 1 a part of all elements.
                if came is None or bound is None or bound >= (1.0 if statistic == "misrounded" else math.inf):
                    continue
                fraction = abs(came) / bound if bound else (0.0 if came == 0 else math.inf)
                found.append(Share(fraction, str(case.get("id")), str(output), statistic, came, bound))
    return sorted(found, reverse=True)


def budget_chart(found: Sequence[Share]) -> Markup | None:
    """One strip an op: how much of its bound each statistic of each case uses. ``found`` as ``shares`` gives it; ops
    that ``exact`` names are left out."""
    if not found:
        return None
    by_name: dict[str, list[tuple[float, str, str]]] = {}
    for share in found:
        title = f"{share.case} {share.output}: {STATISTICS[share.statistic]}, {share.fraction:.3g} of its bound"
        by_name.setdefault(share.case.partition("[")[0], []).append((share.fraction, share.statistic, title))
    left_out = exact(found)
    rows = [Row(name, marks) for name, marks in by_name.items() if name not in left_out][:_MOST_ROWS]
    axis = Axis(1e-3, 10.0, "fraction of the bound; right of the line fails", log=True, show=_fraction)
    return strips(rows, axis, 1.0, f"Error against budget: {len(rows)} rows, each mark one statistic of one case")


def exact(found: Sequence[Share]) -> list[str]:
    """Names of which no case errs at all, sorted."""
    return sorted({s.case.partition("[")[0] for s in found} - {s.case.partition("[")[0] for s in found if s.fraction})


def _fraction(value: float) -> str:
    return {0.001: "≤0.001", 10.0: "≥10"}.get(round(value, 6), f"{value:g}")


def latency_chart(latency: Mapping[str, Any]) -> Markup | None:
    """Seconds of each chunk, with the median and the 99th percentile."""
    seconds = numbers(latency.get("chunks"))
    if not seconds:
        return None
    x = Axis(0, max(1, len(seconds) - 1), "chunk")
    y = Axis(0, 1.15 * max(seconds) or 1.0, "seconds")
    dots = [Dot(i, s, "a", f"chunk {i}: {s:.4g} s") for i, s in enumerate(seconds)]
    lines = [Line(list(enumerate(seconds)), "a")]
    for name in ("p50", "p99"):
        level = number(latency.get(name))
        if level is not None and math.isfinite(level):
            # Labels at opposite ends: the two may be near one another.
            ends = [(0.0, level), (float(len(seconds)), level)]
            lines.append(Line(ends[:: 1 if name == "p99" else -1], "rule", f"{name} {level:.4g} s"))
    return plot(x, y, f"Seconds of each of {len(seconds)} chunks", dots=dots, lines=lines)


def divergence_charts(section: Mapping[str, Any]) -> list[Markup]:
    """One chart for every series of the section that has a value a chunk."""
    chunks = numbers(section.get("chunks"))
    drawn = []
    for name, values in section.items():
        series = numbers(values)
        if name == "chunks" or len(series) < 2 or not isinstance(values, list):
            continue
        at = chunks if len(chunks) == len(series) else [float(i) for i in range(len(series))]
        words = {"psnr": "PSNR against the reference, dB", "relative": "relative error of the latents"}.get(name, name)
        low, high = min(series), max(series)
        log = low > 0 and high / low > 100
        room = 0.08 * ((high - low) or abs(high) or 1.0)
        y = Axis(low / 2, high * 2, words, log=True) if log else Axis(low - room, high + room, words)
        dots = [Dot(a, b, "a", f"chunk {a:g}: {b:.4g}") for a, b in zip(at, series, strict=True)]
        x = Axis(min(at), max(at), "chunk")
        lines = [Line(list(zip(at, series, strict=True)), "a")]
        drawn.append(plot(x, y, f"{words}, over {len(series)} chunks", dots=dots, lines=lines, height=200))
    return drawn


_SCALES = {"T": 1e12, "G": 1e9, "M": 1e6, "P": 1e15}


def _rate(told: Mapping[str, Any]) -> tuple[str, float] | None:
    """A ceiling as (``flops`` or ``bytes``, per second)."""
    rate, unit = number(told.get("rate")), str(told.get("unit", ""))
    if rate is None or not math.isfinite(rate) or rate <= 0 or not unit:
        return None
    kind = "flops" if "FLOP" in unit.upper() else "bytes"
    return kind, rate * _SCALES.get(unit[0], 1.0)


def roofline(section: Mapping[str, Any]) -> Markup | None:
    """Arithmetic rate over intensity of each op, under the measured ceilings."""
    points = []
    for row in section.get("roofline") or []:
        flops, moved, seconds = (number(row.get(key)) for key in ("flops", "bytes", "seconds"))
        # The row of all ops together has no place among them.
        if row.get("op") != "all" and flops and moved and seconds and min(flops, moved, seconds) > 0:
            points.append((flops / moved, flops / seconds, row))
    if not points:
        return None
    roofs = _highest(section.get("ceilings") or [])
    rates = [rate for _, rate, _ in points] + [rate for kind, rate, _ in roofs if kind == "flops"]
    x = Axis(*_decades([i for i, _, _ in points]), "FLOP for each byte moved", log=True, show=engineering)
    y = Axis(*_decades(rates), "FLOP/s", log=True, show=engineering)
    dots = [
        Dot(
            i,
            rate,
            "a",
            f"{row.get('op')}: {engineering(rate)}FLOP/s, {row.get('share')} of its ceiling",
            str(row.get("op"))[:24],
        )
        for i, rate, row in points
    ]
    return plot(x, y, "Roofline: rate over intensity of each op", dots=dots, lines=_roofs(roofs, x, y), height=320)


def _highest(ceilings: Iterable[Mapping[str, Any]]) -> list[tuple[str, float, str]]:
    """(kind, rate, what): of each thing that was measured the highest rate, the highest few of them all."""
    found: dict[tuple[str, str], float] = {}
    for told in ceilings:
        if (rate := _rate(told)) is not None:
            key = (rate[0], str(told.get("what", "")))
            found[key] = max(rate[1], found.get(key, 0.0))
    ranked = sorted(((kind, rate, what) for (kind, what), rate in found.items()), key=lambda row: -row[1])
    return [row for kind in ("flops", "bytes") for row in [r for r in ranked if r[0] == kind][:3]]


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Whole powers of ten around the values, at least two of them."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return 10.0**low, 10.0 ** max(high, low + 2)


def _roofs(roofs: Sequence[tuple[str, float, str]], x: Axis, y: Axis) -> list[Line]:
    """Level lines for arithmetic; sloping ones for memory, cut where they leave the plot."""
    lines = []
    for i, (kind, rate, what) in enumerate(roofs):
        if kind == "flops":  # labels at either end in turn: ceilings may be near one another
            lines.append(Line([(x.low, rate), (x.high, rate)][:: -1 if i % 2 else 1], "roof", what[:32]))
            continue
        left, right = max(x.low, y.low / rate), min(x.high, y.high / rate)
        if left < right:
            lines.append(Line([(left, left * rate), (right, right * rate)], "roof", what[:32]))
    return lines
