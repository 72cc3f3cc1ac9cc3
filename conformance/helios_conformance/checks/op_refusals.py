"""What an op and a program must refuse."""

from __future__ import annotations

from helios_conformance.case import Check

CHECKS: tuple[Check, ...] = ()
