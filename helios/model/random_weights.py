"""Seeded random weights of stated scale, for sizes without a checkpoint and for runs that measure speed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import torch

from helios.model.safetensors_io import TensorInfo

__all__ = ["RandomWeights", "spread"]


class RandomWeights:
    """Weights drawn from normal distributions, each tensor from a stream of its own.

    A tensor depends on the seed and its name alone: not on the order of reading, on the other tensors, or on the dtype
    (values are drawn in float32, then rounded). Mean and spread by kind of tensor:

    - matrices and convolutions: mean 0, standard deviation 1/√(fan-in), so that an input of unit variance gives an
      output of unit variance;
    - ``scale_shift_table``: mean 0, deviation 1/√(width), as published models start;
    - norm weights (one-dimensional ``weight``, and ``gamma``) and ``history_key_scale``: mean 1, deviation 0.1;
    - biases: mean 0, deviation 0.02.

    Through 40 blocks the residual stream then grows by a factor of a few and stays far from both zero and overflow:
    each branch adds about a tenth of a unit through its gate.

    Args:
        shapes: name -> shape.
        seed: any integer.
        dtype: of all tensors, or a function of the name.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        seed: int,
        dtype: torch.dtype | Callable[[str], torch.dtype] = torch.float32,
    ) -> None:
        of = dtype if callable(dtype) else (lambda name: dtype)
        self.seed = seed
        self.tensors: Mapping[str, TensorInfo] = {n: TensorInfo(tuple(shape), of(n)) for n, shape in shapes.items()}
        self.origin = f"random weights, seed {seed}: normal, matrices of deviation 1/√fan-in, norms 1 ± 0.1"

    def read(self, name: str) -> torch.Tensor:
        """Draw one tensor; peak memory is the tensor in float32 and in its dtype."""
        info = self.tensors[name]
        key = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(key[:8], "little", signed=True))
        mean, deviation = spread(name, info.shape)
        drawn = torch.randn(info.shape, generator=generator, dtype=torch.float32, device="cpu")
        return drawn.mul_(deviation).add_(mean).to(info.dtype)

    def where(self, name: str) -> str:
        """The origin: there is no file."""
        return self.origin


def spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of the weight of that name and shape."""
    kind = name.rpartition(".")[2]
    if kind == "scale_shift_table":
        return 0.0, shape[-1] ** -0.5
    if kind in ("gamma", "history_key_scale") or (kind == "weight" and len(shape) == 1):
        return 1.0, 0.1
    if kind == "bias":
        return 0.0, 0.02
    return 0.0, math.prod(shape[1:]) ** -0.5
