"""Whether two networks have room at once, and stay: one rule, for those that run and for those that predict."""

from __future__ import annotations

__all__ = ["RESERVE", "encodes_first", "keeps_encoder"]

RESERVE = 0.06
"""Of device memory, for the driver's context, library workspaces and fragmentation: an assumption."""


KEPT = 0.6
"""Of usable memory, what the weights of transformer and text encoder may take for good. The rest has to hold contexts,
activations and a decode in one pass twice, since that may take half of what is free: 2 × 9.5 GB at the published size.
So 40 GB of weights in bf16 stay on a device of 80 GB, and not on one of 48."""


def encodes_first(transformer: int, encoder: int, usable: int) -> bool:
    """Whether prompts are encoded, and the text encoder released, before the transformer is loaded.

    Args:
        transformer, encoder: bytes of their weights.
        usable: bytes of free memory, less the reserve.
    """
    return encoder > 0 and transformer + encoder > usable


def keeps_encoder(transformer: int, encoder: int, usable: int) -> bool:
    """Whether the text encoder stays where it is between prompts: to read it anew would take seconds for each.

    Arguments as of ``encodes_first``.
    """
    return transformer + encoder <= KEPT * usable
