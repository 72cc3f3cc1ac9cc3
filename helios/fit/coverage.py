"""Which nodes of a plan a backend runs, and how: asked of the backend alone, with no weights and no device."""

from __future__ import annotations

import collections
import dataclasses

from helios import op
from helios.backend import Backend
from helios.passes import Plan

__all__ = ["Covered", "coverage"]


@dataclasses.dataclass(frozen=True, slots=True)
class Covered:
    """How many nodes of one op run by a kernel of the backend, fused, by the fallback, or not at all, and why."""

    op: str
    native: int = 0
    fused: int = 0
    fallback: int = 0
    unsupported: int = 0
    reasons: tuple[str, ...] = ()


def coverage(plan: Plan, backend: Backend, *, fallback: bool = False) -> list[Covered]:
    """One row an op, by name. Constants, which the host computes, are left out.

    Args:
        plan: made for this backend, so that its fusions are in it.
        backend: asked through ``supports``.
        fallback: count what it cannot run as run by the op's body.
    """
    counts: dict[str, collections.Counter[str]] = {}
    reasons: dict[str, dict[str, None]] = {}
    for graph in plan.graphs.values():
        for node in graph.nodes:
            if not node.inputs:
                continue
            reason = backend.supports(node)
            how = "fused" if op.get(node.op).kind == "fused" else "native"
            if reason is not None:
                how = "fallback" if fallback else "unsupported"
                reasons.setdefault(node.op, {})[reason] = None
            counts.setdefault(node.op, collections.Counter())[how] += 1
    return [Covered(name, **counts[name], reasons=tuple(reasons.get(name, ()))) for name in sorted(counts)]
