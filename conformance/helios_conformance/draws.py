"""Every number that a run draws: counter-based, the same bits on every host.

A key is a hash of the root (seed and nonce) and of labels that say what the draw is for; it seeds Philox, which is
integer arithmetic.
Normals come from a table of 65,536 quantiles, indexed by 16 random bits. The table is made of operations that IEEE 754
rounds correctly, scaled and rounded to the dtype before it is indexed, so a draw costs a look-up and has one rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from helios.model.random_weights import spread
from helios.op import Arg, Sample
from helios.sampler.normal import inverse_normal

__all__ = ["Root", "Weights", "make_arg", "make_sample", "normal", "uniform"]

_LEVELS = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class Root:
    """Where all draws of a run start.

    Attributes:
        seed: of the suite; any whole number.
        nonce: chosen by the certifier after the backend was handed over (*witnessed*), or by the run itself.
    """

    seed: int = 0
    nonce: str = ""

    def key(self, *labels: object) -> int:
        """128 bits for what the labels say."""
        text = "\x1f".join(["helios-conformance", str(self.seed), self.nonce, *map(str, labels)])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def _raw(key: int, count: int) -> npt.NDArray[np.uint64]:
    words = np.array([key & (2**64 - 1), key >> 64], np.uint64)
    return np.random.Philox(key=words).random_raw(count)


def bits(key: int, count: int) -> npt.NDArray[np.uint16]:
    """That many 16-bit numbers."""
    return _raw(key, -(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]


@functools.cache
def _quantiles() -> npt.NDArray[np.float64]:
    return inverse_normal((np.arange(_LEVELS) + 0.5) / _LEVELS)


def _look_up(table: npt.NDArray[np.float64], dtype: torch.dtype, index: npt.NDArray[np.uint16]) -> Tensor:
    """Entries of a float64 table, rounded once to a dtype."""
    rounded = torch.from_numpy(table).to(dtype)
    if dtype == torch.bfloat16:  # numpy has no bfloat16: the bits are looked up
        return torch.from_numpy(np.take(rounded.view(torch.int16).numpy(), index)).view(torch.bfloat16)
    if dtype == torch.float8_e4m3fn:
        return torch.from_numpy(np.take(rounded.view(torch.uint8).numpy(), index)).view(dtype)
    return torch.from_numpy(np.take(rounded.numpy(), index))


def normal(
    key: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0, offset: float = 0.0
) -> Tensor:
    """Standard normals (65,536 values, |z| < 4.4) × scale + offset, rounded once to a dtype."""
    return _look_up(_quantiles() * scale + offset, dtype, bits(key, math.prod(shape))).reshape(shape)


def uniform(
    key: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0, offset: float = 0.0
) -> Tensor:
    """Uniform numbers in (0, 1) (65,536 values) × scale + offset, rounded once to a dtype."""
    units = (np.arange(_LEVELS) + 0.5) / _LEVELS
    return _look_up(units * scale + offset, dtype, bits(key, math.prod(shape))).reshape(shape)


def _rotations(key: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Pairs (cos θ, sin θ) in the last dimension, of θ all around.

    With t in (−1, 1) for tan(θ/2), ((1 − t²)/(1 + t²), 2t/(1 + t²)) is the right half of the circle, made without a
    mathematical library; one more bit turns it.
    """
    t = uniform(key, shape[:-1], torch.float64, 2.0, -1.0)
    turn = 1.0 - 2.0 * torch.from_numpy((bits(key + 1, t.numel()) & 1).astype(np.float64)).reshape(t.shape)
    over = 1.0 + t * t
    return torch.stack((turn * ((1.0 - t * t) / over), turn * (2.0 * t / over)), -1).to(dtype)


def make_arg(arg: Arg, dtype: torch.dtype, key: int) -> Tensor:
    """The host tensor that a description of an op's record stands for; see ``helios.op.Arg``."""
    dtype = arg.dtype or dtype
    if arg.fill == "table":
        return _rotations(key, arg.shape, dtype)
    if arg.fill == "uniform":
        return uniform(key, arg.shape, dtype, arg.scale, arg.offset)
    x = normal(key, arg.shape, dtype, arg.scale, arg.offset)
    if arg.fill == "outliers":
        x[..., ::61] = normal(key, arg.shape, dtype, 30.0 * arg.scale, arg.offset)[..., ::61]
    elif arg.fill == "tiny":
        rows = x.reshape(-1, x.shape[-1])
        rows[::3] = normal(key, arg.shape, dtype, 1e-3 * arg.scale, arg.offset).reshape(rows.shape)[::3]
    elif arg.fill == "flat":
        rows = x.reshape(-1, x.shape[-1])
        rows[::3], rows[1::3] = 0.0, 0.75
    return x


def make_sample(sample: Sample, dtype: torch.dtype, root: Root, *labels: object) -> list[Any]:
    """The operands of a sample, in the order of the signature: tensors, lists of them, or None."""

    def one(arg: Any, *where: int) -> Any:
        if arg is None:
            return None
        if isinstance(arg, tuple):
            return [one(a, *where, i) for i, a in enumerate(arg)]
        return make_arg(arg, dtype, root.key(*labels, *where))

    return [one(arg, i) for i, arg in enumerate(sample.inputs)]


class Weights:
    """Seeded normal weights by name, a ``WeightReader``: distributions as in ``helios.model.random_weights``, bits of
    the suite's own.

    Args:
        shapes: name -> shape.
        root, label: what keys the draws.
        dtype: of all tensors; they are rounded to it once and widened from there, so that every precision of a graph
            sees the same numbers.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], root: Root, label: str, dtype: torch.dtype) -> None:
        self.shapes, self.root, self.label, self.dtype = shapes, root, label, dtype

    def read(self, name: str) -> Tensor:
        shape = tuple(self.shapes[name])
        mean, deviation = spread(name, shape)
        return normal(self.root.key(self.label, name), shape, self.dtype, deviation, mean)
