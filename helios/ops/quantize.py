"""Quantised products: e4m3 numbers with one float32 scale a row, multiplied with sums in at least float32.

A row is the last dimension: of an activation a token, of a weight an output channel, of queries, keys and values a
token of a head. Its largest element becomes 448, the largest finite e4m3 number, so nothing overflows and no scale has
to be known beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helios.errors import OpError
from helios.op import Arg, ErrorCase, Fill, Sample, accumulator, op
from helios.ops.linear import STAGES, linear
from helios.ops.norm import _gated_adaln_samples, _modulate_inputs, adaln, gated_add_adaln, layer_norm
from helios.ops.pointwise import LONG, gelu

__all__ = [
    "adaln_quantize",
    "dequantize_rows",
    "gated_add_adaln_quantize",
    "gelu_quantize",
    "layer_norm_quantize",
    "packed_linear",
    "quantize_rows",
    "quantized_attention",
    "quantized_linear",
    "quantized_qkv_linear",
    "scaled_attention",
    "scaled_linear",
]

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest finite e4m3 number."""
SMALLEST = 1e-12
"""A row whose largest element is below this is taken for zero: its scale would leave float32's normal range."""
BF16 = {"dtype": torch.bfloat16}


def _rows_samples() -> list[Sample]:
    return [
        Sample("small", (Arg((2, 5, 24)),)),
        Sample("odd", (Arg((1, 7, 33), "outliers"),)),
        Sample("tiny", (Arg((1, 9, 64), "tiny"),)),
        Sample("flat", (Arg((1, 9, 64), "flat"),)),
        Sample("heads", (Arg((1, 9, 3, 16)),)),
        Sample("matrix", (Arg((48, 96), scale=0.1),)),
        Sample("long", (Arg((1, LONG, 16)),)),
        *(Sample(n, (Arg((1, s, 5120), "outliers"),), big=True) for n, s in STAGES.items()),
    ]


@op(dims="... -> ..., ...", kind="round", samples=_rows_samples)
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 numbers and the scale that their row is multiplied with: ``x ≈ q · scale``.

    Args:
        x: ``[..., k]``.

    Returns:
        q: ``[..., k]`` float8_e4m3fn, ``x · (1 / m · 448)`` rounded to nearest, m the row's largest absolute element.
            The reciprocal and both products are those of float32, each rounded once, whatever the dtype of x: which of
            two neighbours a number becomes where it lies between them is so defined to the bit.
        scale: ``[..., 1]``, m / 448, in at least float32. m is at least 1e-12, so a row of zeros has q = 0.
    """
    wide = x.to(accumulator(x.dtype))
    most = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    q = (wide.float() * (most.float().reciprocal() * LARGEST)).clamp(-LARGEST, LARGEST)
    return q.to(E4M3), most / LARGEST


def _quantised(*shape: int) -> tuple[Arg, Arg]:
    """Numbers and scales of a row-wise quantised tensor."""
    return Arg(shape, scale=80.0, dtype=E4M3), Arg((*shape[:-1], 1), "uniform", torch.float32, 0.02, 0.005)


def _dequantize_samples() -> list[Sample]:
    return [
        Sample("small", _quantised(2, 5, 24), BF16),
        Sample("odd", _quantised(7, 33), BF16),
        Sample("float32", _quantised(7, 33), {"dtype": torch.float32}),
        Sample("matrix", _quantised(640, 512), BF16),
        Sample("ffn_down", _quantised(5120, 13824), BF16, big=True),
    ]


@op(dims="..., ... -> ...", kind="round", samples=_dequantize_samples)
def dequantize_rows(x: Tensor, scale: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """``x · scale``, rounded once.

    Args:
        x: ``[..., k]`` float8_e4m3fn.
        scale: ``[..., 1]``.
        dtype: of the output; ``None`` for that of the scale.
    """
    return (x.to(scale.dtype) * scale).to(dtype or scale.dtype)


def _scaled_inputs(x: tuple[int, ...], out: int, bias: bool = True) -> tuple[Arg | None, ...]:
    return (*_quantised(*x), *_quantised(out, x[-1]), Arg((out,), scale=0.1, dtype=torch.bfloat16) if bias else None)


def _scaled_linear_samples() -> list[Sample]:
    return [
        Sample("small", _scaled_inputs((2, 5, 32), 48), BF16),
        Sample("nobias", _scaled_inputs((3, 32), 16, bias=False), BF16),
        Sample("odd", _scaled_inputs((1, 7, 33), 17), BF16),
        Sample("wide", _scaled_inputs((1, 65, 512), 640), BF16),
        Sample("long", _scaled_inputs((1, LONG, 16), 32), BF16),
        *(Sample(f"attn_{n}", _scaled_inputs((1, s, 5120), 5120), BF16, big=True) for n, s in STAGES.items()),
        *(Sample(f"ffn_up_{n}", _scaled_inputs((1, s, 5120), 13824), BF16, big=True) for n, s in STAGES.items()),
        *(Sample(f"ffn_down_{n}", _scaled_inputs((1, s, 13824), 5120), BF16, big=True) for n, s in STAGES.items()),
    ]


def _scaled_linear_errors() -> list[ErrorCase]:
    narrow, wide = _scaled_inputs((2, 5, 32), 48), _scaled_inputs((2, 5, 31), 48)
    return [
        ErrorCase("inner", (*narrow[:2], *wide[2:]), BF16, "scaled_linear: x"),
        ErrorCase("bias", (*narrow[:4], Arg((47,), dtype=torch.bfloat16)), BF16, "'o' is 47"),
    ]


@op(dims="..., ..., o i, o 1, o? -> ...", kind="reduce", samples=_scaled_linear_samples, errors=_scaled_linear_errors)
def scaled_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``(x · x_scale) @ (weight · weight_scale).T + bias`` of quantised operands.

    Args:
        x: ``[..., i]`` float8_e4m3fn.
        x_scale: ``[..., 1]``.
        weight: ``[o, i]`` float8_e4m3fn.
        weight_scale: ``[o, 1]``.
        bias: ``[o]``.
        dtype: of the output; ``None`` for that of the scales.

    Returns:
        ``[..., o]``; products of e4m3 numbers accumulate in at least float32; then scales and bias, rounded once.
    """
    if x.shape[-1] != weight.shape[1]:
        raise OpError(
            f"scaled_linear: x {list(x.shape)} ends in {x.shape[-1]}, weight {list(weight.shape)} takes "
            f"{weight.shape[1]}"
        )
    acc = x_scale.dtype
    out = (x.to(acc) @ weight.to(acc).T) * x_scale * weight_scale[:, 0]
    return (out if bias is None else out + bias.to(acc)).to(dtype or acc)


def _scaled_attention_samples() -> list[Sample]:
    def case(name: str, b: int, s: int, t: int, h: int, d: int, big: bool = False) -> Sample:
        return Sample(name, (*_quantised(b, s, h, d), *_quantised(b, t, h, d), *_quantised(b, t, h, d)), BF16, big)

    return [
        case("small", 2, 5, 5, 2, 16),
        case("odd", 1, 17, 33, 3, 6),
        case("head128", 1, 130, 257, 2, 128),
        case("long_keys", 1, 65, LONG, 1, 64),
        case("stage0", 1, 2940, 2940, 40, 128, True),
        case("stage1", 1, 4560, 4560, 40, 128, True),
        case("stage2", 1, 11040, 11040, 40, 128, True),
    ]


@op(
    dims="b s h d, b s h 1, b t h d, b t h 1, b t h d, b t h 1 -> b s h d",
    kind="reduce",
    samples=_scaled_attention_samples,
)
def scaled_attention(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``attention`` of quantised operands; the second product is one of e4m3 numbers, too.

    Args:
        q, q_scale: queries ``[b, s, h, d]`` float8_e4m3fn and ``[b, s, h, 1]``.
        k, k_scale, v, v_scale: keys and values, the same with t tokens.
        scale: of the scores; ``None`` for ``d^-½``.
        dtype: of the output; ``None`` for that of the scales.

    Returns:
        ``[b, s, h, d]``. Scores, softmax and sums accumulate in at least float32. A probability is multiplied with the
        scale of its value over the largest such scale, and may be rounded to e4m3 where the row's largest is 448; the
        sum of the probabilities is of unrounded ones.
    """
    acc = q_scale.dtype
    queries, keys, values = (x.to(acc).transpose(1, 2) for x in (q, k, v))
    factor = (q.shape[-1] ** -0.5 if scale is None else scale) * q_scale.transpose(1, 2)
    scores = (queries @ keys.transpose(-1, -2)) * factor * k_scale.permute(0, 2, 3, 1)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    total = weights.sum(-1, keepdim=True)
    sizes = v_scale.permute(0, 2, 3, 1)  # [b, h, 1, t]
    most = sizes.amax(-1, keepdim=True)
    weights = weights * (sizes / most)
    if acc != torch.float64:  # the oracle's are not rounded
        weights = (weights * LARGEST).to(E4M3).to(acc) / LARGEST
    return ((weights @ values) * (most / total)).transpose(1, 2).to(dtype or acc)


# Compositions: what a kernel may do in one pass. Their weights are in the working dtype and quantised at load.


def _quantized_linear_samples() -> list[Sample]:
    def case(name: str, x: tuple[int, ...], out: int, big: bool = False, bias: bool = True) -> Sample:
        weight, b = Arg((out, x[-1]), scale=x[-1] ** -0.5), Arg((out,), scale=0.1) if bias else None
        return Sample(name, (*_quantised(*x), weight, b), big=big)

    return [
        case("small", (2, 5, 32), 48),
        case("nobias", (3, 32), 16, bias=False),
        case("odd", (1, 7, 33), 17),
        case("stage2", (1, STAGES["stage2"], 5120), 5120, True),
    ]


@op(dims="..., ..., o i, o? -> ...", kind="fused", samples=_quantized_linear_samples)
def quantized_linear(x: Tensor, x_scale: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``scaled_linear`` with a weight that is quantised at load; in the dtype of the weight as it came."""
    return scaled_linear(x, x_scale, *quantize_rows(weight), bias, dtype=weight.dtype)


def _quantized_qkv_samples() -> list[Sample]:
    def case(name: str, s: int, d: int, big: bool = False, bias: bool = True) -> Sample:
        weight, b = Arg((d, d), scale=d**-0.5), Arg((d,), scale=0.1) if bias else None
        return Sample(name, (*_quantised(1, s, d), weight, weight, weight, b, b, b), big=big)

    return [
        case("small", 5, 32),
        case("nobias", 5, 32, bias=False),
        case("odd", 7, 33),
        case("stage2", STAGES["stage2"], 5120, True),
    ]


@op(dims="..., ..., o i, p i, r i, o?, p?, r? -> ..., ..., ...", kind="fused", samples=_quantized_qkv_samples)
def quantized_qkv_linear(
    x: Tensor,
    x_scale: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    bq: Tensor | None = None,
    bk: Tensor | None = None,
    bv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three ``quantized_linear`` of one input; a kernel holds the three weights as one matrix."""
    q = scaled_linear(x, x_scale, *quantize_rows(wq), bq, dtype=wq.dtype)
    k = scaled_linear(x, x_scale, *quantize_rows(wk), bk, dtype=wk.dtype)
    v = scaled_linear(x, x_scale, *quantize_rows(wv), bv, dtype=wv.dtype)
    return q, k, v


def _packed_samples() -> list[Sample]:
    def case(name: str, x: tuple[int, ...], out: int, big: bool = False, bias: bool = True) -> Sample:
        weight, b = Arg((out, x[-1]), scale=x[-1] ** -0.5), Arg((out,), scale=0.1) if bias else None
        return Sample(name, (Arg(x), weight, b), big=big)

    return [
        case("small", (2, 5, 24), 32),
        case("nobias", (3, 24), 8, bias=False),
        case("odd", (1, 7, 33), 17),
        case("stage2", (1, STAGES["stage2"], 5120), 5120, True),
    ]


@op(dims="..., o i, o? -> ...", kind="fused", samples=_packed_samples)
def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` with a weight that is held as e4m3 numbers and scales, and widened where it is used."""
    return linear(x, dequantize_rows(*quantize_rows(weight), dtype=weight.dtype), bias)


def _adaln_quantize_samples() -> list[Sample]:
    def case(name: str, s: int, d: int, split: int, fill: Fill = "normal", b: int = 1, big: bool = False) -> Sample:
        return Sample(name, _modulate_inputs(b, s, d, 2, fill), {"split": split}, big)

    return [
        case("small", 7, 24, 3, b=2),
        case("outliers", 17, 183, 9, "outliers"),
        case("flat", 9, 64, 4, "flat"),
        case("long", LONG, 16, 8190),
        case("stage2", STAGES["stage2"], 5120, 2400, big=True),
    ]


@op(dims="b s d, b r d, b r d -> b s d, b s 1", kind="fused", samples=_adaln_quantize_samples)
def adaln_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, *, split: int = 0, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``adaln``, quantised by rows: numbers and scales. A kernel may keep what it normalised unrounded."""
    q, s = quantize_rows(adaln.fn(x, scale, shift, split=split, eps=eps))
    return q, s


@op(
    dims="b s d, b n d, b q d?, b r d, b r d -> b s d, b s d, b s 1",
    kind="fused",
    samples=_gated_adaln_samples,
)
def gated_add_adaln_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    split: int = 0,
    gate_split: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """``gated_add_adaln`` with the second output quantised by rows: the sum, numbers and scales."""
    total, normed = gated_add_adaln.fn(x, y, gate, scale, shift, split=split, gate_split=gate_split, eps=eps)
    q, s = quantize_rows(normed)
    return total, q, s


def _norm_quantize_samples() -> list[Sample]:
    def case(name: str, s: int, d: int, fill: Fill = "normal", b: int = 1, big: bool = False) -> Sample:
        return Sample(name, (Arg((b, s, d), fill), Arg((d,), offset=1.0, scale=0.1), Arg((d,), scale=0.1)), big=big)

    return [
        case("small", 5, 24, b=2),
        case("outliers", 17, 183, "outliers"),
        case("long", LONG, 16),
        case("stage2", 8640, 5120, "outliers", big=True),
    ]


@op(dims="b s d, d?, d? -> b s d, b s 1", kind="fused", samples=_norm_quantize_samples)
def layer_norm_quantize(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``layer_norm``, quantised by rows: numbers and scales."""
    q, s = quantize_rows(layer_norm(x, weight, bias, eps=eps))
    return q, s


def _gelu_quantize_samples() -> list[Sample]:
    return [
        Sample("small", (Arg((2, 5, 24), scale=2.0),)),
        Sample("odd", (Arg((1, 7, 33), "outliers"),)),
        Sample("stage2", (Arg((1, STAGES["stage2"], 13824)),), big=True),
    ]


@op(dims="... -> ..., ...", kind="fused", samples=_gelu_quantize_samples)
def gelu_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """``gelu``, tanh form, quantised by rows: numbers and scales."""
    q, s = quantize_rows(gelu(x))
    return q, s


def _quantized_attention_samples() -> list[Sample]:
    def case(name: str, b: int, s: int, t: int, h: int, d: int, big: bool = False) -> Sample:
        return Sample(name, (Arg((b, s, h, d)), Arg((b, t, h, d)), Arg((b, t, h, d))), big=big)

    return [
        case("small", 2, 5, 5, 2, 16),
        case("odd", 1, 17, 33, 3, 6),
        case("head128", 1, 130, 257, 2, 128),
        case("long_keys", 1, 65, LONG, 1, 64),
        Sample("outliers", tuple(Arg((1, n, 2, 64), "outliers", scale=0.3) for n in (33, 65, 65))),
        case("stage2", 1, STAGES["stage2"], STAGES["stage2"], 40, 128, True),
    ]


@op(dims="b s h d, b t h d, b t h d -> b s h d", kind="fused", samples=_quantized_attention_samples)
def quantized_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """``scaled_attention`` of operands that are quantised by rows first, each token of each head by itself."""
    return scaled_attention(*quantize_rows(q), *quantize_rows(k), *quantize_rows(v), scale=scale, dtype=q.dtype)
