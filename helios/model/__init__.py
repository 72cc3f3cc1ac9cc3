"""The networks, written once against ops, and everything that reads a checkpoint."""

from __future__ import annotations
