"""Weights under which every part of a network shows in its output.

Weights as published models start leave biases near zero and gates near a tenth: what is wrong behind them drowns in the
rounding of bfloat16. Here biases, gates, modulation and norms are of the order of what they act on, and attention looks
at few tokens instead of averaging them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from helios.model.random_weights import spread
from helios.model.safetensors_io import TensorInfo
from helios_conformance.draws import Root, normal

__all__ = ["LoudWeights", "calm", "loud"]

Spread: TypeAlias = Callable[[str, tuple[int, ...]], tuple[float, float]]


def loud(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of the weight of that name and shape."""
    mean, deviation = spread(name, shape)
    parts = name.split(".")
    if "norm_q" in parts or "norm_k" in parts:
        return 1.4, 0.3  # scores of deviation 2: a query sees about one key in fifty
    if parts[-1] == "history_key_scale":
        return -2.5, 0.5  # a logit: keys of the past grow by 1.7; at 1 they would grow by 7.6 and be all that is seen
    if parts[-1] == "scale_shift_table":
        return mean, 0.5
    if "time_proj" in parts and parts[-1] == "weight":
        return mean, 3.0 * deviation
    if parts[-1] == "bias":
        return mean, 0.3
    return (mean, 0.3) if mean == 1.0 else (mean, deviation)


def calm(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """As ``loud``, with scores of deviation 1: amplified keys of the past make them larger again, and beyond 3 the
    rounding of a score decides which key is seen."""
    parts = name.split(".")
    return (1.0, 0.3) if "norm_q" in parts or "norm_k" in parts else loud(name, shape)


FIXED = Root(0, "weights")
"""Keys the weights of every run: a seed or nonce draws what goes into a network, not the network. How much rounding
shows in the output of a small network depends on its weights by a factor of two; with the same ones the committed
errors of the reference are those of the network at hand, and budgets are as narrow as it deserves."""


class LoudWeights:
    """Seeded weights by name, a ``WeightSource``: bits of the suite's own, the same on every host and in every run.

    Args:
        shapes: name -> shape.
        label: what keys the draws.
        dtype: that values are rounded to, once; every precision of a graph sees the same numbers.
        kind: mean and deviation by name and shape.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], label: str, dtype: torch.dtype, kind: Spread = loud
    ) -> None:
        self.label, self.dtype, self.kind = label, dtype, kind
        self.tensors: Mapping[str, TensorInfo] = {n: TensorInfo(tuple(s), dtype) for n, s in shapes.items()}
        self.origin = "drawn by the conformance suite"

    def read(self, name: str) -> Tensor:
        shape = self.tensors[name].shape
        mean, deviation = self.kind(name, shape)
        return normal(FIXED.key(self.label, name), shape, self.dtype, deviation, mean)

    def where(self, name: str) -> str:
        """The origin: there is no file."""
        return self.origin
