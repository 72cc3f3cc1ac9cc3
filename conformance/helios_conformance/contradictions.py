"""What a report says of its machine, its software and its times that cannot all be true.

None of it proves who ran what; it refuses what contradicts itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import helios
from helios.backend import API_VERSION, ReferenceBackend
from helios.fit.costs import Setting, resident_weights, stage_graphs
from helios.lower import plan_for
from helios.model import presets
from helios.ops import OPSET, opset_hash
from helios.precision import PRECISIONS
from helios_conformance import report as made
from helios_conformance.suite import suite_hash

__all__ = ["contradictions"]

Difference = tuple[str, str]

OURS = {
    "ascend": "helios_ascend",
    "cpu": "helios_cpu",
    "cuda": "helios_cuda",
    "ort": "helios_ort",
    "reference": "helios",
    "trt": "helios_trt",
}
"""Names of Helios' own backends, and the package that each comes from: no stranger's class goes by one of them."""

HASHING = 10e9
"""Bytes a second. The suite hashes every output within the case's time; no core computes SHA-256 as fast as this."""

SLACK = 1.0
"""Seconds: clocks are read before and after what they time."""

_SIZES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2}


def contradictions(report: Mapping[str, Any]) -> list[Difference]:
    """Where a report of this suite, of the schema's form, contradicts itself: (place, what is wrong)."""
    return [
        *_identity(report),
        *_scope(report),
        *_backend(report),
        *_software(report),
        *_times(report),
        *_memory(report),
    ]


def _identity(report: Mapping[str, Any]) -> Iterator[Difference]:
    told, environment = report["suite"], report["environment"]
    for place, came, wanted in (
        ("suite.opset", told["opset"], OPSET),
        ("suite.opset_hash", told["opset_hash"], opset_hash()),
        ("suite.version", told["version"], helios.__version__),
        ("environment.opset", environment["opset"], {"version": OPSET, "hash": opset_hash()}),
        ("environment.suite", environment["suite"], suite_hash()),
        ("environment.packages.helios-hal", environment["packages"]["helios-hal"], helios.__version__),
    ):
        if came != wanted:
            yield place, f"it says {came}, and this suite's is {wanted}"


def _scope(report: Mapping[str, Any]) -> Iterator[Difference]:
    told, scope, backend, setup = (report[key] for key in ("suite", "scope", "backend", "setup"))
    for place, came, wanted in (
        ("scope.levels", scope["levels"], told["levels"]),
        ("scope.kind", scope["kind"], made.kind(backend, report["cases"])),
        ("scope.variants", scope["variants"], list(made.VARIANTS)),
        ("setup.imported", setup["imported"], bool(setup["options"].get("imported", False))),
    ):
        if came != wanted:
            yield place, f"it says {came}, elsewhere the report says {wanted}"
    for case in report["cases"]:
        # Imported results are judged by their numbers alone.
        if case["outputs"] and bool(case["facts"].get("imported")) is not setup["imported"]:
            yield f"cases.{case['id']}.facts.imported", "it contradicts setup.imported"


def _backend(report: Mapping[str, Any]) -> Iterator[Difference]:
    backend = report["backend"]
    name, cls = backend["name"], backend["class"]
    if name in OURS and cls is not None and cls.partition(":")[0].partition(".")[0] != OURS[name]:
        yield "backend.class", f"{cls} is not the backend that is called {name!r}"
    if backend["label"].partition(":")[0] != name:
        yield "backend.label", f"{backend['label']!r} is not a label of backend {name!r}"
    if report["setup"]["spec"].partition(":")[0] not in (name, "auto", ""):
        yield "setup.spec", f"{report['setup']['spec']!r} does not select backend {name!r}"
    if not _ran(report) or report["setup"]["imported"]:
        return
    if cls is None or backend["device"] is None:
        yield "backend", "cases ran, but the backend has no class or no device"
    if backend["api_version"] != API_VERSION:
        yield "backend.api_version", f"it says {backend['api_version']}, this Helios takes {API_VERSION}"
    if report["scope"]["precision"] not in backend["precisions"]:
        yield "backend.precisions", f"{report['scope']['precision']} ran, which the backend does not offer"
    strange = [p for p in backend["precisions"] if p not in PRECISIONS]
    if strange:
        yield "backend.precisions", f"there is no precision {strange[0]!r}"
    if not backend["threads"]:
        yield "backend.threads", "no thread ran"


def _software(report: Mapping[str, Any]) -> Iterator[Difference]:
    backend, environment = report["backend"], report["environment"]
    own, packages = backend["distribution"], environment["packages"]
    if own is not None and packages.get(own) != backend["version"]:
        yield "backend.version", f"{own} is {backend['version']} here and {packages.get(own)} in the environment"
    if own is None and backend["version"] is not None:
        yield "backend.version", "a version of no distribution"
    if packages["torch"] is None:
        yield "environment.packages.torch", "nothing runs without torch"
    if environment["cores"]["usable"] > environment["cores"]["logical"]:
        yield "environment.cores", "more cores were usable than there are"
    fallback = environment["variables"].get("HELIOS_FALLBACK")
    if fallback not in (None, "error") and report["verdict"]["word"] == "certified":
        yield "environment.variables.HELIOS_FALLBACK", f"{fallback!r} in a certified run"
    if isinstance(report["realtime"], dict) and "realtime" not in report["suite"]["levels"]:
        yield "realtime", "a speed without the level realtime"


def _times(report: Mapping[str, Any]) -> Iterator[Difference]:
    workers, ran = report["workers"], _ran(report)
    try:
        started, finished = (datetime.fromisoformat(report[key]) for key in ("started", "finished"))
    except ValueError:
        yield "started", "started or finished is no moment"
        return
    elapsed = (finished - started).total_seconds()
    spent = sum(case["seconds"] for case in report["cases"])
    if elapsed < 0:
        yield "finished", "the run ended before it began"
    elif spent > elapsed * 1.01 + SLACK:
        yield "finished", f"cases took {spent:.1f} s of a run of {elapsed:.1f} s"
    for case in [] if report["setup"]["imported"] else report["cases"]:
        least = sum(_bytes(output) for output in case["outputs"].values()) / HASHING
        if case["seconds"] < least:
            yield _place(case), f"its outputs cannot even be hashed in {case['seconds']} s; that takes {least:.3g} s"
    lost = sum("lost" in case["facts"] for case in report["cases"])
    if workers["lost"] > workers["started"] or lost > workers["lost"]:
        yield "workers", f"{workers['lost']} lost of {workers['started']} started, and {lost} cases lost theirs"
    if ran and not workers["started"] and not report["setup"]["imported"]:
        yield "workers", "cases ran, but no worker was started"


def _memory(report: Mapping[str, Any]) -> Iterator[Difference]:
    environment, peak = report["environment"], report["peak_rss"]
    for who in ("parent", "worker"):
        if peak[who] > environment["memory"]:
            yield f"peak_rss.{who}", f"{peak[who]:,} bytes on a machine of {environment['memory']:,}"
    memory = (report["backend"]["device"] or {}).get("memory")
    if memory is None:
        return
    for case in report["cases"]:
        largest = max((_bytes(output) for output in case["outputs"].values()), default=0)
        if largest > memory:
            yield _place(case), f"an output of {largest:,} bytes on a device of {memory:,}"
    section = report["realtime"] or {}
    if section.get("size") == "14b" and memory < _weights(report["scope"]["precision"]):
        yield "backend.device.memory", f"weights of the published size do not fit into {memory:,} bytes"


@functools.cache
def _weights(precision: str) -> int:
    """Bytes of the weights of the published size."""
    setting = Setting(presets.size("14b"), presets.variant("distilled"), 384, 640, precision=PRECISIONS[precision])
    plan = plan_for(stage_graphs(setting, [0]), ReferenceBackend())
    return sum(type_.nbytes for type_ in resident_weights(plan).values())


def _bytes(output: Mapping[str, Any]) -> int:
    elements: int = math.prod(output["shape"])
    return elements * _SIZES.get(output["dtype"], 1)


def _ran(report: Mapping[str, Any]) -> bool:
    """Whether any case came to an end."""
    return any(case["state"] in ("pass", "fail") for case in report["cases"])


def _place(case: Mapping[str, Any]) -> str:
    return f"cases.{case['id']}.seconds" if case["outputs"] else f"cases.{case['id']}"
