"""How far right and wrong arithmetic lie from the bounds of the error budget, on the suite's own samples.

Usage: ``python tools/budget_margins.py``. A row is a way of computing one op; its numbers are statistic / bound: the
largest of several draws for a right way, and those of the draw that shows it least for a wrong one. A right way stays
below 1 everywhere, a wrong one is above 1 somewhere. ``tests/conformance/test_budget.py`` holds both.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios_conformance import budget, references, suite, terms
from helios_conformance.checks.op_values import inputs
from helios_conformance.draws import Root
from helios_conformance.one_node import outputs_of, run_body, widened

BF16, F32 = torch.bfloat16, torch.float32
STATISTICS = ("norm", "worst", "gain", "misrounded")
SEEDS = 8

Compute = Callable[..., Any]
"""Takes the operands and attributes as the op does."""


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """A way of computing a case: right or wrong."""

    name: str
    case: str
    compute: Compute
    right: bool = False


def margins(way: Way, seeds: int = SEEDS) -> dict[str, float]:
    """Statistic / bound: the largest of a right way; of a wrong one those of the draw that shows it least."""
    drawn = [_margin(way, Root(1000 + seed)) for seed in range(seeds)]
    if not way.right:
        return min(drawn, key=lambda row: max(row.values()))
    return {name: max(row[name] for row in drawn) for name in STATISTICS}


def _margin(way: Way, root: Root) -> dict[str, float]:
    case = suite.find(way.case)
    given = inputs(case, root)
    attrs = dict(given.record.attrs) | dict(given.attrs)
    came = outputs_of(way.compute(*given.tensors, **attrs))
    oracle = run_body(given.record, *widened(given.tensors, attrs))
    k = terms.of_tensors(given.record, given.tensors, attrs)
    found = dict.fromkeys(STATISTICS, 0.0)
    for name, y in came.items():
        errors = budget.measure(y, oracle[name])
        reference = references.committed().get(case.id, name)
        shared = terms.factors(given.record, given.tensors)
        allowed = budget.allowed(given.record.kind, y.dtype, k, oracle[name], reference, shared)
        for part in STATISTICS:
            bound = getattr(allowed, part)
            ratio = 0.0 if part == "misrounded" and bound >= 1.0 else abs(getattr(errors, part)) / bound
            found[part] = max(found[part], ratio)
    return found


def truncated(wide: Tensor) -> Tensor:
    """float32 to bfloat16 by dropping bits."""
    return (wide.contiguous().view(torch.int32) & -65536).view(F32).to(BF16)


def tf32(x: Tensor) -> Tensor:
    """Rounded to the eleven digits of a TF32 operand."""
    return ((x.contiguous().view(torch.int32) + 4096) & -8192).view(F32)


def _body(name: str) -> Compute:
    compute: Compute = op.get(name).fn
    return compute


def _truncating(name: str) -> Compute:
    def compute(*xs: Any, **attrs: Any) -> Any:
        wide = [x.float() if isinstance(x, Tensor) else x for x in xs]
        return {k: truncated(t) for k, t in outputs_of(_body(name)(*wide, **attrs)).items()}.values()

    return lambda *xs, **attrs: tuple(compute(*xs, **attrs))


def _with(name: str, **changed: Any) -> Compute:
    return lambda *xs, **attrs: _body(name)(*xs, **(attrs | changed))


def _erf_gelu(x: Tensor) -> Tensor:
    return F.gelu(x.float()).to(x.dtype)


def _erf_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _erf_gelu(F.linear(x, weight, bias))


def _unrounded_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return F.gelu(wide, approximate="tanh").to(x.dtype)


def _drop_key(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
    out: Tensor = _body("attention")(q, k[:, :-1], v[:, :-1], scale=scale)
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, block: int = 64) -> Tensor:
    """Blocks of keys, running maximum, exp2 of scaled scores, probabilities rounded before the second product."""
    factor = (q.shape[-1] ** -0.5 if scale is None else scale) * math.log2(math.e)
    qh, kh, vh = (x.transpose(1, 2).float() for x in (q, k, v))
    top = torch.full((*qh.shape[:3], 1), -math.inf)
    total, out = torch.zeros_like(top), torch.zeros_like(qh)
    for at in range(0, kh.shape[2], block):
        scores = qh @ kh[:, :, at : at + block].transpose(-1, -2) * factor
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        p, shrink = torch.exp2(scores - higher), torch.exp2(top - higher)
        total = total * shrink + p.sum(-1, keepdim=True)
        out = out * shrink + p.to(v.dtype).float() @ vh[:, :, at : at + block]
        top = higher
    return (out / total).to(q.dtype).transpose(1, 2)


def _low_scores(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
    """Scores rounded to the dtype before the softmax."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    scores = (qh.float() @ kh.float().transpose(-1, -2) * factor).to(q.dtype).float()
    return (torch.softmax(scores, -1) @ vh.float()).to(q.dtype).transpose(1, 2)


def _linear_by(parts: int, rounded: torch.dtype) -> Compute:
    """The sum in that many pieces, each rounded before they are added."""

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        xs, ws = (t.float().chunk(parts, dim=-1) for t in (x, weight))
        total = torch.zeros(*x.shape[:-1], weight.shape[0])
        for a, b in zip(xs, ws, strict=True):
            total = total + F.linear(a, b).to(rounded).float()
        return (total if bias is None else total + bias.float()).to(x.dtype)

    return compute


def _low_accumulator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One term after the other, the running sum rounded to the dtype each time."""
    total = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
    for i in range(x.shape[-1]):
        total = (total.float() + x[..., i : i + 1].float() * weight[:, i].float()).to(x.dtype)
    return total if bias is None else (total.float() + bias.float()).to(x.dtype)


def _one_after_the_other(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same, accumulated in float32: slow and right."""
    total = torch.zeros(*x.shape[:-1], weight.shape[0])
    for i in range(x.shape[-1]):
        total = total + x[..., i : i + 1].float() * weight[:, i].float()
    return (total if bias is None else total + bias.float()).to(x.dtype)


def _tf32_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(tf32(x), tf32(weight), bias)


def _tf32_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
    out: Tensor = _body("attention")(tf32(q), tf32(k), tf32(v), scale=scale)
    return out


def _low_table(name: str) -> Compute:
    return lambda *xs, **attrs: _body(name)(*xs[:-1], xs[-1].to(BF16), **attrs)


def _rms_norm_twice_rounded(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _layer_norm_by_squares(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, dtype: torch.dtype | None
) -> Tensor:
    """Variance as E[x²] − E[x]²: one pass over the row."""
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    out = (wide - mean) * torch.rsqrt(wide.square().mean(-1, keepdim=True) - mean.square() + eps)
    return (out if weight is None or bias is None else out * weight.float() + bias.float()).to(dtype or x.dtype)


def _exp2_silu(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide / (1.0 + torch.exp2(-wide * math.log2(math.e)))).to(x.dtype)


def ways() -> Iterator[Way]:
    """All of them, right ones first."""
    for case in ("peaked", "head128", "odd", "long_keys"):
        yield Way("flash, probabilities in the dtype", f"attention[bf16,{case}]", _flash, True)
        yield Way("flash, exp2", f"attention[fp32,{case}]", _flash, True)
    for case in ("odd", "wide", "outliers"):
        yield Way("one term after the other", f"linear[fp32,{case}]", _one_after_the_other, True)
        yield Way("one term after the other, float32 sum", f"linear[bf16,{case}]", _one_after_the_other, True)
        yield Way("split K, float32 pieces", f"linear[bf16,{case}]", _linear_by(4, F32), True)
    for p in ("bf16", "fp32"):
        yield Way("product unrounded before the GELU", f"linear_gelu[{p},long]", _unrounded_linear_gelu, True)
        yield Way("sigmoid by exp2", f"silu[{p},wide]", _exp2_silu, True)
        yield Way("variance by squares", f"layer_norm[{p},outliers]", _layer_norm_by_squares, True)
    for case in (
        "gelu[bf16,wide]",
        "linear[bf16,wide]",
        "rms_norm[bf16,outliers]",
        "add[bf16,long]",
        "rope[bf16,long]",
    ):
        yield Way("truncation for rounding", case, _truncating(case.partition("[")[0]))
    for case in ("attention[bf16,head128]", "conv3d[bf16,causal]", "adaln[bf16,long]", "qk_norm_rope[bf16,outliers]"):
        yield Way("truncation for rounding", case, _truncating(case.partition("[")[0]))
    yield Way("erf for tanh in GELU", "gelu[fp32,wide]", _erf_gelu)
    yield Way("erf for tanh in GELU", "linear_gelu[fp32,small]", _erf_linear_gelu)
    for name in ("rms_norm", "layer_norm", "adaln", "gated_add_adaln", "qk_norm_rope"):
        for p in ("bf16", "fp32"):
            yield Way("eps 1e-5 for 1e-6", f"{name}[{p},tiny]", _with(name, eps=1e-5))
    yield Way("eps 1e-6 for 1e-12", "channel_norm[bf16,vanishing]", _with("channel_norm", eps=1e-6))
    yield Way("eps 1e-6 for 1e-8", "cfg_zero_star[bf16,faint]", _with("cfg_zero_star", eps=1e-6))
    for p, case in (("bf16", "head128"), ("fp32", "head128"), ("bf16", "long_keys")):
        yield Way("one key dropped", f"attention[{p},{case}]", _drop_key)
    yield Way("scores in bfloat16", "attention[bf16,peaked]", _low_scores)
    yield Way("RoPE table in bfloat16", "rope[bf16,long]", _low_table("rope"))
    yield Way("RoPE table in bfloat16", "qk_norm_rope[bf16,ones]", _low_table("qk_norm_rope"))
    for case in ("odd", "wide", "outliers"):
        yield Way("sum in bfloat16", f"linear[bf16,{case}]", _low_accumulator)
        yield Way("split K, two pieces in bfloat16", f"linear[bf16,{case}]", _linear_by(2, BF16))
        yield Way("split K, eight pieces in bfloat16", f"linear[bf16,{case}]", _linear_by(8, BF16))
        yield Way("TF32 operands", f"linear[fp32,{case}]", _tf32_linear)
    yield Way("TF32 operands", "attention[fp32,head128]", _tf32_attention)
    yield Way("norm rounded before its weight", "rms_norm[bf16,outliers]", _rms_norm_twice_rounded)


def main() -> int:
    """Print the table; 1 if a way is on the wrong side."""
    torch.set_num_threads(1)
    wrong = 0
    print("| way | case | norm | worst | gain | misrounded |\n| --- | --- | --- | --- | --- | --- |")
    for way in ways():
        row = margins(way)
        held = all(x <= 1.0 for x in row.values()) == way.right
        wrong += not held
        numbers = " | ".join(f"{row[name]:.2f}" for name in STATISTICS)
        print(
            f"| {'' if way.right else '**'}{way.name}{'' if way.right else '**'} | {way.case} | {numbers} |"
            + " ←" * (not held)
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
