"""Data movement: exact, bit for bit. Outputs may be views where torch can make one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.errors import OpError
from helios.op import Arg, ErrorCase, Sample, op

__all__ = ["concat", "expand", "full", "narrow", "pad_replicate", "permute", "reshape", "split_heads", "unbind"]


def _reshape_samples() -> list[Sample]:
    return [
        Sample("heads", (Arg((2, 5, 24)),), {"shape": (2, 5, 2, 12)}),
        Sample("flat", (Arg((2, 3, 4, 5)),), {"shape": (2, 60)}),
    ]


def _reshape_errors() -> list[ErrorCase]:
    return [ErrorCase("count", (Arg((2, 3)),), {"shape": (2, 4)}, "6 elements")]


@op(dims="... -> ...", kind="move", samples=_reshape_samples, errors=_reshape_errors)
def reshape(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    """The same elements in row-major order under another shape. All sizes are written out, none is inferred."""
    if math.prod(shape) != math.prod(x.shape):
        raise OpError(
            f"reshape: {list(x.shape)} has {math.prod(x.shape)} elements, {list(shape)} has {math.prod(shape)}"
        )
    return x.reshape(shape)


def _heads_samples() -> list[Sample]:
    return [
        Sample("small", (Arg((2, 5, 24)),), {"heads": 2}),
        Sample("long", (Arg((1, 8261, 16)),), {"heads": 2}),
    ]


def _heads_errors() -> list[ErrorCase]:
    return [ErrorCase("uneven", (Arg((2, 5, 24)),), {"heads": 5}, "24 channels")]


@op(dims="b s d -> b s h e", kind="move", samples=_heads_samples, errors=_heads_errors)
def split_heads(x: Tensor, *, heads: int) -> Tensor:
    """Channels ``[b, s, heads·e]`` as ``[b, s, heads, e]``, head by head; may be a view."""
    if x.shape[-1] % heads:
        raise OpError(f"split_heads: {x.shape[-1]} channels do not divide into {heads} heads")
    return x.reshape(*x.shape[:-1], heads, -1)


def _permute_samples() -> list[Sample]:
    return [Sample("channels_last", (Arg((2, 3, 4, 5)),), {"dims": (0, 2, 3, 1)})]


def _permute_errors() -> list[ErrorCase]:
    return [ErrorCase("not_a_permutation", (Arg((2, 3, 4)),), {"dims": (0, 0, 1)}, "permutation")]


@op(dims="... -> ...", kind="move", samples=_permute_samples, errors=_permute_errors)
def permute(x: Tensor, *, dims: tuple[int, ...]) -> Tensor:
    """Dimensions in another order; may be a view."""
    if sorted(dims) != list(range(x.ndim)):
        raise OpError(f"permute: {list(dims)} is not a permutation of the {x.ndim} dimensions of {list(x.shape)}")
    return x.permute(dims)


def _narrow_samples() -> list[Sample]:
    return [
        Sample("tail", (Arg((2, 9, 8)),), {"dim": 1, "start": 4, "length": 5}),
        Sample("middle", (Arg((2, 9, 8)),), {"dim": 2, "start": 1, "length": 3}),
        Sample("long", (Arg((1, 8261, 8)),), {"dim": 1, "start": 8, "length": 8253}),
    ]


def _narrow_errors() -> list[ErrorCase]:
    return [ErrorCase("beyond", (Arg((2, 9, 8)),), {"dim": 1, "start": 5, "length": 5}, "reaches beyond")]


@op(dims="... -> ...", kind="move", samples=_narrow_samples, errors=_narrow_errors)
def narrow(x: Tensor, *, dim: int, start: int, length: int) -> Tensor:
    """``length`` consecutive entries of one dimension from ``start`` on; may be a view."""
    if start < 0 or length < 0 or start + length > x.shape[dim]:
        raise OpError(f"narrow: {start} + {length} reaches beyond dimension {dim} of {list(x.shape)}")
    return x.narrow(dim, start, length)


def _concat_samples() -> list[Sample]:
    return [
        Sample("tokens", ((Arg((2, 3, 8)), Arg((2, 1, 8)), Arg((2, 5, 8))),), {"dim": 1}),
        Sample("one", ((Arg((2, 3)),),), {"dim": 0}),
        Sample("long", ((Arg((1, 8200, 8)), Arg((1, 61, 8))),), {"dim": 1}),
    ]


def _concat_errors() -> list[ErrorCase]:
    return [ErrorCase("sizes", ((Arg((2, 3, 8)), Arg((2, 3, 7))),), {"dim": 1}, "concat: shapes")]


@op(dims="... -> ...", kind="move", samples=_concat_samples, errors=_concat_errors)
def concat(xs: list[Tensor], *, dim: int) -> Tensor:
    """Tensors of one dtype joined along a dimension."""
    sizes = {(*x.shape[:dim], *x.shape[dim + 1 :], x.dtype) for x in xs}
    if len(sizes) != 1:
        shown = ", ".join(f"{list(x.shape)}" for x in xs)
        raise OpError(f"concat: shapes {shown} or their dtypes differ outside dimension {dim}")
    return torch.cat(xs, dim=dim)


def _unbind_samples() -> list[Sample]:
    return [Sample("modulation", (Arg((2, 2, 6, 8)),), {"dim": 2})]


@op(dims="... -> ...", kind="move", samples=_unbind_samples)
def unbind(x: Tensor, *, dim: int) -> tuple[Tensor, ...]:
    """The slices of one dimension, which disappears; each may be a view."""
    return torch.unbind(x, dim)


def _expand_samples() -> list[Sample]:
    return [Sample("batch", (Arg((1, 6, 8)),), {"shape": (3, 6, 8)})]


@op(dims="... -> ...", kind="move", samples=_expand_samples)
def expand(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    """``x`` repeated along dimensions of size 1; may be a view with stride 0."""
    return x.expand(shape)


def _full_samples() -> list[Sample]:
    return [Sample("zero", (), {"shape": (1,), "value": 0.0, "dtype": torch.float32})]


@op(dims="-> ...", kind="move", samples=_full_samples)
def full(*, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
    """A constant tensor."""
    return torch.full(shape, value, dtype=dtype)


def _pad_samples() -> list[Sample]:
    return [
        Sample("mid", (Arg((2, 3, 2, 5, 6)),), {"multiple": (2, 4, 4)}),
        Sample("none", (Arg((1, 3, 4, 8, 8)),), {"multiple": (4, 8, 8)}),
    ]


@op(dims="b c t h w -> b c _ _ _", kind="move", samples=_pad_samples)
def pad_replicate(x: Tensor, *, multiple: tuple[int, ...]) -> Tensor:
    """Repeat the last frame, row and column until time, height and width are multiples of ``multiple``."""
    missing = [-size % m for size, m in zip(x.shape[2:], multiple, strict=True)]
    if not any(missing):
        return x
    return F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")
