"""Rotary position embedding in interleaved pairs."""

from __future__ import annotations

import torch

from helios.errors import GraphError
from helios.export.dim import Size
from helios.export.emitter import Emitter
from helios.export.forms.table import form
from helios.export.wire import Wire
from helios.ops.rope import rope_table as table_op

__all__ = ["LARGEST", "rope", "rope_table"]

ROTARY = 23
"""The opset that brought RotaryEmbedding."""

LARGEST = 512
"""Rows and columns of tokens for which a model of free size has angles: a video of 8192 × 8192 pixels."""


@form
def rope(e: Emitter, x: Wire, table: Wire) -> Wire:
    b, s, h, d = x.sizes
    wide = e.wide(x)
    cos, sin = (_column(e, e.cast(table, wide.dtype), i) for i in (0, 1))
    if e.options.opset >= ROTARY and wide.dtype != torch.float64:  # which the op does not take
        caches = [e.once(("rope", c.name, b), lambda c=c: _batched(e, c, b)) for c in (cos, sin)]  # type: ignore[misc]
        flat = e.reshape(wide, (b, s, h * d))
        made = e.op("RotaryEmbedding", flat, *caches, sizes=flat.sizes, num_heads=h, interleaved=1)
        return e.cast(e.reshape(made, x.sizes), x.dtype)
    pairs = e.reshape(wide, (b, s, h, d // 2, 2))
    even, odd = e.entry(pairs, 0, 4), e.entry(pairs, 1, 4)
    c, n = (e.reshape(column, (s, 1, d // 2)) for column in (cos, sin))
    first = e.op("Sub", e.op("Mul", even, c), e.op("Mul", odd, n))
    second = e.op("Add", e.op("Mul", even, n), e.op("Mul", odd, c))
    both = e.concat([e.reshape(y, (b, s, h, d // 2, 1)) for y in (first, second)], 4)
    return e.cast(e.reshape(both, x.sizes), x.dtype)


def _column(e: Emitter, table: Wire, index: int) -> Wire:
    """Cosines or sines ``[s, p]``, taken out once for all blocks."""
    return e.once(("column", table.name, index), lambda: e.entry(table, index, 2))


def _batched(e: Emitter, column: Wire, batch: Size) -> Wire:
    return e.expand(e.reshape(column, (1, *column.sizes)), (batch, *column.sizes))


@form
def rope_table(
    e: Emitter,
    *,
    frames: tuple[int, ...],
    height: Size,
    width: Size,
    dims: tuple[int, int, int],
    theta: float,
    pool: tuple[int, int, int],
    dtype: torch.dtype,
) -> Wire:
    """Where height or width depend on dimensions. An angle belongs to one axis alone, and so does its average over a
    cell that lies within the video: rows for each axis are constants, and the table is what they broadcast to."""
    cells = (len(frames) // pool[0], height // pool[1], width // pool[2])
    if len(frames) % pool[0] or (height, width) != (cells[1] * pool[1], cells[2] * pool[2]):
        raise GraphError("rope_table: a table of free size has whole cells only", fix="use multiples of 64 pixels")
    grid = (*cells, sum(dims) // 2, 2)
    parts = []
    for axis, count in enumerate(cells):
        length = len(frames) if axis == 0 else LARGEST
        rows = e.constant(_axis(axis, frames, length, dims, theta, pool[axis], dtype))
        used = e.slice(rows, 0, 0, count)
        line = tuple(count if i == axis else 1 for i in range(3))
        parts.append(e.expand(e.reshape(used, (*line, *used.sizes[1:])), (*cells, *used.sizes[1:])))
    whole = e.concat([part for part in parts if part.sizes[3] != 0], 3)
    tokens = cells[0] * cells[1] * cells[2]
    return e.reshape(whole, (tokens, *grid[3:]))


def _axis(
    axis: int,
    frames: tuple[int, ...],
    length: int,
    dims: tuple[int, int, int],
    theta: float,
    pool: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The op's own table along one axis: ``[length / pool, dims[axis]/2, 2]``."""
    rows, columns = (length if axis == i else 1 for i in (1, 2))
    only, cell = ([n if i == axis else other for i in range(3)] for n, other in ((dims[axis], 0), (pool, 1)))
    table: torch.Tensor = table_op.fn(
        frames=frames if axis == 0 else (0,),
        height=rows,
        width=columns,
        dims=(only[0], only[1], only[2]),
        theta=theta,
        pool=(cell[0], cell[1], cell[2]),
        dtype=dtype,
    )
    return table
