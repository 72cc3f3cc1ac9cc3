"""Whole forwards of small sizes at every stage and step."""

from __future__ import annotations

from helios_conformance.case import Check

CHECKS: tuple[Check, ...] = ()
