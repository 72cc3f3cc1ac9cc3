"""The kinds of cases, in the order in which a run takes them."""

from __future__ import annotations

from helios_conformance.case import Check
from helios_conformance.checks import (
    blocks,
    model,
    op_refusals,
    op_repeats,
    op_specials,
    op_values,
    pipeline,
    plan_nodes,
)
from helios_conformance.realtime import checks as realtime

__all__ = ["CHECKS", "get"]

CHECKS: tuple[Check, ...] = (
    *op_values.CHECKS,
    *op_specials.CHECKS,
    *op_refusals.CHECKS,
    *op_repeats.CHECKS,
    *plan_nodes.CHECKS,
    *blocks.CHECKS,
    *model.CHECKS,
    *pipeline.CHECKS,
    *realtime.CHECKS,
)


def get(name: str) -> Check:
    """The check of that name; KeyError if there is none."""
    return {check.name: check for check in CHECKS}[name]
