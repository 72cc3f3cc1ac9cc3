"""Weights as they are held quantised, and what that saves of the memory that they came with. Needs no Triton."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from helios.graph import Node, Rate

__all__ = ["Quantised", "saved"]

OPS = frozenset(("packed_linear", "quantized_linear", "quantized_qkv_linear"))
"""Whose handles are ``Quantised``."""


class Quantised(NamedTuple):
    """A weight by rows: ``weight`` ``[o, i]`` float8_e4m3fn and ``scale`` ``[o, 1]`` float32, both contiguous; ``bias``
    ``[o]``; ``dtype`` of the product; ``parts`` are the widths of what was laid side by side."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    parts: tuple[int, ...] = ()


def saved(node: Node) -> int:
    """Bytes by which a node's handle is smaller than the weights that it is made of."""
    if node.op not in OPS:
        return 0
    matrices = [v for v in node.values if v.rate == Rate.WEIGHTS and len(v.shape) == 2]
    return sum(v.type.nbytes - math.prod(v.shape) - 4 * v.shape[0] for v in matrices)
