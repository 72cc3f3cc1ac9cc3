"""Two bundles side by side: what got worse, what got better, what else is different."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema

from helios.errors import InputError
from helios_conformance import report as made
from helios_conformance.intake import REPORT_BYTES, Refused, read_json, shown

__all__ = ["Change", "Comparison", "compare", "read"]


@dataclasses.dataclass(frozen=True, slots=True)
class Growth:
    """From when on an error that grew counts: once it takes more than ``part`` of its bound, and more than ``times`` as
    much as before."""

    part: float
    times: float


SAME_DRAWS = Growth(0.1, 1.25)
"""Of two runs with one seed and one nonce: their inputs are the same."""

SAME_DRAWS_GAIN = Growth(0.5, 1.25)
"""The gain is signed and near zero: of right kernels that round otherwise one has many times the other's."""

OTHER_DRAWS = Growth(0.8, 3.0)
"""Of two runs that drew other inputs. Where few elements decide (planted outliers), one right backend was seen at 0.12
and at 0.79 of one bound."""

NOISE = 1.5
"""Times that a case may take longer or shorter before it is listed. Times of cases include drawing, hashing and
checking; they are hints. Speed proper is the level realtime's."""

LEAST_SECONDS = 0.05
"""Below this a case's time is noise."""

SPEED = 1.05
"""Times that frames a second or latency must differ before they are listed."""

_STATISTICS = ("norm", "worst", "gain", "misrounded")
_LATENCIES = ("p50", "p99")
_ORDER = {"pass": 0, "unsupported": 1, "not_run": 2, "fail": 3}


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One difference: of what, before, after; ``factor`` where both are numbers."""

    what: str
    before: str
    after: str
    factor: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """What differs from one bundle to the next.

    Attributes:
        regressions: cases that no longer pass, verdicts that fell, errors that grew, speed of realtime that fell.
        improvements: the same, the other way.
        slower, faster: times of cases beyond noise: hints, never regressions.
        environment: machine, software, scope.
        notes: what makes the two hard to compare.
    """

    regressions: tuple[Change, ...]
    improvements: tuple[Change, ...]
    slower: tuple[Change, ...]
    faster: tuple[Change, ...]
    environment: tuple[Change, ...]
    notes: tuple[str, ...]


def read(folder: Path) -> dict[str, Any]:
    """The report of a bundle, of the schema's form. Whether it is true, ``verify`` tells. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", "name two folders that `helios certify` wrote")
    try:
        told = read_json(folder / "report.json", "report.json", REPORT_BYTES)
    except Refused as refused:
        raise InputError(f"{folder}: {refused.where}: {refused.what}", f"helios verify {folder}") from refused
    for error in jsonschema.Draft202012Validator(made.schema()).iter_errors(told):
        why = f"{folder}: report.json {error.json_path[:200]} is not as the schema says: {shown(error.message)}"
        raise InputError(why, f"helios verify {folder}")
    loaded: dict[str, Any] = told
    return loaded


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """Compare two reports, of any suites and backends; cases are matched by id."""
    worse: list[Change] = []
    better: list[Change] = []
    for good, change in [*_verdicts(before, after), *_cases(before, after), *_speed(before, after)]:
        (better if good else worse).append(change)
    times = sorted(_times(before, after), key=lambda change: change.factor or 1.0)
    return Comparison(
        tuple(worse),
        tuple(better),
        tuple(change for change in reversed(times) if (change.factor or 1.0) > 1.0),
        tuple(change for change in times if (change.factor or 1.0) < 1.0),
        tuple(_environment(before, after)),
        tuple(_notes(before, after)),
    )


_Judged = tuple[bool, Change]
"""Whether it is an improvement, and what it is."""

_WORDS = ("not certified", "imported", "passed", "certified")


def _verdicts(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[_Judged]:
    a, b = (side["verdict"]["word"] for side in (before, after))
    if a != b and _scope(before) == _scope(after):
        yield _WORDS.index(b) > _WORDS.index(a), Change("verdict", a, b)


def _scope(report: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where it differs, another verdict is no regression."""
    told = report["suite"]
    return told["name"], tuple(told["levels"]), tuple(told["filters"]), report["scope"]["precision"]


def _cases(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[_Judged]:
    known = {case["id"]: case for case in before["cases"]}
    same_draws = _draws(before) == _draws(after)
    for case in after["cases"]:
        old = known.get(case["id"])
        if old is None:
            continue
        if old["state"] != case["state"]:
            better = _ORDER[case["state"]] < _ORDER[old["state"]]
            yield better, Change(case["id"], old["state"], _with_reason(case))
        elif case["state"] == "pass":
            yield from _errors(case["id"], old["outputs"], case["outputs"], same_draws=same_draws)


def _with_reason(case: Mapping[str, Any]) -> str:
    return f"{case['state']}: {shown(case['reason'])}" if case["reason"] else str(case["state"])


def _draws(report: Mapping[str, Any]) -> tuple[Any, Any]:
    return report["suite"]["seed"], report["suite"]["nonce"]


def _errors(case: str, before: Mapping[str, Any], after: Mapping[str, Any], *, same_draws: bool) -> Iterator[_Judged]:
    """Errors that grew or shrank by more than other inputs, where there are such, explain."""
    for name in sorted(set(before) & set(after)):
        old, new = before[name].get("errors"), after[name].get("errors")
        if not old or not new:
            continue
        for statistic in _STATISTICS:
            if statistic == "worst" and after[name]["dtype"] == "uint8":
                continue  # of a picture's levels one that is off takes all of it: ``misrounded`` counts them
            a, b = _part(before[name], statistic), _part(after[name], statistic)
            rule = OTHER_DRAWS if not same_draws else SAME_DRAWS_GAIN if statistic == "gain" else SAME_DRAWS
            if max(a, b) > rule.part and max(a, b) > rule.times * min(a, b):
                factor = b / a if a and math.isfinite(a) and math.isfinite(b) else None
                yield b < a, Change(f"{case} {name} {statistic}", _of_bound(a), _of_bound(b), factor)


def _part(output: Mapping[str, Any], statistic: str) -> float:
    """An error as a part of its bound; the bound follows the draw, too. 0 where nothing bounds it."""
    error, bound = (abs(_number(output[key][statistic])) for key in ("errors", "bounds"))
    if math.isinf(error):
        return math.inf
    return error / bound if bound else math.inf if error else 0.0


def _of_bound(part: float) -> str:
    return f"{part:.3g} of its bound" if math.isfinite(part) else "inf"


def _number(value: Any) -> float:
    return math.inf if isinstance(value, str) else float(value)


def _speed(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[_Judged]:
    """Frames a second and latencies of runs in the same setting."""
    old = {run.get("case"): run for run in _runs(before)}
    for run in _runs(after):
        earlier = old.get(run.get("case"))
        if earlier is None:
            continue
        for group, keys, more_is_better in (("fps", None, True), ("latency", _LATENCIES, False)):
            a, b = _figures(earlier, group), _figures(run, group)
            for key in keys or sorted(set(a) & set(b)):
                if key in a and key in b and not 1 / SPEED <= b[key] / a[key] <= SPEED:
                    change = Change(
                        f"{run.get('case')} {group} {key}", f"{a[key]:.4g}", f"{b[key]:.4g}", b[key] / a[key]
                    )
                    yield (b[key] > a[key]) == more_is_better, change


def _runs(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    section = report["realtime"] or {}
    runs = section.get("runs", [section] if section else [])
    return [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []


def _figures(run: Mapping[str, Any], group: str) -> dict[str, float]:
    told = run.get(group)
    found = told.items() if isinstance(told, dict) else ()
    return {k: float(v) for k, v in found if isinstance(v, int | float) and not isinstance(v, bool) and v > 0}


def _times(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    known = {case["id"]: case for case in before["cases"]}
    for case in after["cases"]:
        old = known.get(case["id"])
        if old is None or old["state"] != "pass" or case["state"] != "pass":
            continue
        a, b = old["seconds"], case["seconds"]
        if min(a, b) > 0 and max(a, b) > LEAST_SECONDS and not 1 / NOISE <= b / a <= NOISE:
            yield Change(case["id"], f"{a:.3g} s", f"{b:.3g} s", b / a)


def _environment(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    parts = ("suite", "scope", "backend", "weights", "environment")
    a, b = (dict(row for part in parts for row in _flat(side[part], part)) for side in (before, after))
    for key in [*a, *(key for key in b if key not in a)]:
        if a.get(key) != b.get(key):
            yield Change(key, shown(str(a.get(key, "absent"))), shown(str(b.get(key, "absent"))))


def _flat(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{name}.{key}")
    else:
        yield name, tree


def _notes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    if before["suite"]["hash"] != after["suite"]["hash"]:
        yield "two suites made them: cases of one id may differ, and so may budgets"
    if _draws(before) != _draws(after):
        rule = f"beyond {OTHER_DRAWS.part:g} of its bound and {OTHER_DRAWS.times:g} times the part that it took before"
        yield f"they drew other inputs, and errors differ for that alone: an error counts {rule}"
    if before["scope"]["precision"] != after["scope"]["precision"]:
        yield "they are of two precisions, so no case of one is a case of the other"
    ids = [{case["id"] for case in side["cases"]} for side in (before, after)]
    for words, only in (("only the first has", ids[0] - ids[1]), ("only the second has", ids[1] - ids[0])):
        if only:
            yield f"{words} {len(only)} cases, such as {min(only)}"
    yield f"times of cases are listed beyond {NOISE}×: they include drawing and checking, and other work on the machine"
