"""Judging the cases of a bundle anew: inputs drawn again, the oracle computed again, kept outputs judged again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from helios_conformance import selection
from helios_conformance.case import Case
from helios_conformance.differences import Difference, differences, told_as
from helios_conformance.draws import Root
from helios_conformance.intake import shown
from helios_conformance.record import observation_of, record
from helios_conformance.references import References
from helios_conformance.runner import judged

__all__ = ["HOSTS", "MISROUNDED", "case_differences", "near", "output_contradictions"]

HOSTS = 1e-4
"""Part of its bound by which a statistic may differ between two hosts: sums of float64 depend on their order. What is
within its bound, and whether it is, is decided by the recomputed figure alone."""

MISROUNDED = 2e-3
"""Part of the elements by which ``misrounded`` may differ. Where an oracle cancels, as gelu does far below zero, its
own last bits decide how a small element rounds: up to 4e-4 between AVX2 and plain code."""

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
_DTYPES |= {str(d).removeprefix("torch."): d for d in (torch.int64, torch.int32, torch.uint8, torch.bool)}
_DTYPES["float8_e4m3fn"] = torch.float8_e4m3fn


def case_differences(
    told: Mapping[str, Any], case: Case, tensors: Mapping[str, Tensor], root: Root, references: References
) -> list[Difference]:
    """Where a case's record is not what its kept outputs and facts give.

    Args:
        told: the record, as the schema allows.
        case: of that id.
        tensors: kept elements by ``case/output``.
        root: of the run.
        references: of the suite.
    """
    wrong = list(output_contradictions(told, tensors))
    if wrong:
        return wrong
    observation = observation_of(told, tensors)
    verdict = judged(case, observation, root, references)
    fresh = json.loads(json.dumps(record(case, observation, verdict, told["seconds"])))
    return _against(told, fresh)


def output_contradictions(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Difference]:
    """Kept elements that are not what the record says of them."""
    for name, output in told["outputs"].items():
        values = tensors[f"{told['id']}/{name}"]
        place = f"outputs.{name}"
        if _DTYPES.get(output["dtype"]) != values.dtype:
            yield f"{place}.dtype", f"the kept elements are {str(values.dtype).removeprefix('torch.')}"
        elif values.shape != (output["kept"],):
            yield f"{place}.kept", f"the kept elements have the shape {list(values.shape)}"
        elif output["kept"] > math.prod(output["shape"]):
            yield f"{place}.kept", "more elements are kept than there are"
        else:
            yield from _whole(place, output, values)


def _whole(place: str, output: Mapping[str, Any], values: Tensor) -> Iterator[Difference]:
    """Of an output kept whole everything can be said, of others less."""
    finite = selection.all_finite(values)
    if output["kept"] == math.prod(output["shape"]):
        if selection.digest(values) != output["digest"]:
            yield f"{place}.digest", "it is not the SHA-256 of the kept elements, which are all there are"
        if finite != output["finite"]:
            yield f"{place}.finite", f"the kept elements, which are all there are, say {finite}"
    elif output["finite"] and not finite:
        yield f"{place}.finite", "elements that were kept are not finite"


def _against(told: Mapping[str, Any], fresh: Mapping[str, Any]) -> list[Difference]:
    """A record against the recomputed one; figures and the words about them may differ as hosts do."""
    wrong = [
        (f"outputs.{name}.{which}.{key}", f"it says {told_as(output[which][key])}, recomputed {told_as(value)}")
        for name, output in told["outputs"].items()
        for which in ("errors", "bounds", "reference")
        if _pair(output, fresh["outputs"][name], which)
        for key, value in fresh["outputs"][name][which].items()
        if not near(key, output[which][key], value, fresh["outputs"][name]["bounds"][key])
    ]
    if told["state"] != fresh["state"]:
        wrong.append(("state", f"it says {told['state']}, recomputed {fresh['state']}: {shown(str(fresh['reason']))}"))
    elif not _same_words(told["reason"], str(fresh["reason"])):
        wrong.append(("reason", f"it says {told_as(told['reason'])}, recomputed {told_as(fresh['reason'])}"))
    return wrong + differences(_without(told), _without(fresh))


def _pair(told: Mapping[str, Any], fresh: Mapping[str, Any], which: str) -> bool:
    """Whether both have these statistics; where only one has them, the comparison of the rest tells."""
    return bool(told.get(which)) and bool(fresh.get(which)) and set(told[which]) == set(fresh[which])


def _without(told: Mapping[str, Any]) -> dict[str, Any]:
    """A record with what was compared already reduced to whether it is there."""
    outputs = {
        name: {k: v is not None if k in ("errors", "bounds", "reference") else v for k, v in output.items()}
        for name, output in told["outputs"].items()
    }
    return {k: v for k, v in told.items() if k not in ("state", "reason")} | {"outputs": outputs}


def near(statistic: str, told: Any, fresh: Any, bound: Any) -> bool:
    """Whether a statistic told is the recomputed one, as far as two hosts can agree."""
    if isinstance(told, str) or isinstance(fresh, str) or type(told) is not type(fresh):
        return bool(told == fresh and type(told) is type(fresh))
    if isinstance(fresh, int):
        return bool(told == fresh)
    if statistic == "misrounded" and told != 0.0 != fresh:
        return bool(abs(told - fresh) <= MISROUNDED)
    return bool(abs(told - fresh) <= HOSTS * max(abs(fresh), 0.0 if isinstance(bound, str) else abs(bound)))


def _same_words(told: str, fresh: str) -> bool:
    """Whether two sentences agree, their numbers up to two units of the third digit."""
    if _NUMBER.split(told) != _NUMBER.split(fresh):
        return False
    pairs = zip(_NUMBER.findall(told), _NUMBER.findall(fresh), strict=True)
    return all(a == b or math.isclose(float(a), float(b), rel_tol=0.02) for a, b in pairs)
