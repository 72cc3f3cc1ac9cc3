"""Videos: determinism, isolation of prompts, resuming, every kind of start."""

from __future__ import annotations

from helios_conformance.case import Check

CHECKS: tuple[Check, ...] = ()
