"""Whether two networks have room at once: one rule, for those that run and for those that predict."""

from __future__ import annotations

__all__ = ["RESERVE", "encodes_first"]

RESERVE = 0.06
"""Of device memory, for the driver's context, library workspaces and fragmentation: an assumption."""


def encodes_first(transformer: int, encoder: int, usable: int) -> bool:
    """Whether prompts are encoded, and the text encoder released, before the transformer is loaded.

    Args:
        transformer, encoder: bytes of their weights.
        usable: bytes of free memory, less the reserve.
    """
    return encoder > 0 and transformer + encoder > usable
