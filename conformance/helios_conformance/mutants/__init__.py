"""Wrong backends, made by wrapping a right one: the suite's own test. Each must be caught.

``make mutants`` runs them all; ``docs/mutants.md`` is what it printed last.
"""

from __future__ import annotations

from helios_conformance.mutants import (
    attention,
    conditions,
    declarations,
    extremes,
    memory,
    norms,
    positions,
    products,
    programs,
    quantised,
    sampler,
    timing,
)
from helios_conformance.mutants.kill import Attempt, Bench, Kill, attempt, likeliest_first
from helios_conformance.mutants.mutant import Mutant

__all__ = ["MUTANTS", "Attempt", "Bench", "Kill", "Mutant", "attempt", "likeliest_first"]

MUTANTS: tuple[Mutant, ...] = (
    *attention.MUTANTS,
    *norms.MUTANTS,
    *products.MUTANTS,
    *quantised.MUTANTS,
    *extremes.MUTANTS,
    *positions.MUTANTS,
    *sampler.MUTANTS,
    *memory.MUTANTS,
    *conditions.MUTANTS,
    *programs.MUTANTS,
    *declarations.MUTANTS,
    *timing.MUTANTS,
)
"""By family; names are unique."""
