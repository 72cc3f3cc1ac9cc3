"""From cases to a verdict: one function, used by the run and by whoever verifies it, so that the two cannot disagree.

*Certified* is said of a complete, closed scope alone: the full suite without filters, every level up to the highest
asked for, every required case passed, on a real device, without a fallback. What passed and is less than that *passed,
not a certification*. A level is never green because of what did not run.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from helios_conformance import realtime, suite
from helios_conformance.case import LEVELS, Case, Level, is_diagnostic

if TYPE_CHECKING:
    from helios_conformance.run import RunResult

__all__ = ["TIERS", "chosen", "conclude", "exit_code", "judge_run", "needed_levels", "not_proved", "recorded_fallbacks"]

TIERS = ("self-tested", "witnessed", "reproduced")
"""A bundle says *self-tested* of itself, always. The other two are conclusions of who verifies it."""

_NAMED = 5
"""Ids that a sentence lists."""


def conclude(report: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict on a report, from everything in it but its verdict.

    Args:
        report: with ``suite``, ``scope``, ``backend``, ``setup``, ``coverage``, ``problem`` and ``cases`` at least.

    Returns:
        ``word`` (certified, passed, imported, not certified), ``sentence`` (scope first), ``closed`` (the scope is one
        that can be certified), ``levels`` and ``reasons`` (why it is no more than it is).
    """
    levels = {level: _level(report, level) for level in LEVELS}
    needed = needed_levels(report)
    wrong = _failings(report, levels, needed)
    short = _shortcomings(report, levels, needed)
    word = "not certified" if wrong else "passed" if short else "certified"
    if word == "passed" and report["setup"]["imported"]:
        word = "imported"
    reasons = list(dict.fromkeys([*wrong, *short]))
    closed = _complete(report, needed) and all(levels[level]["state"] != "not_run" for level in needed)
    return {
        "word": word,
        "sentence": _sentence(report, word, reasons, [n for n in needed if levels[n]["state"] == "pass"]),
        "closed": closed,
        "levels": levels,
        "reasons": reasons,
    }


def judge_run(result: RunResult) -> dict[str, Any]:
    """The verdict on a run; the same as its bundle's."""
    from helios_conformance import report  # which needs this module to complete itself

    told: dict[str, Any] = report.assemble(result)["verdict"]
    return told


def exit_code(verdict: Mapping[str, Any]) -> int:
    """0 for what passed, certified or not; 1 otherwise."""
    return int(verdict["word"] == "not certified")


def needed_levels(report: Mapping[str, Any]) -> tuple[Level, ...]:
    """The levels asked for whose cases decide: all, except that an engine's single ops are diagnostic."""
    asked: tuple[Level, ...] = tuple(report["suite"]["levels"])
    return tuple(level for level in asked if not _diagnostic(report, level))


def _diagnostic(report: Mapping[str, Any], level: Level) -> bool:
    return is_diagnostic(report["scope"]["kind"], level)


def chosen(report: Mapping[str, Any]) -> list[Case]:
    """The cases that a run of this scope takes."""
    told = report["suite"]
    return suite.choose(report["scope"]["precision"], told["name"], told["levels"], told["filters"])


def recorded_fallbacks(report: Mapping[str, Any]) -> int:
    """Nodes that ran by the reference in the backend's place, in all cases."""
    return sum(int(row[3]) for row in report["coverage"])


def _level(report: Mapping[str, Any], level: Level) -> dict[str, Any]:
    """State and counts of one level."""
    cases = [case for case in report["cases"] if case["level"] == level]
    states = collections.Counter(case["state"] for case in cases)
    required = sum(case.required for case in suite.all_cases(report["scope"]["precision"]) if case.level == level)
    state, reason = _state(report, level, cases)
    return {
        "state": state,
        "passed": states["pass"],
        "failed": states["fail"],
        "unsupported": states["unsupported"],
        "not_run": states["not_run"],
        "required": 0 if _diagnostic(report, level) else required,
        "diagnostic": _diagnostic(report, level),
        "reason": reason,
    }


def _state(report: Mapping[str, Any], level: Level, cases: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The state of a level with its reason.

    A case that is not required may be unsupported or not run, but what ran and was wrong is wrong. Where nothing is
    required, every case counts.
    """
    if level not in report["suite"]["levels"]:
        return "not_run", "not asked for"
    if not cases:
        return "not_run", "no case of this level was taken" if chosen(report) else "no case was taken"
    counted = [case for case in cases if case["required"] and not _diagnostic(report, level)] or list(cases)
    note = "; diagnostic for an engine" if _diagnostic(report, level) else ""
    for state, words, found in (
        ("fail", "failed", [c["id"] for c in cases if c["state"] == "fail"]),
        ("fail", "unsupported", [c["id"] for c in counted if c["state"] == "unsupported"]),
        ("not_run", "not run", [c["id"] for c in counted if c["state"] == "not_run"]),
    ):
        if found:
            return state, f"{len(found)} of {len(cases)} {words}: {_some(found)}{note}"
    return "pass", note.removeprefix("; ")


def _failings(report: Mapping[str, Any], levels: Mapping[Level, Any], needed: Sequence[Level]) -> list[str]:
    """Why nothing passed."""
    reasons = [report["problem"]] if report["problem"] else []
    states = collections.Counter(case["state"] for case in report["cases"])
    if not states["pass"] + states["fail"]:
        reasons.append("no case ran")
    elif not states["pass"]:
        reasons.append("no case passed")
    taken = {case["level"] for case in report["cases"]}
    reasons += [
        f"level {level}: {levels[level]['reason']}"
        for level in needed
        if level in taken and levels[level]["state"] != "pass"
    ]
    if not reasons and not any(levels[level]["state"] == "pass" for level in needed or report["suite"]["levels"]):
        reasons.append("no level passed")
    return reasons


def _shortcomings(report: Mapping[str, Any], levels: Mapping[Level, Any], needed: Sequence[Level]) -> list[str]:
    """Why what passed is no certification."""
    told, reasons = report["suite"], []
    if told["name"] != "full" and not told["filters"]:
        reasons.append("the quick suite takes a part of the cases")
    if told["filters"]:  # of the whole suite, whichever was asked for
        reasons.append(f"filters take a part of the cases: {_some(told['filters'])}")
    if tuple(told["levels"]) != LEVELS[: len(told["levels"])]:
        reasons.append("a level was left out that the highest one needs")
    elif not needed:
        reasons.append("single ops are diagnostic for an engine: level blocks is its entry")
    if told["name"] == "full" and not told["filters"]:
        reasons += [f"level {n}: {levels[n]['reason']}" for n in needed if levels[n]["state"] == "not_run"]
    if report["backend"]["emulated"]:
        reasons.append(f"the device is emulated: {report['backend']['emulated']}")
    if fallbacks := recorded_fallbacks(report):
        reasons.append(f"{fallbacks} nodes ran by the reference in the backend's place")
    if report["setup"]["imported"]:
        reasons.append("the results were imported as files: which device made them, and when, is not shown")
    if "realtime" in told["levels"]:
        reasons += realtime.shortcomings(report["realtime"])
    return reasons


def _complete(report: Mapping[str, Any], needed: Sequence[Level]) -> bool:
    told = report["suite"]
    whole = told["name"] == "full" and not told["filters"] and tuple(told["levels"]) == LEVELS[: len(told["levels"])]
    return whole and bool(needed) and not report["setup"]["imported"]


_KINDS = {"kernels": "as single kernels", "engine": "as an engine whose single ops are diagnostic"}


def _sentence(report: Mapping[str, Any], word: str, reasons: Sequence[str], passed: Sequence[Level]) -> str:
    """One sentence, scope first: of what passed the levels that count and passed, else those that were asked for."""
    told, scope, backend = report["suite"], report["scope"], report["backend"]
    asked = "asked for " if word == "not certified" else ""
    parts = [f"In {scope['precision']}", _KINDS[scope["kind"]]]
    taken = f"only cases that match {_some(told['filters'])}" if told["filters"] else f"{told['name']} suite"
    parts += [asked + _levels(told["levels"] if asked else passed), taken]
    parts.append("variants " + _and(scope["variants"]))
    device = backend["device"]["name"] if backend["device"] else "no device"
    who = f"backend {backend['label']} on {device}"
    if backend["emulated"]:
        who += f" (emulated: {backend['emulated']})"
    what = {
        "certified": "is certified, self-tested",
        "passed": "passed, which is not a certification",
        "imported": "passed by imported results, which is not a certification",
        "not certified": "is not certified",
    }[word]
    end = f": {reasons[0]}" if reasons else ""
    more = f" (and {len(reasons) - 1} more reason{'s' * (len(reasons) > 2)})" if len(reasons) > 1 else ""
    return f"{', '.join(parts)}: {who} {what}{end}{more}."


def _levels(names: Sequence[str]) -> str:
    return f"level{'s' * (len(names) > 1)} {_and(names)}" if names else "no level that counts"


def _and(names: Iterable[str]) -> str:
    *rest, last = [*names] or ["none"]
    return f"{', '.join(rest)} and {last}" if rest else last


def _some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


ATTESTED_SENTENCE = (
    "What the outputs cannot show is attested by the machine that ran: which device it was, that memory and inputs "
    "were left alone, that repeats agreed, how long anything took."
)


def not_proved(report: Mapping[str, Any]) -> list[str]:
    """What a reader must not conclude from the report, one sentence each."""
    scope, told = report["scope"], report["suite"]
    sentences = [
        ATTESTED_SENTENCE,
        "Who wrote this report is shown by a signature alone: `helios verify --signer` checks one.",
        f"It holds for this version of the backend on this device and driver in {scope['precision']}, and no other.",
    ]
    missing = [level for level in LEVELS if level not in told["levels"]]
    if missing:
        sentences.append(f"Nothing is said about {_levels(missing)}.")
    if told["name"] == "quick" or told["filters"]:
        sentences.append("Cases were left out, so a fault that only they would show is not excluded.")
    sentences += _of_weights(report["weights"], told["levels"])
    if "pipeline" in told["levels"]:
        sentences.append("The divergence of a free run from the reference over its chunks is drawn, not judged.")
    if report["realtime"] is not None:
        sentences.append("Frames per second are measured by the tester's machine: attested, not proved.")
        sentences.append(realtime.judged_network(report["realtime"]))
    else:
        sentences.append("No speed was measured.")
    if "realtime" in told["levels"] and report["backend"]["emulated"]:
        sentences.append("Nothing emulated has a speed.")
    sentences += realtime.remarks(report["realtime"])
    resumed = report["setup"].get("options", {}).get("resumed")
    if isinstance(resumed, int) and resumed:
        times = "once" if resumed == 1 else f"{resumed} times"
        sentences.append(f"The run was interrupted and went on {times}, in the same environment as far as it is named.")
    if any(tree and tree["dirty"] for tree in report["environment"]["git"].values()):
        sentences.append("The source tree had changes that its commit does not name.")
    return sentences


def _of_weights(weights: Mapping[str, Any], levels: Sequence[Level]) -> Iterable[str]:
    """No level judges how a checkpoint's videos look: where one was read, its videos were timed."""
    looks = "how good videos of a published checkpoint look was not judged"
    if weights["origin"] == "random":
        yield f"Weights are random: {looks}."
        return
    drawn = [level for level in levels if level != "realtime"]
    if drawn:
        yield f"Weights were random at {_levels(drawn)}: what they judge was not judged of the checkpoint."
    yield f"The checkpoint {weights['name']!r} ran at level realtime alone, timed: {looks}."
