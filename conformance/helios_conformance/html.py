"""``report.html``: the report as one file that opens offline, in light and dark, on a phone and on paper.

Everything that a backend, a device or an error message said is hostile until shown: the templates escape every value,
what could turn the direction of text or hide in it is written out, and a content policy forbids the page to load
anything or to run any script but its own. The same report gives the same bytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from helios.media.storage import atomic
from helios_conformance import figures
from helios_conformance.case import LEVELS
from helios_conformance.charts import engineering
from helios_conformance.figures import STATISTICS, number
from helios_conformance.plain import plain

__all__ = ["render", "reproduce", "write"]

GLYPHS = {"pass": "✓", "fail": "✕", "unsupported": "–", "not_run": "○"}
"""States are told by sign and word, never by colour alone."""

WORDS = {"pass": "passed", "fail": "failed", "unsupported": "unsupported", "not_run": "not run"}

TONES = {"certified": "good", "passed": "fair", "imported": "fair", "not certified": "bad"}

ASPECTS = {
    "op_values": "values",
    "op_specials": "NaN, infinity",
    "op_large": "past 2³¹ elements",
    "op_refuses": "refusals",
    "op_misfed": "wrong operands",
    "op_repeats": "repeats",
    "op_programs": "two programs",
    "op_step_weights": "weights at each step",
    "plan_nodes": "nodes of the 14B plan",
}
"""Columns of the matrix, by check."""


def write(report: Mapping[str, Any], path: Path) -> None:
    """Write the report as HTML; the file appears whole. Raises StorageError."""
    with atomic(path) as part:
        part.write_text(render(report), encoding="utf-8")


def render(report: Mapping[str, Any]) -> str:
    """The report as HTML. Sections that it lacks are left out; see the JSON schema for what it may hold."""
    return _environment().get_template("report.html.j2").render(_view(report))


@functools.cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("helios_conformance", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=plain,
    )
    made.filters["figure"] = _figure
    made.filters["si"] = lambda value: value if number(value) is None else engineering(number(value) or 0.0)
    made.filters["percent"] = lambda value: "" if number(value) is None else f"{100 * (number(value) or 0.0):.1f}%"
    return made


def _figure(value: Any, digits: int = 4) -> str:
    """A number as text; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{value:.{digits}g}"


def _asset(name: str) -> str:
    return resources.files("helios_conformance").joinpath("templates", name).read_text(encoding="utf-8")


def _view(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows, section by section."""
    cases: list[dict[str, Any]] = list(report.get("cases") or [])
    verdict = dict(report.get("verdict") or {})
    found = figures.shares(cases)
    script = _asset("report.js")
    return {
        "not_proved": list(report.get("not_proved") or []),
        "reasons": list(verdict.get("reasons") or []),
        "again": list(report.get("reproduce") or []),
        "style": Markup(_asset("report.css")),  # ours
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "verdict": verdict,
        "word": _word(verdict.get("word")),
        "tone": TONES.get(str(verdict.get("word")), "bad"),
        "backend": dict(report.get("backend") or {}),
        "loud": _loud(report),
        "levels": _levels(verdict.get("levels") or {}),
        "matrices": [
            _matrix(level, rows) for level in LEVELS if (rows := [c for c in cases if c.get("level") == level])
        ],
        "budget": figures.budget_chart(found),
        "exact": figures.exact(found),
        "worst": [share for share in found[:12] if share.fraction],
        "statistics": STATISTICS,
        "realtime": _realtime(report.get("realtime")),
        "divergence_charts": figures.divergence_charts(report.get("divergence") or {}),
        "coverage": [[*row, "", "", "", "", ""][:5] for row in report.get("coverage") or []],
        "environment": flat(report.get("environment") or {}),
        "facts": _facts(report),
        "failures": _failures(report, cases),
        "cases": [_line(case) for case in cases],
        "glyphs": GLYPHS,
        "words": WORDS,
    }


def _word(word: Any) -> str:
    """The verdict in large letters; what is no certification says so there, too."""
    short = str(word or "no verdict")
    return f"{short}, not a certification" if short in ("passed", "imported") else short


def _loud(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader must not overlook, as (words, sentence)."""
    suite, backend = report.get("suite") or {}, report.get("backend") or {}
    told: list[tuple[str, str]] = []
    if backend.get("emulated"):
        told.append(("Emulated", f"The device was not there. In its place computed: {backend['emulated']}"))
    if report.get("tier") == "imported" or (report.get("setup") or {}).get("imported") or report.get("imported"):
        told.append(("Imported", "The results came as files: nothing here shows which device made them, or when."))
    if suite.get("filters"):
        told.append(("Filtered", f"Only cases that match {_some(suite['filters'])} ran."))
    elif suite.get("name") == "quick":
        told.append(("Quick", "The quick suite ran: a sample of the cases, too few for a certificate."))
    if fallbacks := sum(int(number(row[3]) or 0) for row in report.get("coverage") or [] if len(row) > 3):
        told.append(("Fallback", f"{fallbacks:,} nodes ran by the reference in the backend's place."))
    if (report.get("scope") or {}).get("kind") == "engine":
        told.append(("Engine", "Graphs run whole on this backend: its single ops are shown, and judge nothing."))
    if report.get("tier") == "self-tested":
        told.append(("Self-tested", "The party that ran the suite chose its random numbers; nobody watched."))
    return told


def _some(names: Sequence[Any]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - 6:,} more" if len(names) > 6 else ""
    return ", ".join(map(str, names[:6])) + more


def _levels(levels: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    empty = dict.fromkeys(("passed", "failed", "unsupported", "not_run", "required"), 0) | {
        "state": "not_run",
        "reason": "",
    }
    known = [level for level in LEVELS if level in levels]
    return [{"name": level} | empty | dict(levels[level]) for level in [*known, *sorted(set(levels) - set(known))]]


def _matrix(level: str, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Names × (aspect, precision): the cases of each, counted, with the reasons of those that did not pass. Above the
    level ops a name has one aspect."""

    def column(case: Mapping[str, Any]) -> tuple[str, str]:
        return str(case.get("check")) if level == "ops" else "cases", str(case.get("precision"))

    columns = list(dict.fromkeys(map(column, cases)))
    cells: dict[str, dict[tuple[str, str], list[Mapping[str, Any]]]] = {}
    for case in cases:
        row = cells.setdefault(str(case.get("id")).partition("[")[0], {})
        row.setdefault(column(case), []).append(case)
    return {
        "level": level,
        "columns": [(ASPECTS.get(check, check.replace("_", " ")), precision) for check, precision in columns],
        "rows": [(name, [_cell(row.get(key, ())) for key in columns]) for name, row in sorted(cells.items())],
    }


def _cell(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not cases:
        return None
    states = [str(c.get("state")) for c in cases]
    worst = next((s for s in ("fail", "not_run", "unsupported") if s in states), "pass")
    wrong = [c for c in cases if c.get("state") != "pass"]
    reasons = [f"{c.get('id')}: {cut(c.get('reason') or c.get('unsupported') or '', 240)}" for c in wrong[:4]]
    if len(wrong) > 4:
        reasons.append(f"and {len(wrong) - 4} more")
    return {"state": worst, "passed": states.count("pass"), "count": len(cases), "reasons": reasons}


def cut(text: Any, most: int) -> str:
    """At most that many characters of a text."""
    whole = str(text)
    return whole if len(whole) <= most else whole[:most] + " …"


def _line(case: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the list of all cases."""
    found = figures.shares([case])
    used = f"{found[0].fraction:.3g}" if found else ""
    seconds = number(case.get("seconds"))
    state = str(case.get("state"))
    return {
        "id": case.get("id"),
        "state": state if state in GLYPHS else "fail",
        "required": bool(case.get("required")),
        "used": used,
        "seconds": "" if seconds is None else f"{seconds:.3f}",
    }


def _failures(report: Mapping[str, Any], cases: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Required cases that did not pass, and every other failure, each with the command that runs it again."""
    found = []
    for case in cases:
        if case.get("state") == "fail" or (case.get("required") and case.get("state") != "pass"):
            trace = (case.get("facts") or {}).get("traceback", "")
            reason = case.get("reason") or case.get("unsupported") or "no reason was given"
            found.append(dict(case) | {"reason": reason, "traceback": trace, "command": reproduce(report, case)})
    return found


def reproduce(report: Mapping[str, Any], case: Mapping[str, Any]) -> str:
    """The command that runs one case of a report again with the same numbers, quoted for a POSIX shell."""
    backend, suite = report.get("backend") or {}, report.get("suite") or {}
    if (report.get("setup") or {}).get("imported"):  # there is no device to run it on: its inputs, then
        words = ["helios", "cases", "export", "DIR", "--level", "all"]
    else:
        words = ["helios", "certify", "--backend", str(backend.get("label") or backend.get("name") or "NAME")]
        words += ["--level", "all"] if case.get("level") == "realtime" else []
    words += ["--precision", str(case.get("precision")), "--filter", str(case.get("id"))]
    words += ["--seed", str(suite.get("seed", 0))]
    if suite.get("nonce"):
        words += ["--nonce", str(suite["nonce"])]
    return shlex.join(plain(word).replace("\n", " ") for word in words)


def flat(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    """Nested JSON as (dotted name, value), in order."""
    if isinstance(tree, Mapping):
        return [row for key, value in tree.items() for row in flat(value, f"{name}.{key}" if name else str(key))]
    if isinstance(tree, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in tree):
        return [row for i, value in enumerate(tree) for row in flat(value, f"{name}.{i}")]
    return [(name, ", ".join(map(str, tree)) if isinstance(tree, list | tuple) else tree)]


def _facts(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What was run, by whom and when."""
    keys = ("backend", "suite", "scope", "tier", "weights", "started", "finished", "peak_rss", "workers")
    return [row for key in keys if key in report for row in flat(report[key], key)]


def _realtime(section: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Every timed run, and what all of them share."""
    if not section:
        return None
    shared = {key: section[key] for key in ("datasheet", "varied", "soak") if section.get(key)}
    ceilings = section.get("ceilings") or []
    return {
        "runs": [_timed(run, ceilings) for run in section.get("runs") or [section]],
        "ceilings": ceilings,
        "rest": flat(shared),
    }


_SETTING = ("size", "variant", "steps", "amplify", "height", "width", "precision", "vae", "chunks", "seconds", "warmup")
"""What a figure of speed never stands without."""


def _timed(run: Mapping[str, Any], ceilings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    latency = run.get("latency") or {}
    shown = ("roofline", "ceilings", "latency", "split", "runs", "fps", "datasheet", "varied", "soak")
    return {
        "case": run.get("case", ""),
        "class": run.get("class", ""),
        "state": run.get("state", "pass"),
        "full_length": bool(run.get("full_length")),
        "setting": [row for key in _SETTING if key in run for row in flat(run[key], key)],
        "published": run.get("published"),
        "fps": flat(run.get("fps") or {}),
        "latency": [(key, latency[key]) for key in ("p50", "p99", "first") if key in latency],
        "split": flat(run.get("split") or {}),
        "latency_chart": figures.latency_chart(latency),
        "roofline_chart": figures.roofline({"roofline": run.get("roofline"), "ceilings": ceilings}),
        "roofline": run.get("roofline") or [],
        "rest": flat({key: value for key, value in run.items() if key not in shown}),
    }
