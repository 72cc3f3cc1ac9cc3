"""The oracle at chosen elements of a large output: a body on the operands that those elements need, and on no others.

The body stays the definition. What is here only gathers: the tokens, weight columns, heads or receptive fields on which
the chosen elements depend, as a smaller call of the same op. So a float64 copy is never made of more than that takes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helios import op
from helios_conformance.one_node import run_body, widened
from helios_conformance.selection import Layout, Selection, as_matrix

__all__ = ["RESTRICTED", "layout", "take"]

Attrs = Mapping[str, Any]
Operands = Sequence[Any]
Call = Callable[..., Tensor]
"""Runs the body on some operands and attributes and gives one output."""
Restricted = Callable[[Call, Operands, dict[str, Any], int, Tensor, Tensor], Tensor]
"""(call, operands, attributes, index of the output, rows, columns) -> ``[rows, columns]`` of that output's matrix."""


def take(
    record: op.Op[Any, Any], tensors: Operands, attrs: Attrs, name: str, chosen: Selection, *, wide: bool
) -> Tensor:
    """Chosen elements of one output.

    Args:
        record: of the op.
        tensors, attrs: its operands on the host and its attributes.
        name: of the output, ``o0``, ``o1`` …
        chosen: of the output seen through ``layout``.
        wide: in float64, the oracle; otherwise in the operands' dtypes, the reference.

    Returns:
        1-D, in the order of ``Selection.take``.
    """

    def call(*operands: Any, **kept: Any) -> Tensor:
        given = widened(operands, kept) if wide else (operands, kept)
        result = run_body(record, *given)[name]
        return result.double() if wide and result.is_floating_point() else result  # e4m3 stays what it is

    how = RESTRICTED.get(record.name)
    if chosen.rows is None or chosen.columns is None or how is None or not _applies(record.name, tensors):
        return chosen.take(as_matrix(call(*tensors, **attrs), layout(record.name, tensors, attrs, name)))
    return how(call, tensors, dict(attrs), int(name[1:]), chosen.rows, chosen.columns).reshape(-1)


def layout(name: str, tensors: Operands, attrs: Attrs, output: str) -> Layout:
    """How an output of an op is seen as a matrix: tokens or channels are rows; where segments begin; which columns are
    on the rim of an image. Operands are tensors or types: only shapes are read."""
    shapes: list[Any] = [None if x is None or isinstance(x, list | tuple) else tuple(x.shape) for x in tensors]
    if name in ("conv3d", "channel_norm", "channel_norm_silu"):
        return Layout(2, (), _rim(_video(name, shapes, attrs)))
    if name not in _TOKENS:
        return Layout()
    stem = shapes[1] if (name, output) == ("qk_norm_rope", "o1") else shapes[0]
    if name in _ROWWISE:
        return Layout(len(stem) - 1)
    b, s = stem[:2]
    if name in ("attention", "quantized_attention", "scaled_attention"):
        return Layout(3, tuple(i * s for i in range(b)), members=stem[2])
    inside = _splits(name, shapes, attrs, s)
    return Layout(2, tuple(sorted({i * s + at for i in range(b) for at in (0, *inside)})))


_ROWWISE = frozenset({
    *("dequantize_rows", "gelu_quantize", "linear", "linear_gelu", "packed_linear", "qkv_linear", "quantize_rows"),
    *("quantized_linear", "quantized_qkv_linear", "scaled_linear"),
})  # fmt: skip
_TOKENS = _ROWWISE | {
    *("adaln", "adaln_quantize", "attention", "gated_add", "gated_add_adaln", "gated_add_adaln_quantize"),
    *("layer_norm", "layer_norm_quantize", "modulate", "qk_norm_rope", "quantized_attention", "rms_norm", "rope"),
    *("scale_history_keys", "scaled_attention"),
}  # fmt: skip


def _splits(name: str, shapes: Sequence[Any], attrs: Attrs, s: int) -> list[int]:
    """Tokens at which another segment begins."""
    found = [attrs["split"]] if "split" in attrs else []
    if "gate_split" in attrs:
        tail = s - shapes[1][1]
        found += [tail, tail + attrs["gate_split"]]
    return [at for at in found if 0 < at < s]


def _video(name: str, shapes: Sequence[Any], attrs: Attrs) -> tuple[int, ...]:
    """Frames, rows and columns of a result."""
    size = shapes[0][2:]
    if name != "conv3d":
        return tuple(size)
    sides = zip(size, shapes[1][2:], attrs["stride"], attrs["padding"], strict=True)
    return tuple((n + 2 * pad - k) // step + 1 for n, k, step, pad in sides)


def _rim(video: tuple[int, ...]) -> tuple[int, ...]:
    """Positions of the corners of the first and last frames, and of the middles of their edges."""
    at = [sorted({0, n // 2, n - 1}) for n in video]
    _, h, w = video
    return tuple((t * h + y) * w + x for t, y, x in itertools.product((0, video[0] - 1), at[1], at[2]))


def _applies(name: str, tensors: Operands) -> bool:
    """An addition is restricted only where nothing is broadcast."""
    return name != "add" or tensors[0].shape == tensors[1].shape


def _by_video(rows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Rows of ``[b, size]`` as (video, rows within it); in order, as rows are sorted."""
    for b in (rows // size).unique().tolist():
        yield b, rows[rows // size == b] - b * size


def _below(rows: Tensor, border: int) -> int:
    return int((rows < border).sum())


def _elements(call: Call, xs: Operands, attrs: dict[str, Any], _: int, rows: Tensor, columns: Tensor) -> Tensor:
    return call(*(as_matrix(x)[rows][:, columns] for x in xs), **attrs)


def _linear(call: Call, xs: Operands, attrs: dict[str, Any], _: int, rows: Tensor, columns: Tensor) -> Tensor:
    x, weight, bias = xs
    return call(as_matrix(x)[rows], weight[columns], None if bias is None else bias[columns], **attrs)


def _packed_linear(call: Call, xs: Operands, attrs: dict[str, Any], _: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Of quantised operands: the scales of the chosen rows of both."""
    x, scale, weight, *rest = xs
    some = [None if w is None else w[columns] for w in (weight, *rest)]
    return call(as_matrix(x)[rows], as_matrix(scale)[rows], *some, **attrs)


def _packed_qkv(call: Call, xs: Operands, attrs: dict[str, Any], _: int, rows: Tensor, columns: Tensor) -> Tensor:
    some = [None if w is None else w[columns % w.shape[0]] for w in xs[2:]]
    return call(as_matrix(xs[0])[rows], as_matrix(xs[1])[rows], *some, **attrs)


def _whole_rows(call: Call, xs: Operands, attrs: dict[str, Any], _: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows by themselves, of every operand."""
    return call(*(as_matrix(x)[rows] for x in xs), **attrs)[:, columns]


def _qkv(call: Call, xs: Operands, attrs: dict[str, Any], _: int, rows: Tensor, columns: Tensor) -> Tensor:
    """The same columns of all three products; those of the others are not read."""
    some = [None if w is None else w[columns % w.shape[0]] for w in xs[1:]]
    return call(as_matrix(xs[0])[rows], *some, **attrs)


def _attention(call: Call, xs: Operands, attrs: dict[str, Any], _: int, rows: Tensor, columns: Tensor) -> Tensor:
    """The chosen queries of each head, one head at a time, so that only one head's scores exist."""
    pairs = len(xs) // 3  # a quantised operand is followed by its scales
    q = xs[0]
    s, heads = q.shape[1:3]
    places, parts = [], []
    for b, h in itertools.product(range(q.shape[0]), range(heads)):
        here = ((rows // (s * heads) == b) & (rows % heads == h)).nonzero()[:, 0]
        if len(here):
            some = rows[here] // heads % s
            near = [x[b, some, h] if i < pairs else x[b, :, h] for i, x in enumerate(xs)]
            part = call(*(x[None, :, None] for x in near), **attrs)
            places.append(here)
            parts.append(part[0, :, 0][:, columns])
    return torch.cat(parts)[torch.cat(places).argsort()]


def _norm(call: Call, xs: Operands, attrs: dict[str, Any], _: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Whole rows; weights belong to all."""
    return call(as_matrix(xs[0])[rows][None], *xs[1:], **attrs)[0][:, columns]


def _modulated(call: Call, xs: Operands, attrs: dict[str, Any], _: int, rows: Tensor, columns: Tensor) -> Tensor:
    x, scale, shift = xs
    parts = []
    for b, some in _by_video(rows, x.shape[1]):
        near = attrs | {"split": _below(some, attrs["split"])}
        parts.append(call(x[b : b + 1, some], scale[b : b + 1], shift[b : b + 1], **near)[0])
    return torch.cat(parts)[:, columns]


def _gated(call: Call, xs: Operands, attrs: dict[str, Any], _: int, rows: Tensor, columns: Tensor) -> Tensor:
    """``gated_add`` and its fusion with ``adaln``: of the branch those tokens that meet a chosen one."""
    x, y, *modulation = xs
    skipped = x.shape[1] - y.shape[1]
    parts = []
    for b, some in _by_video(rows, x.shape[1]):
        met = some[some >= skipped] - skipped
        near = attrs | {"gate_split": _below(met, attrs["gate_split"])}
        if "split" in attrs:
            near["split"] = _below(some, attrs["split"])
        row = [None if m is None else m[b : b + 1] for m in modulation]
        parts.append(call(x[b : b + 1, some], y[b : b + 1, met], *row, **near)[0])
    return torch.cat(parts)[:, columns]


def _rope(call: Call, xs: Operands, attrs: dict[str, Any], _: int, rows: Tensor, columns: Tensor) -> Tensor:
    x, table = xs
    parts = [call(x[b : b + 1, some], table[some], **attrs)[0] for b, some in _by_video(rows, x.shape[1])]
    return torch.cat(parts).flatten(1)[:, columns]


def _qk(call: Call, xs: Operands, attrs: dict[str, Any], output: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Queries are the last tokens, so each needs the table's row further down; keys need no more than one query."""
    q, k, q_weight, k_weight, table = xs
    parts = []
    for b, some in _by_video(rows, xs[output].shape[1]):
        late = some + (k.shape[1] - q.shape[1]) if output == 0 else some
        queries = q[b : b + 1, some] if output == 0 else q[b : b + 1, :1]
        parts.append(call(queries, k[b : b + 1, late], q_weight, k_weight, table[late], **attrs)[0])
    return torch.cat(parts).flatten(1)[:, columns]


def _history_keys(call: Call, xs: Operands, attrs: dict[str, Any], _: int, rows: Tensor, columns: Tensor) -> Tensor:
    k, logit = xs
    parts = []
    for b, some in _by_video(rows, k.shape[1]):
        near = attrs | {"split": _below(some, attrs["split"])}
        parts.append(call(k[b : b + 1, some], logit, **near)[0])
    return torch.cat(parts).flatten(1)[:, columns]


def _channels(call: Call, xs: Operands, attrs: dict[str, Any], _: int, rows: Tensor, columns: Tensor) -> Tensor:
    """All channels of the chosen positions."""
    x, gamma = xs
    parts = []
    for b, some in _by_video(rows, x.shape[1]):
        here = x[b].flatten(1)[:, columns]
        parts.append(call(here[None, :, None, None], gamma, **attrs)[0, :, 0, 0][some])
    return torch.cat(parts)


def _conv(call: Call, xs: Operands, attrs: dict[str, Any], _: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Each chosen position's receptive field as a video of its own, with the chosen filters."""
    x, weight, bias = xs
    kernel, pad = weight.shape[2:], attrs["padding"]
    video = _video("conv3d", [x.shape, weight.shape], attrs)
    near = attrs | {"stride": (1, 1, 1), "padding": (0, 0, 0)}
    sides = [side for p in reversed(pad) for side in (p, p)]
    starts = [_unravel(c, video, attrs["stride"]) for c in columns.tolist()]
    parts = []
    for b, some in _by_video(rows, weight.shape[0]):
        padded = F.pad(x[b], sides) if any(pad) else x[b]
        fields = torch.stack([padded[(slice(None), *_window(at, kernel))] for at in starts])
        part = call(fields, weight[some], None if bias is None else bias[some], **near)
        parts.append(part.flatten(1).T)
    return torch.cat(parts)


def _patches(call: Call, xs: Operands, attrs: dict[str, Any], _: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Each chosen token's patch as a video of its own, with the chosen filters."""
    x, weight, bias = xs
    kernel = tuple(weight.shape[2:])
    grid = tuple(n // k for n, k in zip(x.shape[2:], kernel, strict=True))
    fields = []
    for row in rows.tolist():
        b, token = divmod(row, math.prod(grid))
        fields.append(x[(b, slice(None), *_window(_unravel(token, grid, kernel), kernel))])
    return call(torch.stack(fields), weight[columns], bias[columns], **attrs)[:, 0]


def _unravel(position: int, size: Sequence[int], step: Sequence[int]) -> tuple[int, int, int]:
    """Where the window of a result's position begins."""
    rest, x = divmod(position, size[2])
    t, y = divmod(rest, size[1])
    return t * step[0], y * step[1], x * step[2]


def _window(start: Sequence[int], kernel: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(at, at + k) for at, k in zip(start, kernel, strict=True))


RESTRICTED: Mapping[str, Restricted] = {
    "adaln": _modulated,
    "adaln_quantize": _modulated,
    "add": _elements,
    "attention": _attention,
    "channel_norm": _channels,
    "channel_norm_silu": _channels,
    "conv3d": _conv,
    "dequantize_rows": _whole_rows,
    "gated_add": _gated,
    "gated_add_adaln": _gated,
    "gated_add_adaln_quantize": _gated,
    "gelu": _elements,
    "gelu_quantize": _whole_rows,
    "layer_norm": _norm,
    "layer_norm_quantize": _norm,
    "linear": _linear,
    "linear_gelu": _linear,
    "modulate": _modulated,
    "packed_linear": _linear,
    "patch_embed": _patches,
    "qk_norm_rope": _qk,
    "qkv_linear": _qkv,
    "quantize_rows": _whole_rows,
    "quantized_attention": _attention,
    "quantized_linear": _packed_linear,
    "quantized_qkv_linear": _packed_qkv,
    "rms_norm": _norm,
    "rope": _rope,
    "scale_history_keys": _history_keys,
    "scaled_attention": _attention,
    "scaled_linear": _packed_linear,
    "silu": _elements,
}
"""How each op is restricted; the others have outputs small enough to be computed whole, or only move data."""
