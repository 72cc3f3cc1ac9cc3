"""Rotary position embedding over time, rows and columns, in interleaved pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.errors import OpError
from helios.op import Arg, ErrorCase, Sample, accumulator, op
from helios.ops.layout import narrow, split_heads
from helios.ops.norm import TOKENS, rms_norm
from helios.ops.pointwise import LONG

__all__ = ["qk_norm_rope", "rope", "rope_table"]

F32 = torch.float32


def _table_samples() -> list[Sample]:
    def case(name: str, frames: tuple[int, ...], h: int, w: int, pool: tuple[int, int, int], **kw: object) -> Sample:
        attrs = {
            "frames": frames,
            "height": h,
            "width": w,
            "dims": (44, 42, 42),
            "theta": 1e4,
            "pool": pool,
            "dtype": F32,
        }
        return Sample(name, (), attrs | kw)

    return [
        case("noisy", (20, 21), 3, 5, (1, 1, 1)),
        case("mid", (17, 18), 4, 6, (2, 2, 2)),
        case("padded", (1, 2, 3), 5, 7, (2, 2, 2), dims=(4, 4, 4)),
        case("long", tuple(range(1, 17)), 24, 40, (4, 4, 4)),
    ]


def _table_errors() -> list[ErrorCase]:
    attrs = {"frames": (0,), "height": 1, "width": 1, "dims": (3, 4, 4), "theta": 1e4, "pool": (1, 1, 1), "dtype": F32}
    return [ErrorCase("odd", (), attrs, "even")]


@op(dims="-> s p 2", kind="round", samples=_table_samples, errors=_table_errors)
def rope_table(
    *,
    frames: tuple[int, ...],
    height: int,
    width: int,
    dims: tuple[int, int, int],
    theta: float,
    pool: tuple[int, int, int] = (1, 1, 1),
    dtype: torch.dtype,
) -> Tensor:
    """cos and sin of each token's rotation angles.

    Position (t, y, x) turns pair i of the first ``dims[0]`` channels by ``t·theta^(−2i/dims[0])``, of the next
    ``dims[1]`` by y, of the last ``dims[2]`` by x likewise. For pooled history the table is made on the fine grid,
    padded by repeating its border to multiples of ``pool``, and its **values** are averaged over each pool cell.

    Args:
        frames: time index of each frame.
        height, width: token grid before pooling.
        dims: channels for time, rows and columns, each even.
        theta: base of the frequencies.
        pool: cell of the average over (frames, rows, columns).
        dtype: of the table. Angles, cosines and averages are computed in float64 and rounded once.

    Returns:
        ``[s, sum(dims)/2, 2]`` with s tokens in (frame, row, column) order; last dimension cos, sin.
    """
    if any(d % 2 for d in dims):
        raise OpError(f"rope_table: dims {list(dims)} must be even")
    axes = (torch.tensor(frames), torch.arange(height), torch.arange(width))
    grid = torch.meshgrid(*(a.to(torch.float64) for a in axes), indexing="ij")
    angles = [
        pos[..., None] * theta ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
        for pos, d in zip(grid, dims, strict=True)
    ]
    angle = torch.cat(angles, dim=-1)
    table = torch.stack((torch.cos(angle), torch.sin(angle)), dim=-1)
    return _pool(table, pool).flatten(0, 2).to(dtype)


def _pool(table: Tensor, pool: tuple[int, int, int]) -> Tensor:
    t, h, w = table.shape[:3]
    flat = table.flatten(3).permute(3, 0, 1, 2)[None]
    missing = [-n % p for n, p in zip((t, h, w), pool, strict=True)]
    if any(missing):
        flat = F.pad(flat, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")
    pooled: Tensor = F.avg_pool3d(flat, pool)
    return pooled[0].permute(1, 2, 3, 0).reshape(*pooled.shape[2:], *table.shape[3:])


def _rope_inputs(b: int, s: int, h: int, d: int) -> tuple[Arg, Arg]:
    return Arg((b, s, h, d)), Arg((s, d // 2, 2), "table", dtype=F32)


def _rope_samples() -> list[Sample]:
    big = [Sample(n, _rope_inputs(1, s, 40, 128), big=True) for n, (s, _) in TOKENS.items()]
    small = [Sample("small", _rope_inputs(2, 5, 2, 12)), Sample("odd", _rope_inputs(1, 7, 3, 6))]
    return [*small, Sample("long", _rope_inputs(1, LONG, 2, 8)), *big]


def _rope_errors() -> list[ErrorCase]:
    return [ErrorCase("pairs", (Arg((1, 5, 2, 12)), Arg((5, 5, 2))), {}, "6 pairs")]


@op(dims="b s h d, s p 2 -> b s h d", kind="round", samples=_rope_samples, errors=_rope_errors)
def rope(x: Tensor, table: Tensor) -> Tensor:
    """Turn channel pairs (2i, 2i+1) of each head: ``(a·cos − b·sin, a·sin + b·cos)``.

    Args:
        x: ``[b, s, h, d]``.
        table: cos and sin ``[s, d/2, 2]``, float32 in a published run.

    Returns:
        ``[b, s, h, d]`` in the dtype of x; computed in at least float32, rounded once.
    """
    if table.shape[1] * 2 != x.shape[-1]:
        raise OpError(f"rope: head size {x.shape[-1]} has {x.shape[-1] // 2} pairs, the table {table.shape[1]}")
    acc = accumulator(x.dtype)
    a, b = x.to(acc).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.to(acc)[:, None].unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def _qk_samples() -> list[Sample]:
    def case(
        name: str, rows: int, s: int, h: int, d: int, fill: str = "normal", big: bool = False, b: int = 1
    ) -> Sample:
        q, k = (Arg((b, n, h * d), fill) for n in (rows, s))  # type: ignore[arg-type]
        w = Arg((h * d,), offset=1.0, scale=0.1)
        return Sample(name, (q, k, w, w, Arg((s, d // 2, 2), "table", dtype=F32)), {"heads": h}, big)

    ones, flat = Arg((1, 65, 256), offset=1.0, scale=0.0), Arg((256,), offset=1.0, scale=0.0)
    return [
        case("small", 5, 5, 2, 12),
        case("batch", 5, 5, 2, 12, b=2),
        case("tail", 3, 7, 2, 12),
        case("tiny", 9, 9, 3, 6, "tiny"),
        case("flat", 9, 9, 2, 12, "flat"),
        case("outliers", 17, 17, 12, 128, "outliers"),
        case("long", LONG, LONG, 2, 8),
        # What is turned is exact in every dtype, so that nothing hides the table's own rounding.
        Sample("ones", (ones, ones, flat, flat, Arg((65, 64, 2), "table", dtype=F32)), {"heads": 2}),
        *(case(n, s, s, 40, 128, "outliers", True) for n, (s, _) in TOKENS.items()),
        case("last_block", 8640, 11040, 40, 128, "outliers", True),
    ]


def _qk_errors() -> list[ErrorCase]:
    w = Arg((24,))
    return [ErrorCase("longer", (Arg((1, 6, 24)), Arg((1, 5, 24)), w, w, Arg((5, 6, 2))), {"heads": 2}, "6 queries")]


@op(dims="b n d, b s d, d, d, s p 2 -> b n h e, b s h e", kind="fused", samples=_qk_samples, errors=_qk_errors)
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor, *, heads: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """RMSNorm over all heads together, head split and RoPE, of queries and keys in one pass.

    Args:
        q: ``[b, n, heads·e]``, n ≤ s: the queries of the last n tokens.
        k: ``[b, s, heads·e]``.
        q_weight, k_weight: ``[heads·e]``.
        table: ``[s, e/2, 2]``, see ``rope_table``.
    """
    n, s = q.shape[1], k.shape[1]
    if n > s:
        raise OpError(f"qk_norm_rope: {n} queries, but only {s} keys")
    qn = rms_norm(q, q_weight, eps=eps)
    kn = rms_norm(k, k_weight, eps=eps)
    qh = split_heads(qn, heads=heads)
    kh = split_heads(kn, heads=heads)
    return rope(qh, table if n == s else narrow(table, dim=0, start=s - n, length=n)), rope(kh, table)
