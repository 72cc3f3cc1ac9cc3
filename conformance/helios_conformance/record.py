"""One case's result as the bundle keeps it: a JSON object, and the kept elements as tensors beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from helios_conformance.budget import Errors
from helios_conformance.case import Case, Judged, Kept, Observation, Verdict

__all__ = ["observation_of", "record", "tensors_of"]


def record(case: Case, observation: Observation, verdict: Verdict, seconds: float) -> dict[str, Any]:
    """The result as JSON values.

    ``id, level, check, precision, required, state, reason, seconds, facts, coverage, unsupported, outputs``; each
    output has ``shape, dtype, digest, finite, kept`` (elements) and, where it was judged by numbers, ``errors``,
    ``bounds`` and ``reference``, each ``{norm, worst, gain, misrounded, count}``. An infinite statistic is ``"inf"``.
    """
    return {
        "id": case.id,
        "level": case.level,
        "check": case.check,
        "precision": case.precision,
        "required": case.required,
        "state": verdict.state,
        "reason": verdict.reason,
        "seconds": round(seconds, 6),
        "facts": dict(observation.facts),
        "coverage": [list(row) for row in observation.coverage],
        "unsupported": observation.unsupported,
        "outputs": {name: _output(kept, verdict.judged.get(name)) for name, kept in observation.outputs.items()},
    }


def _output(kept: Kept, judged: Judged | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "shape": list(kept.shape),
        "dtype": kept.dtype,
        "digest": kept.digest,
        "finite": kept.finite,
        "kept": kept.values.numel(),
    }
    if judged is not None:
        told["errors"], told["bounds"] = _numbers(judged.errors), _numbers(judged.bounds)
        told["reference"] = None if judged.reference is None else _numbers(judged.reference)
    return told


def _numbers(errors: Errors) -> dict[str, Any]:
    return {k: v if math.isfinite(v) else "inf" for k, v in dataclasses.asdict(errors).items()}


def tensors_of(case: str, observation: Observation) -> dict[str, Tensor]:
    """The kept elements by name, as a safetensors file holds them."""
    return {f"{case}/{name}": kept.values.contiguous() for name, kept in observation.outputs.items()}


def observation_of(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Observation:
    """The observation that a record and its tensors describe. KeyError, TypeError or ValueError where it is none."""
    outputs = {
        name: Kept(
            tensors[f"{told['id']}/{name}"], tuple(int(n) for n in o["shape"]), o["dtype"], o["digest"], o["finite"]
        )
        for name, o in told["outputs"].items()
    }
    coverage = [(str(r[0]), int(r[1]), int(r[2]), int(r[3]), str(r[4])) for r in told["coverage"]]
    return Observation(outputs, dict(told["facts"]), coverage, told["unsupported"])
