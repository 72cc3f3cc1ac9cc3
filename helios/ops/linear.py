"""Matrix products with weights. Products accumulate in at least float32; each output is rounded once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from helios.errors import OpError
from helios.op import Arg, ErrorCase, Fill, Sample, multiplicands, op
from helios.ops.pointwise import HUGE, LONG, gelu

__all__ = ["linear", "linear_gelu", "qkv_linear"]

# Tokens of the three pyramid stages at 384 × 640: 2400 of history and 540, 2160 or 8640 noisy ones.
STAGES = {"stage0": 2940, "stage1": 4560, "stage2": 11040}


def _weights(out: int, inner: int, bias: bool = True) -> tuple[Arg, Arg | None]:
    return Arg((out, inner), scale=inner**-0.5), Arg((out,), scale=0.1) if bias else None


def _linear_samples() -> list[Sample]:
    return [
        Sample("small", (Arg((2, 5, 24)), *_weights(32, 24))),
        Sample("nobias", (Arg((3, 24)), *_weights(8, 24, bias=False))),
        Sample("odd", (Arg((1, 7, 33), "outliers"), *_weights(17, 33))),
        Sample("outliers", (Arg((1, 17, 256), "outliers"), *_weights(40, 256))),
        Sample("wide", (Arg((1, 65, 512)), *_weights(640, 512))),
        Sample("huge", (Arg((1, 7, 33), scale=HUGE), *_weights(17, 33))),
        Sample("long", (Arg((1, LONG, 16)), *_weights(24, 16))),
        *(Sample(f"attn_{n}", (Arg((1, s, 5120)), *_weights(5120, 5120)), big=True) for n, s in STAGES.items()),
        *(Sample(f"ffn_down_{n}", (Arg((1, s, 13824)), *_weights(5120, 13824)), big=True) for n, s in STAGES.items()),
        Sample("text_kv", (Arg((1, 512, 5120)), *_weights(5120, 5120)), big=True),
        Sample("head", (Arg((1, 8640, 5120)), *_weights(64, 5120)), big=True),
    ]


def _linear_errors() -> list[ErrorCase]:
    return [
        ErrorCase("inner", (Arg((2, 5, 24)), Arg((32, 23)), None), {}, "linear: x"),
        ErrorCase("bias", (Arg((2, 5, 24)), Arg((32, 24)), Arg((31,))), {}, "'o' is 31"),
    ]


@op(dims="..., o i, o? -> ...", kind="reduce", samples=_linear_samples, errors=_linear_errors)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: ``[..., i]``.
        weight: ``[o, i]``, of the dtype of x.
        bias: ``[o]``, of the dtype of x.

    Returns:
        ``[..., o]``; products and the bias accumulate in at least float32, rounded once.
    """
    if x.shape[-1] != weight.shape[1]:
        raise OpError(
            f"linear: x {list(x.shape)} ends in {x.shape[-1]}, weight {list(weight.shape)} takes {weight.shape[1]}"
        )
    # As a matrix: on other ranks and strides torch adds the bias after a rounding.
    wide, matrix, row = multiplicands(x.reshape(-1, x.shape[-1]), weight, bias)
    rows = F.linear(wide, matrix, row).to(x.dtype)  # type: ignore[arg-type]
    return rows.reshape(*x.shape[:-1], weight.shape[0])


def _linear_gelu_samples() -> list[Sample]:
    return [
        Sample("small", (Arg((2, 5, 24)), *_weights(32, 24))),
        Sample("nobias", (Arg((2, 5, 24)), *_weights(8, 24, bias=False))),
        Sample("odd", (Arg((1, 7, 33), "outliers"), *_weights(17, 33))),
        Sample("huge", (Arg((1, 7, 33), scale=HUGE), *_weights(17, 33))),
        Sample("long", (Arg((1, LONG, 16)), *_weights(24, 16))),
        *(Sample(f"ffn_up_{n}", (Arg((1, s, 5120)), *_weights(13824, 5120)), big=True) for n, s in STAGES.items()),
        Sample("text", (Arg((1, 512, 4096)), *_weights(5120, 4096)), big=True),
    ]


@op(dims="..., o i, o? -> ...", kind="fused", samples=_linear_gelu_samples)
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``gelu(linear(x, weight, bias))``, tanh form. A kernel may keep the product unrounded before the GELU."""
    return gelu(linear(x, weight, bias))


def _qkv_samples() -> list[Sample]:
    def case(
        name: str,
        s: int,
        d: int,
        big: bool = False,
        bias: bool = True,
        batch: int = 1,
        fill: Fill = "normal",
        scale: float = 1.0,
    ) -> Sample:
        weight, b = _weights(d, d, bias)
        return Sample(name, (Arg((batch, s, d), fill, scale=scale), weight, weight, weight, b, b, b), big=big)

    small = [
        case("small", 5, 24),
        case("batch", 5, 24, batch=2),
        case("nobias", 5, 24, bias=False),
        case("odd", 7, 33),
        case("outliers", 9, 183, fill="outliers"),
        case("huge", 7, 33, scale=HUGE),
        case("long", LONG, 16),
    ]
    return [*small, *(case(n, s, 5120, True) for n, s in STAGES.items())]


@op(dims="..., o i, p i, r i, o?, p?, r? -> ..., ..., ...", kind="fused", samples=_qkv_samples)
def qkv_linear(
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    bq: Tensor | None = None,
    bk: Tensor | None = None,
    bv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three linears of one input; a kernel holds the three weights as one matrix."""
    return linear(x, wq, bq), linear(x, wk, bk), linear(x, wv, bv)
