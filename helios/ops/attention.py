"""Softmax attention without a mask: Helios attends in both directions, padding of the text included."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from helios.op import Arg, ErrorCase, Sample, multiplicands, op
from helios.ops.pointwise import HUGE, LONG

__all__ = ["attention"]


def _attention_samples() -> list[Sample]:
    def case(name: str, b: int, s: int, t: int, h: int, d: int, big: bool = False, scale: float = 1.0) -> Sample:
        return Sample(
            name, (Arg((b, s, h, d), scale=scale), Arg((b, t, h, d), scale=scale), Arg((b, t, h, d))), big=big
        )

    far = Arg(
        (1, 65, 2, 64), offset=4.0
    )  # scores around 128: their exponentials overflow unless a maximum is taken off
    return [
        case("small", 2, 5, 5, 2, 12),
        case("cross", 2, 7, 3, 2, 8),
        case("odd", 1, 17, 33, 3, 6),
        case("peaked", 1, 33, 65, 2, 64, scale=3.0),
        case("head128", 1, 130, 257, 2, 128),
        Sample("scaled", (Arg((2, 7, 2, 16)), Arg((2, 9, 2, 16)), Arg((2, 9, 2, 16))), {"scale": 0.5}),
        Sample("huge", (Arg((1, 17, 2, 16)), Arg((1, 33, 2, 16)), Arg((1, 33, 2, 16), scale=HUGE))),
        Sample("far", (far, far, Arg((1, 65, 2, 64)))),
        Sample(
            "outliers",
            (
                Arg((1, 33, 2, 64), "outliers", scale=0.3),
                Arg((1, 65, 2, 64), "outliers", scale=0.3),
                Arg((1, 65, 2, 64), "outliers"),
            ),
        ),
        case("long", 1, LONG, 65, 1, 64),
        case("long_keys", 1, 65, LONG, 1, 64),
        case("stage0", 1, 2940, 2940, 40, 128, True),
        case("stage1", 1, 4560, 4560, 40, 128, True),
        case("stage2", 1, 11040, 11040, 40, 128, True),
        case("last_block", 1, 8640, 11040, 40, 128, True),
        case("text", 1, 8640, 512, 40, 128, True),
    ]


def _attention_errors() -> list[ErrorCase]:
    q = Arg((1, 5, 2, 12))
    return [
        ErrorCase("heads", (q, Arg((1, 5, 3, 12)), Arg((1, 5, 3, 12))), {}, "'h' is 3"),
        ErrorCase("keys", (q, Arg((1, 5, 2, 12)), Arg((1, 6, 2, 12))), {}, "'t' is 6"),
    ]


@op(dims="b s h d, b t h d, b t h d -> b s h d", kind="reduce", samples=_attention_samples, errors=_attention_errors)
def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """``softmax(q kᵀ · scale) v`` of each head, over all keys.

    Args:
        q: queries ``[b, s, h, d]``.
        k, v: keys and values ``[b, t, h, d]``.
        scale: of the scores; ``None`` for ``d^-½``.

    Returns:
        ``[b, s, h, d]`` in the dtype of q. Scores, softmax and both products accumulate in at least float32;
        probabilities may be rounded to the dtype of v before the second product.
    """
    queries, keys, values = (x.transpose(1, 2) for x in multiplicands(q, k, v))  # type: ignore[union-attr]
    if queries.dtype == q.dtype:
        return F.scaled_dot_product_attention(queries, keys, values, scale=scale).transpose(1, 2)
    # Probabilities rounded to v's dtype, as torch rounds them in bfloat16: what a kernel may do, the reference shows.
    scores = queries @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    probabilities = scores.softmax(-1).to(v.dtype).to(values.dtype)
    return (probabilities @ values).transpose(1, 2).to(q.dtype)
