"""Transformer blocks, VAE blocks and sampler steps, teacher-forced."""

from __future__ import annotations

from helios_conformance.case import Check

CHECKS: tuple[Check, ...] = ()
