"""Positions, orders and movements that are almost right."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_conformance.mutants.mutant import FP32, Mutant, of_family
from helios_conformance.mutants.products import truncated

__all__ = ["MUTANTS"]


def _narrow_table(right: Any, x: Tensor, table: Tensor) -> Any:
    return right(x, table.bfloat16().to(table.dtype))


def _halves(right: Any, x: Tensor, table: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    cos, sin = table.float()[:, None].unbind(-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


def _backwards(right: Any, x: Tensor, table: Tensor) -> Any:
    return right(x, table * table.new_tensor([1.0, -1.0]))


def _rows_for_columns(right: Any, x: Tensor, table: Tensor) -> Any:
    """Pairs of time, rows and columns, as (44, 42, 42) of 128 channels."""
    third = table.shape[1] // 3
    rest = table.shape[1] - 2 * third
    return right(x, torch.cat((table[:, :rest], table[:, rest + third :], table[:, rest : rest + third]), 1))


def _second_rank_late(right: Any, x: Tensor, table: Tensor) -> Any:
    """The second half of the sequence, which another rank would hold, takes the positions one before."""
    half = (table.shape[0] + 1) // 2
    return right(x, torch.cat((table[:half], table[half - 1 : -1])))


def _tail_from_start(right: Any, q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, table: Tensor, **attrs: Any) -> Any:
    """Queries of the last tokens take the positions of the first."""
    n = q.shape[1]
    first = right(q, k[:, :n], wq, wk, table[:n], **attrs)[0]
    return first, right(q, k, wq, wk, table, **attrs)[1]


def _reversed_lists(right: Any, xs: list[Tensor], *, dim: int) -> Any:
    return right(list(reversed(xs)), dim=dim)


def _transposed_patch(right: Any, x: Tensor, *, grid: Any, patch: Any) -> Tensor:
    (t, h, w), (pt, ph, pw) = grid, patch
    cells = x.reshape(x.shape[0], t, h, w, pt, pw, ph, -1).permute(0, 7, 1, 4, 2, 6, 3, 5)
    return cells.reshape(x.shape[0], -1, t * pt, h * ph, w * pw)


def _whole_steps(right: Any, t: Tensor, **attrs: Any) -> Any:
    return right(t.long().to(t.dtype), **attrs)


def _narrow_steps(right: Any, t: Tensor, **attrs: Any) -> Any:
    return right(t.bfloat16().to(t.dtype), **attrs)


def _sine_first(right: Any, t: Tensor, **attrs: Any) -> Tensor:
    cos, sin = right(t, **attrs).chunk(2, -1)
    return torch.cat((sin, cos), -1)


def _by_last(right: Any, t: Tensor, *, dim: int, period: float = 10000.0) -> Tensor:
    """Frequencies to period^-1 itself: divided by half - 1."""
    half = dim // 2
    powers = -torch.arange(half, dtype=t.dtype, device=t.device) / (half - 1)
    angle = t[:, None] * period**powers
    return torch.cat((torch.cos(angle), torch.sin(angle)), -1)


def _zeros_for_border(right: Any, x: Tensor, *, multiple: Any) -> Tensor:
    t, h, w = (-size % m for size, m in zip(x.shape[2:], multiple, strict=True))
    return F.pad(x, (0, w, 0, h, 0, t))


def _cut(right: Any, x: Tensor, *, dtype: torch.dtype) -> Any:
    return truncated(x, dtype) if x.element_size() > dtype.itemsize else right(x, dtype=dtype)


def _late_start(right: Any, x: Tensor, *, dim: int, start: int, length: int) -> Any:
    """A start is rounded down to a multiple of 4, as a vector load likes it."""
    return right(x, dim=dim, start=start // 4 * 4, length=length)


def _split_plus_one(right: Any, k: Tensor, logit: Tensor, *, split: int, **attrs: Any) -> Any:
    return right(k, logit, split=min(split + 1, k.shape[1]), **attrs)


def _first_logit(right: Any, k: Tensor, logit: Tensor, **attrs: Any) -> Any:
    return right(k, logit[:1], **attrs)


def _channels_by_head(right: Any, x: Tensor, *, heads: int) -> Tensor:
    return x.reshape(*x.shape[:-1], -1, heads).transpose(-1, -2).contiguous()


def _halves_in_turn(right: Any, x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return torch.cat((first, second), 2)


def _first_frames(right: Any, x: Tensor, *, count: int) -> Any:
    return x[:, :, :count].clone()


def _pad_behind(right: Any, x: Tensor, *, before: Any = (0, 0, 0), after: Any = (0, 0, 0)) -> Any:
    """Frames are padded half in front and half behind, as a convolution that is not causal would."""
    front = before[0] // 2
    return right(x, before=(before[0] - front, *before[1:]), after=(after[0] + front, *after[1:]))


def _half_pixel(right: Any, x: Tensor) -> Any:
    return right(x).roll(1, -1)


def _smooth(right: Any, x: Tensor) -> Any:
    b, c, t, h, w = x.shape
    frames = F.interpolate(x.float().reshape(b * c, t, h, w), scale_factor=(2, 2), mode="bilinear")
    return frames.reshape(b, c, t, 2 * h, 2 * w).to(x.dtype)


_mutant = of_family("positions")


MUTANTS: tuple[Mutant, ...] = (
    _mutant("rope_bfloat16_table", "The RoPE table is held in bfloat16.", _narrow_table, "rope"),
    _mutant("rope_halves", "RoPE turns halves of a head, not neighbouring channels.", _halves, "rope"),
    _mutant("rope_backwards", "RoPE turns the other way.", _backwards, "rope"),
    _mutant("rope_rows_for_columns", "RoPE takes rows for columns.", _rows_for_columns, "rope"),
    _mutant(
        "rope_second_rank_late", "The second half of the sequence takes positions one late.", _second_rank_late, "rope"
    ),
    _mutant(
        "rope_tail_from_start",
        "Queries of the last tokens take positions of the first.",
        _tail_from_start,
        "qk_norm_rope",
    ),
    _mutant("history_reversed", "Lists are joined in reverse: short history first.", _reversed_lists, "concat"),
    _mutant(
        "unpatchify_transposed",
        "Tokens go back to pixels with rows and columns swapped.",
        _transposed_patch,
        "unpatchify",
    ),
    _mutant("timestep_whole", "Timesteps are cast to whole numbers.", _whole_steps, "timestep_embedding"),
    _mutant("timestep_bfloat16", "Timesteps are rounded to bfloat16.", _narrow_steps, "timestep_embedding"),
    _mutant("timestep_sine_first", "The timestep's sines come before its cosines.", _sine_first, "timestep_embedding"),
    _mutant(
        "timestep_frequencies", "The timestep's frequencies are spaced by half - 1.", _by_last, "timestep_embedding"
    ),
    _mutant("border_zero", "History is padded by zeros, not by its border.", _zeros_for_border, "pad_replicate"),
    _mutant("cast_truncates", "Casts to bfloat16 leave bits out.", _cut, "cast", precisions=FP32),
    _mutant("narrow_aligned", "Views begin at a multiple of 4.", _late_start, "narrow"),
    _mutant("history_keys_late", "The first noisy key is amplified as history.", _split_plus_one, "scale_history_keys"),
    _mutant("history_keys_one_head", "All heads amplify as the first.", _first_logit, "scale_history_keys"),
    _mutant("heads_interleaved", "Channels are dealt to heads in turn.", _channels_by_head, "split_heads"),
    _mutant(
        "frames_not_interleaved",
        "New frames are put behind the others, not between.",
        _halves_in_turn,
        "interleave_frames",
    ),
    _mutant("cache_first_frames", "The first frames are cached, not the last.", _first_frames, "last_frames"),
    _mutant("conv_not_causal", "Frames are padded on both sides.", _pad_behind, "pad_zero"),
    _mutant(
        "upsample_half_pixel",
        "Nearest upsampling is off by half a pixel.",
        _half_pixel,
        "upsample_nearest",
        "upsample_nearest2",
    ),
    _mutant("upsample_smooth", "Upsampling interpolates.", _smooth, "upsample_nearest", "upsample_nearest2"),
)
