"""The same bits every time: many repeats of one case."""

from __future__ import annotations

from helios_conformance.case import Check

CHECKS: tuple[Check, ...] = ()
