"""Which GELU of CANN's three keeps the suite's budget in bfloat16: by their documented formulas, computed here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios_conformance.budget import Errors, allowed, exceeded, measure

Form = Callable[[Tensor], Tensor]
FORMS: dict[str, Form] = {
    "tanh": lambda x: F.gelu(x, approximate="tanh"),
    "erf": F.gelu,
    "fast": lambda x: x * torch.sigmoid(1.702 * x),
}


def judged(form: Form) -> tuple[Errors, Errors]:
    """Statistics of a form in float32, rounded once, on the sample ``wide``; and the bounds."""
    record = op.get("gelu")
    sample = next(sample for sample in record.samples() if sample.name == "wide")
    (x,) = sample.make(torch.bfloat16, seed=0)
    oracle = record.fn(x.double())
    bound = allowed("round", torch.bfloat16, 1, oracle, measure(record.fn(x), oracle))
    return measure(form(x.float()).to(x.dtype), oracle), bound


def test_the_tanh_form_keeps_the_budget() -> None:
    errors, bound = judged(FORMS["tanh"])
    assert exceeded(errors, bound) == []


@pytest.mark.parametrize(("name", "beyond"), [("erf", 1), ("fast", 3)])
def test_the_others_do_not(name: str, beyond: int) -> None:
    errors, bound = judged(FORMS[name])
    assert len(exceeded(errors, bound)) == beyond


def test_the_figures_that_are_written_down() -> None:
    errors, bound = judged(FORMS["fast"])
    assert (round(errors.norm, 4), round(errors.gain, 4), round(errors.misrounded, 3)) == (0.0077, -0.0036, 0.895)
    assert (round(bound.norm, 5), round(bound.gain, 5), round(bound.misrounded, 3)) == (0.00234, 0.00075, 0.052)
