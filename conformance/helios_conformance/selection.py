"""Which elements of an output are kept and judged.

Small outputs are kept whole. Of a large one, rows and columns: those where kernels tend to go wrong (first, last, both
sides of a tile's or segment's edge), and others drawn from a key that holds the output's own digest: a backend cannot
know them before it has computed the output.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from helios_conformance.case import Kept
from helios_conformance.draws import Root

__all__ = ["BUDGET_BYTES", "Layout", "Selection", "all_finite", "as_matrix", "digest", "keep", "select", "selection"]

BUDGET_BYTES = 64 << 10
"""Of one case's kept outputs; each output gets its share."""

_TILE = 64
_DRAWN = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """Rows and columns of an output seen as a matrix. ``None`` for both: the whole."""

    rows: Tensor | None
    columns: Tensor | None

    def take(self, matrix: Tensor) -> Tensor:
        """The kept elements of ``[rows, columns]``, 1-D, row by row."""
        if self.rows is None or self.columns is None:
            return matrix.reshape(-1)
        return matrix[self.rows][:, self.columns].reshape(-1)

    @property
    def whole(self) -> bool:
        return self.rows is None

    def count(self, numel: int) -> int:
        """Elements kept of an output of ``numel``."""
        return numel if self.rows is None or self.columns is None else self.rows.numel() * self.columns.numel()


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How an output is seen as a matrix, and what of it is always kept.

    Attributes:
        row_dims: how many leading dimensions count as rows; the rest are columns. ``None``: all but the last.
        borders: rows at which a segment begins; they and the rows before are kept.
        columns: that are kept beside the first and the last.
        members: rows come in groups of that many, the heads of a token; edges and borders are then of groups. Of the
            first and last group all members are kept, of the others one that is drawn: an oracle that costs the same
            for each member would else cost that many times as much.
    """

    row_dims: int | None = None
    borders: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    members: int = 1


PLAIN = Layout()


def select(rows: int, columns: int, itemsize: int, key: int, layout: Layout = PLAIN, *, share: int = 1) -> Selection:
    """Choose elements.

    Args:
        rows, columns: of the output as a matrix.
        itemsize: bytes of an element.
        key: from ``Root.key(case, output, digest)``.
        layout: what is kept in any case.
        share: by how many outputs the budget is shared.
    """
    room = BUDGET_BYTES // (itemsize * share)
    if rows * columns <= room:
        return Selection(None, None)
    always = _grouped(key, rows, layout)
    # Narrow outputs leave room for more rows.
    chosen = np.unique([*always, *_drawn(key, rows, max(_DRAWN, room // columns - len(always)))])
    wide = max(4, room // len(chosen))
    if wide >= columns:
        return Selection(torch.from_numpy(chosen), torch.arange(columns))
    rim = sorted({c for c in (0, columns - 1, *layout.columns) if 0 <= c < columns})[: wide // 2]
    picked = np.unique([*rim, *_drawn(key + 1, columns, wide - len(rim))])
    return Selection(torch.from_numpy(chosen), torch.from_numpy(picked))


def _grouped(key: int, rows: int, layout: Layout) -> list[int]:
    """The rows that are kept in any case."""
    n = layout.members
    if n == 1:
        return _edges(rows, layout.borders)
    edges = _edges(rows // n, layout.borders)
    drawn = (int(word) % n for word in _words(key + 2, len(edges)))
    return [*range(n), *(edge * n + member for edge, member in zip(edges, drawn, strict=True)), *range(rows - n, rows)]


def _edges(rows: int, borders: tuple[int, ...]) -> list[int]:
    """0, the last, and both sides of every edge: of segments, and of tiles of 64 (so of 128 and 256)."""
    step = _TILE
    while rows // step > 256:  # beyond sixteen thousand rows every edge would leave no room for columns
        step *= 2
    edges = [*range(step, rows, step), *borders]
    near = [r for edge in edges for r in (edge - 1, edge)]
    return [0, *(r for r in near if 0 <= r < rows), rows - 1]


def _drawn(key: int, size: int, count: int = _DRAWN) -> list[int]:
    """Distinct numbers below ``size``."""
    return sorted({int(word) % size for word in _words(key, count)})


def _words(key: int, count: int) -> npt.NDArray[np.uint64]:
    halves = np.array([key & (2**64 - 1), (key >> 64) & (2**64 - 1)], np.uint64)
    return np.random.Philox(key=halves).random_raw(count)


def digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a host tensor, in row-major order."""
    flat = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"").hexdigest()


def keep(root: Root, case: str, name: str, tensor: Tensor, layout: Layout = PLAIN, *, share: int = 1) -> Kept:
    """What is kept of an output, on the host.

    Args:
        root, case, name: with the output's digest, what keys the selection.
        tensor: the whole output, on any device.
        layout, share: as for ``select``.
    """
    host = tensor.detach().to("cpu").contiguous()
    told = digest(host)
    chosen = selection(root, case, name, tuple(host.shape), host.dtype, told, layout, share=share)
    values = chosen.take(as_matrix(host, layout)).clone()
    dtype = str(host.dtype).removeprefix("torch.")
    return Kept(values, tuple(host.shape), dtype, told, all_finite(host))


def selection(
    root: Root,
    case: str,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    told: str,
    layout: Layout = PLAIN,
    *,
    share: int = 1,
) -> Selection:
    """The selection that ``keep`` made, from what a bundle says of the output."""
    at = _split(shape, layout)
    key = root.key("selection", case, name, told)
    return select(math.prod(shape[:at]), math.prod(shape[at:]), dtype.itemsize, key, layout, share=share)


def as_matrix(tensor: Tensor, layout: Layout = PLAIN) -> Tensor:
    """The output as ``[rows, columns]``."""
    at = _split(tuple(tensor.shape), layout)
    return tensor.reshape(math.prod(tensor.shape[:at]), math.prod(tensor.shape[at:]))


def _split(shape: tuple[int, ...], layout: Layout) -> int:
    return max(0, len(shape) - 1) if layout.row_dims is None else layout.row_dims


def all_finite(tensor: Tensor) -> bool:
    """Whether every element of a host tensor is finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        return bool(tensor.float().isfinite().all())  # torch has no extremes of numbers of eight bits
    # NaN is the least and the greatest where there is one; a mask takes memory, and in bfloat16 60 times as long.
    return bool(torch.stack(tensor.aminmax()).isfinite().all())
