"""NaN and infinities, memory layouts, indices beyond 2³¹."""

from __future__ import annotations

from helios_conformance.case import Check

CHECKS: tuple[Check, ...] = ()
