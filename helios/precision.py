"""The precisions by name: the dtype that a graph is written in, and what of it is quantised.

A precision is a scope of its own wherever results are judged or kept: ``fp8`` never passes for ``bf16``.

================= ======== ================================ ==================== ==============
name              dtype    products of the blocks           attention            meant for
================= ======== ================================ ==================== ==============
``fp64``          float64  float64                          float64              the oracle
``fp32``          float32  float32                          float32              comparison
``bf16``          bfloat16 bfloat16                         bfloat16             as published
``fp16``          float16  float16                          float16              no bfloat16
``fp8``           bfloat16 e4m3, a scale a row, both sides  bfloat16             fp8 units
``fp8-attention`` bfloat16 as ``fp8``                       self-attention e4m3  fp8 units
``fp8-weights``   bfloat16 weights e4m3, arithmetic bf16    bfloat16             little memory
================= ======== ================================ ==================== ==============

What is quantised is decided by ``passes.quantize``. Everything outside the blocks, all norms, residuals, the sampler
and the VAE are the same as in a run of the working dtype.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from helios.errors import InputError, unknown_name

__all__ = ["DTYPES", "PRECISIONS", "Precision", "precision", "require_offered"]


@dataclasses.dataclass(frozen=True, slots=True)
class Precision:
    """One of them.

    Attributes:
        name: as a user gives it.
        dtype: the working dtype, in which graphs are written.
        products: ``e4m3``: of the blocks' products weights and activations are quantised; ``weights``: the weights
            alone, and the product is one of the working dtype; empty: nothing is.
        attention: whether queries, keys, values and probabilities of self-attention are quantised.
        kept: how many blocks at each end stay in the working dtype, where there are more than twice as many.
    """

    name: str
    dtype: torch.dtype
    products: Literal["", "e4m3", "weights"] = ""
    attention: bool = False
    kept: int = 0

    @property
    def quantised(self) -> bool:
        return bool(self.products) or self.attention


_ALL = (
    Precision("fp64", torch.float64),
    Precision("fp32", torch.float32),
    Precision("bf16", torch.bfloat16),
    Precision("fp16", torch.float16),
    Precision("fp8", torch.bfloat16, "e4m3", kept=1),
    Precision("fp8-attention", torch.bfloat16, "e4m3", attention=True, kept=1),
    Precision("fp8-weights", torch.bfloat16, "weights", kept=1),
)

PRECISIONS: Mapping[str, Precision] = {p.name: p for p in _ALL}

DTYPES: Mapping[str, torch.dtype] = {p.name: p.dtype for p in _ALL}
"""The working dtype by name."""


def precision(name: str) -> Precision:
    """The precision of that name. Raises InputError with the nearest."""
    if name not in PRECISIONS:
        raise InputError(unknown_name("precision", name, PRECISIONS), fix="--precision bf16")
    return PRECISIONS[name]


def require_offered(
    name: str, backend: str, offered: Sequence[str], withheld: Mapping[str, str] = types.MappingProxyType({})
) -> None:
    """Raises InputError where a backend does not compute in a precision; says in which it does.

    Args:
        withheld: why not, by name, as far as the backend knows (``Backend.withheld``).
    """
    if name in offered:
        return
    if name in PRECISIONS:
        why = f"backend {backend!r} does not compute in {name}, but in {', '.join(offered)}"
        why += f"; {withheld[name]}" if name in withheld else ""
        raise InputError(why, f"--precision {offered[0]}, or another backend: `helios backends` lists what each offers")
    raise InputError(unknown_name("precision", name, offered), f"--precision {offered[0]}")
