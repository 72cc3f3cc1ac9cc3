"""Elementwise ops. Each computes in at least float32 and rounds once to its output dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.errors import OpError
from helios.op import Arg, ErrorCase, Sample, accumulator, op

__all__ = ["add", "cast", "gelu", "scale_history_keys", "silu"]

LONG = 8261
"""More tokens than 8192, where kernels change their way of splitting, and no multiple of anything."""
HUGE = 1e5
"""Scale of the samples ``huge``: most of their numbers are beyond the largest of float16, 65504."""


def _add_samples() -> list[Sample]:
    return [
        Sample("small", (Arg((2, 3, 8)), Arg((2, 3, 8)))),
        Sample("odd", (Arg((1, 7, 33)), Arg((1, 7, 33)))),
        Sample("row", (Arg((2, 2, 6, 24)), Arg((1, 6, 24), scale=0.1))),
        Sample("huge", (Arg((1, 7, 24), scale=HUGE), Arg((1, 7, 24), scale=HUGE))),
        Sample("long", (Arg((1, LONG, 8)), Arg((1, LONG, 8)))),
        Sample(
            "modulation", (Arg((1, 2, 6, 5120), dtype=torch.float32), Arg((1, 6, 5120), dtype=torch.float32)), big=True
        ),
    ]


def _add_errors() -> list[ErrorCase]:
    return [ErrorCase("broadcast", (Arg((2, 3)), Arg((2, 4))), {}, "do not broadcast")]


@op(dims="..., ... -> ...", kind="round", samples=_add_samples, errors=_add_errors)
def add(x: Tensor, y: Tensor) -> Tensor:
    """``x + y`` with broadcasting, in the wider of both dtypes, rounded once."""
    try:
        torch.broadcast_shapes(x.shape, y.shape)
    except RuntimeError:
        raise OpError(f"add: shapes {list(x.shape)} and {list(y.shape)} do not broadcast") from None
    return x + y


def _unary_samples() -> list[Sample]:
    return [
        Sample("small", (Arg((2, 3, 8), scale=3.0),)),
        Sample("odd", (Arg((1, 7, 33), "outliers"),)),
        Sample("wide", (Arg((1, 65, 1280), scale=2.0),)),
        Sample("far", (Arg((1, 7, 33), scale=60.0),)),  # where exp(−x) overflows
        Sample("huge", (Arg((1, 7, 24), scale=HUGE),)),
        Sample("long", (Arg((1, LONG, 8), scale=2.0),)),
    ]


def _gelu_samples() -> list[Sample]:
    stages = {"stage0": 2940, "stage1": 4560, "stage2": 11040}
    big = [Sample(name, (Arg((1, s, 13824), scale=1.5),), big=True) for name, s in stages.items()]
    return [*_unary_samples(), *big]


@op(dims="... -> ...", kind="round", samples=_unary_samples)
def silu(x: Tensor) -> Tensor:
    """``x · sigmoid(x)``, computed in at least float32."""
    return F.silu(x.to(accumulator(x.dtype))).to(x.dtype)


@op(dims="... -> ...", kind="round", samples=_gelu_samples)
def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, ``x/2 · (1 + tanh(√(2/π)(x + 0.044715x³)))``, computed in at least float32."""
    return F.gelu(x.to(accumulator(x.dtype)), approximate="tanh").to(x.dtype)


def _cast_samples() -> list[Sample]:
    targets = (torch.float32, torch.bfloat16)
    return [Sample(str(d).removeprefix("torch."), (Arg((2, 5, 33), "outliers"),), {"dtype": d}) for d in targets]


@op(dims="... -> ...", kind="move", samples=_cast_samples)
def cast(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """``x`` in another dtype, rounded to nearest, ties to even."""
    return x.to(dtype)


def _history_keys_samples() -> list[Sample]:
    return [
        Sample("per_head", (Arg((2, 9, 4, 8)), Arg((4,), dtype=torch.float32)), {"split": 5}),
        Sample("shared", (Arg((1, 7, 3, 6)), Arg((1,), dtype=torch.float32)), {"split": 7}),
        Sample("long", (Arg((1, LONG, 2, 8)), Arg((2,), dtype=torch.float32)), {"split": 8200}),
    ]


@op(dims="b s h d, n -> b s h d", kind="round", samples=_history_keys_samples)
def scale_history_keys(k: Tensor, logit: Tensor, *, split: int, gain: float = 10.0) -> Tensor:
    """Amplify the keys of the first ``split`` tokens by ``1 + sigmoid(logit)·(gain − 1)``.

    Args:
        k: keys ``[b, s, h, d]``, after RoPE.
        logit: learned scale of each head ``[h]``, or one for all ``[1]``; float32 in published checkpoints.
        split: number of history tokens.
        gain: the largest factor.
    """
    acc = accumulator(k.dtype)
    factor = 1.0 + torch.sigmoid(logit.to(acc)) * (gain - 1.0)
    head = (k[:, :split].to(acc) * factor[:, None]).to(k.dtype)
    return torch.cat((head, k[:, split:]), dim=1)
