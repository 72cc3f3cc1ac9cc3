"""``report.json``: everything that a run showed, as one JSON object; ``schema/report.schema.json`` describes it.

What follows from other parts of the report (totals, verdict, sentences, commands) is made by functions here and in
``verdict``; whoever verifies a report makes it again and compares.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import helios
from helios.ops import OPSET, opset_hash
from helios_conformance import FORMAT, realtime, suite, verdict
from helios_conformance import divergence as free
from helios_conformance.case import Case, Observation, Verdict
from helios_conformance.record import record
from helios_conformance.run import UNASKED, RunResult

__all__ = ["assemble", "coverage", "derived", "divergence", "dumps", "kind", "schema", "speed", "weights"]

VARIANTS = ("base", "mid", "distilled")
"""Published ways to sample; the cases take all of them."""

SCALE = "normal: matrices of deviation 1/√fan-in, norm weights 1 ± 0.1, biases of deviation 0.02"
"""Of random weights, see ``helios.model.random_weights.spread``."""

TIMED = frozenset({"realtime_timed", "realtime_varied", "realtime_soak"})
"""Checks whose pipelines run whether or not an output is kept of them."""

_BACKEND: Mapping[str, Any] = {
    "class": None,
    "distribution": None,
    "version": None,
    **UNASKED,
    "threads": 1,
}
"""What is said of a backend that could not be asked."""


def assemble(result: RunResult) -> dict[str, Any]:
    """The report of a run. Cases that were taken and have no record are entered as not run."""
    setup = result.setup
    precision = setup.precision or "bf16"
    name = setup.spec.partition(":")[0]
    backend = {**_BACKEND, "name": name, "label": setup.spec, **result.backend}
    records = _records(result, precision)
    report: dict[str, Any] = {
        "format": FORMAT,
        "suite": _suite(result),
        "scope": {
            "precision": precision,
            "kind": kind(backend, records),
            "variants": list(VARIANTS),
            "levels": list(setup.levels),
        },
        "setup": _setup(result),
        "backend": backend,
        "environment": result.environment,
        "cases": records,
        "started": result.started,
        "finished": result.finished,
        "peak_rss": {"parent": 0, "worker": 0, **result.peak_rss},
        "workers": {"started": 0, "lost": 0, **result.workers},
        "problem": result.problem,
    }
    report = _plain(report)
    return report | derived(report)


def derived(report: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from the rest: ``weights, coverage, divergence, realtime, verdict, tier, not_proved, reproduce``."""
    whole = dict(report)
    cases = whole["cases"]
    whole["weights"] = weights(whole)
    whole["coverage"] = coverage(cases)
    whole["divergence"] = divergence(cases)
    whole["realtime"] = speed(whole)
    whole["tier"] = "self-tested"
    whole["verdict"] = verdict.conclude(whole)
    whole["not_proved"] = verdict.not_proved(whole)
    whole["reproduce"] = [_again(whole)]
    names = ("weights", "coverage", "divergence", "realtime", "tier", "verdict", "not_proved", "reproduce")
    return {name: whole[name] for name in names}


def coverage(cases: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """Rows of op, native, fused, fallback and reason over all cases, sorted by op."""
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    reasons: dict[str, str] = {}
    for case in cases:
        for op, native, fused, fallback, reason in case["coverage"]:
            counts[op] = [a + b for a, b in zip(counts[op], (native, fused, fallback), strict=True)]
            if reason:
                reasons.setdefault(op, reason)
    return [[op, *counts[op], reasons.get(op, "")] for op in sorted(counts)]


def divergence(cases: Sequence[Mapping[str, Any]]) -> Any:
    """How a free run leaves the reference, chunk by chunk; None where none was made."""
    return free.section(cases)


def speed(report: Mapping[str, Any]) -> Any:
    """The section on real time; None where none was measured."""
    return _plain(realtime.section(report["cases"], report["backend"]))


def _suite(result: RunResult) -> dict[str, Any]:
    setup = result.setup
    return {
        "version": helios.__version__,
        "hash": suite.suite_hash(),
        "opset": OPSET,
        "opset_hash": opset_hash(),
        "name": setup.suite,
        "levels": list(setup.levels),
        "filters": list(setup.filters),
        "seed": setup.root.seed,
        "nonce": setup.root.nonce,
    }


def _setup(result: RunResult) -> dict[str, Any]:
    setup = result.setup
    return {
        "spec": setup.spec,
        "variant": setup.variant,
        "options": {**setup.options, **({"resumed": result.resumed} if result.resumed else {})},
        "imported": bool(setup.options.get("imported", False)),
    }


def kind(backend: Mapping[str, Any], cases: Iterable[Mapping[str, Any]]) -> str:
    """``kernels`` or ``engine``: who runs any case's graph whole is an engine, whatever else it runs op by op, and
    claims what an engine may claim."""
    return "engine" if any(map(_whole, cases)) else str(backend["kind"])


def _whole(case: Mapping[str, Any]) -> bool:
    """Whether a case ran as an engine runs it: it says so, or no coverage says how its nodes ran."""
    facts = case["facts"]
    if facts.get("engine") is True or facts.get("engine") is False or facts.get("imported"):
        return facts.get("engine") is True
    ran = bool(case["outputs"]) or (case["check"] in TIMED and case["state"] == "pass")
    return ran and not any(sum(row[1:4]) for row in case["coverage"])


def weights(report: Mapping[str, Any]) -> dict[str, Any]:
    """Which weights ran. Every level draws them but realtime, which reads a checkpoint where one is given; its
    identity is told by whoever read it, in the options. A checkpoint that no timed run used is none."""
    drawn = {"seed": report["suite"]["seed"], "scale": SCALE}
    given = report["setup"]["options"].get("checkpoint")
    if not isinstance(given, Mapping) or not any(map(_read_checkpoint, report["cases"])):
        return {"origin": "random", **drawn}
    levels = {level: "checkpoint" if level == "realtime" else "random" for level in report["suite"]["levels"]}
    return {"origin": "checkpoint", "sha256": given["sha256"], "name": given["name"], "levels": levels, **drawn}


def _read_checkpoint(case: Mapping[str, Any]) -> bool:
    setting = case["facts"].get("setting")
    timed = case["level"] == "realtime" and isinstance(setting, Mapping)
    return timed and setting.get("weights") == "checkpoint"


def _records(result: RunResult, precision: str) -> list[dict[str, Any]]:
    """One record of every case that was taken, in the suite's order."""
    setup = result.setup
    known = {told["id"]: told for told in result.records}
    taken = suite.choose(precision, setup.suite, setup.levels, setup.filters)
    return [known.get(case.id) or _absent(case, result.problem) for case in taken]


def _absent(case: Case, problem: str) -> dict[str, Any]:
    reason = problem or "the run ended before"
    return record(case, Observation(facts={"not_run": reason}), Verdict("not_run", reason), 0.0)


def _again(report: Mapping[str, Any]) -> str:
    """The command that makes the same run again, quoted for a POSIX shell."""
    told = report["suite"]
    words = ["helios", "certify", "--backend", report["setup"]["spec"], "--precision", report["scope"]["precision"]]
    words += ["--suite", told["name"], "--level", "all" if "realtime" in told["levels"] else told["levels"][-1]]
    words += ["--seed", str(told["seed"])]
    words += ["--nonce", told["nonce"]] if told["nonce"] else []
    for pattern in told["filters"]:
        words += ["--filter", pattern]
    return shlex.join(words)


def _plain(value: Any) -> Any:
    """JSON has no infinities and no NaN: they become the strings of their names. Tuples become lists, keys strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool | int):
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return str(value)


def dumps(report: Mapping[str, Any]) -> bytes:
    """The report as the bytes of ``report.json``."""
    return (json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


@functools.cache
def schema() -> dict[str, Any]:
    """The published JSON schema."""
    text = resources.files("helios_conformance").joinpath("schema", "report.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded
