"""The convolutions of the VAE's decoder, in every way that might be fastest.

A variant takes the input as frames ``[t, c, h, w]``, whatever lies in memory, and gives the result the same way. Its
layout of input and weight is its own and is prepared before the clock starts; whatever it copies in a call is timed.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence

import shapes
import torch
import torch.nn.functional as F
from results import Item, NotThereError, Record
from rig import BOUNDS, Rig, Trial, error_of, take
from shapes import Convolution
from torch import Tensor

__all__ = ["VARIANTS", "Variant", "first_choice", "reference", "second_choice"]

PATCH_BYTES = 2 * 2**30
"""Of the matrix of patches that is made at a time."""
POINTS = 62
"""Checked besides the two corners: a library may be wrong in a part of a large result only."""


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One way to convolve.

    Attributes:
        pack: frames, weight ``[out, c, kt, kh, kw]`` and bias into what ``run`` takes, layouts included.
        run: gives ``[frames, out, h, w]``; its first argument is the padding of rows and columns.
    """

    pack: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]
    run: Callable[..., Tensor]


def _pack_3d(x: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    return x.transpose(0, 1).unsqueeze(0).contiguous(), weight.contiguous(), bias


def _pack_3d_last(x: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    clip = x.transpose(0, 1).unsqueeze(0)
    last = torch.channels_last_3d
    return clip.contiguous(memory_format=last), weight.contiguous(memory_format=last), bias


def _run_3d(pad: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(x, weight, bias, padding=(0, pad, pad))[0].transpose(0, 1)


def _pack_sum(x: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    taps = [weight[:, :, i].contiguous(memory_format=torch.channels_last) for i in range(weight.shape[2])]
    return x.contiguous(memory_format=torch.channels_last), bias, *taps


def _run_sum(pad: int, x: Tensor, bias: Tensor, *taps: Tensor) -> Tensor:
    """One 2-D convolution a tap in time, each over all frames, added up."""
    frames = x.shape[0] - len(taps) + 1
    out = F.conv2d(x[:frames], taps[0], bias, padding=pad)
    for i, tap in enumerate(taps[1:], start=1):
        out.add_(F.conv2d(x[i : i + frames], tap, padding=pad))
    return out


def _pack_wide(x: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    stacked = weight.transpose(1, 2).transpose(0, 1).flatten(0, 1)  # [kt · out, c, kh, kw]
    last = torch.channels_last
    return x.contiguous(memory_format=last), stacked.contiguous(memory_format=last), bias


def _run_wide(pad: int, x: Tensor, stacked: Tensor, bias: Tensor) -> Tensor:
    """One 2-D convolution to the channels of all taps, then shifted sums: wider products, more memory."""
    out = bias.shape[0]
    taps = stacked.shape[0] // out
    if taps == 1:
        return F.conv2d(x, stacked, bias, padding=pad)
    parts = F.conv2d(x, stacked, padding=pad)
    frames = x.shape[0] - taps + 1
    total = parts[:frames, :out] + bias[:, None, None]
    for i in range(1, taps):
        total += parts[i : i + frames, i * out : (i + 1) * out]
    return total


def _pack_patches(x: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    matrix = weight.permute(2, 3, 4, 1, 0).flatten(0, 3).contiguous()  # [kt · kh · kw · c, out]
    return x.permute(0, 2, 3, 1).contiguous(), matrix, bias


def _run_patches(pad: int, x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """Copy every patch into a row of a matrix, as many frames at a time as memory allows, and multiply."""
    t, h, w, c = x.shape
    kh = kw = 2 * pad + 1
    kt = matrix.shape[0] // (kh * kw * c)
    x = F.pad(x, (0, 0, pad, pad, pad, pad))
    frames = t - kt + 1
    out = x.new_empty(frames, h, w, bias.shape[0])
    step = max(1, PATCH_BYTES // (h * w * matrix.shape[0] * x.element_size()))
    plane, row, column, _ = x.stride()
    for start in range(0, frames, step):
        count = min(step, frames - start)
        strides = (plane, row, column, plane, row, column, 1)
        patches = x.as_strided((count, h, w, kt, kh, kw, c), strides, start * plane)
        rows = patches.reshape(count * h * w, -1)
        torch.addmm(bias, rows, matrix, out=out[start : start + count].view(count * h * w, -1))
    return out.permute(0, 3, 1, 2)


VARIANTS = {
    "conv3d": Variant(_pack_3d, _run_3d),
    "conv3d last": Variant(_pack_3d_last, _run_3d),
    "conv2d sum": Variant(_pack_sum, _run_sum),
    "conv2d wide": Variant(_pack_wide, _run_wide),
    "patches": Variant(_pack_patches, _run_patches),
}
"""``last``: channels last in memory. The 2-D ones and the patches are always so."""

FIRST = (
    ("conv3d last", "bfloat16"),
    ("conv2d sum", "bfloat16"),
    ("conv3d last", "float16"),
    ("conv2d sum", "float16"),
    ("conv3d", "bfloat16"),
    ("conv3d", "float16"),
    ("conv2d wide", "bfloat16"),
)
SECOND = (
    ("patches", "bfloat16"),
    ("conv3d", "float32"),
    ("conv3d", "tf32"),
    ("conv3d last", "tf32"),
    ("conv2d sum", "tf32"),
)
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tf32": "tf32"}


def first_choice(rig: Rig) -> Iterator[Item]:
    """What may be chosen: the ways in 16 bits."""
    return _items(rig, FIRST)


def second_choice(rig: Rig) -> Iterator[Item]:
    """For reference: patches as a matrix, float32 and TF32."""
    return _items(rig, SECOND)


def _items(rig: Rig, variants: Sequence[tuple[str, str]]) -> Iterator[Item]:
    for name, precision in variants:
        for conv in shapes.convolutions(rig.tiny):
            yield _item(rig, conv, name, precision)


def _item(rig: Rig, conv: Convolution, name: str, precision: str) -> Item:
    column = f"{name} {SHORT[precision]}"
    return Item(
        f"vae/{column}/{conv.row}",
        f"{conv.c} to {conv.out} channels, {conv.frames} frames of {conv.h}×{conv.w}, kernel {conv.kernel}, {column}",
        conv.row,
        column,
        lambda: _run(rig, conv, VARIANTS[name], precision),
        seconds=10.0,
        counts={"vae": conv.count},
        fields={"shape": [conv.t, conv.c, conv.h, conv.w, conv.out, *conv.kernel], "dtype": precision},
    )


def _run(rig: Rig, conv: Convolution, variant: Variant, precision: str) -> Record:
    if precision == "float16" and not rig.cuda:
        raise NotThereError("float16 on a CPU is emulated, and its figures mean nothing")
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    sets = rig.sets(lambda: _operands(rig, conv, dtype))
    packed = [variant.pack(*operands) for operands in sets]

    def call(index: int) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=precision == "tf32"):
            return variant.run(conv.pad, *packed[index])

    moved = sum(x.nbytes for x in sets[0]) + dtype.itemsize * conv.out * conv.frames * conv.h * conv.w
    trial = Trial(
        [functools.partial(call, i) for i in range(len(sets))],
        conv.flops,
        moved,
        lambda out: _error(out, conv, sets[0]),
        BOUNDS[precision],
        precision,
    )
    return {**take(rig, trial), "backend": _backend(packed[0], conv) if variant.run is _run_3d else None}


def _backend(packed: Sequence[Tensor], conv: Convolution) -> str | None:
    """What torch says it takes for a 3-D convolution: it has a slow one of its own that needs much memory."""
    x, weight, bias = packed
    ones, pad = [1, 1, 1], [0, conv.pad, conv.pad]
    try:
        return str(torch._C._select_conv_backend(x, weight, bias, ones, pad, ones, False, [0, 0, 0], 1))
    except (AttributeError, RuntimeError, TypeError):
        return None  # not a public function: another version may not have it


def _operands(rig: Rig, conv: Convolution, dtype: torch.dtype) -> Sequence[Tensor]:
    """Frames ``[t, c, h, w]`` with channels last in memory, weight, bias."""
    x = rig.normal(conv.t, conv.h, conv.w, conv.c, dtype=dtype).permute(0, 3, 1, 2)
    terms = conv.c * conv.kernel[0] * conv.kernel[1] * conv.kernel[2]
    return (
        x,
        rig.normal(conv.out, conv.c, *conv.kernel, dtype=dtype, scale=terms**-0.5),
        rig.normal(conv.out, dtype=dtype),
    )


def _error(out: Tensor, conv: Convolution, operands: Sequence[Tensor]) -> float:
    wanted = (conv.frames, conv.out, conv.h, conv.w)
    if tuple(out.shape) != wanted:
        raise ValueError(f"result {list(out.shape)}, wanted {list(wanted)}")
    draw, count = random.Random(0), min(POINTS, conv.frames * conv.h * conv.w // 8)
    corners = [(0, 0, 0), (conv.frames - 1, conv.h - 1, conv.w - 1)]
    inner = [(draw.randrange(conv.frames), draw.randrange(conv.h), draw.randrange(conv.w)) for _ in range(count)]
    points = [*corners, *inner]
    got = torch.stack([out[t, :, h, w] for t, h, w in points])
    return error_of(got, torch.stack([reference(conv.pad, point, *operands) for point in points]))


def reference(pad: int, point: tuple[int, int, int], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The result at one frame, row and column in float64, ``[out]``, from the definition."""
    t, row, column = point
    kt, kh, kw = weight.shape[2:]
    patch = torch.zeros(x.shape[1], kt, kh, kw, dtype=torch.float64, device=x.device)
    for i in range(kh):
        for j in range(kw):
            y, z = row + i - pad, column + j - pad
            if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
                patch[:, :, i, j] = x[t : t + kt, :, y, z].double().t()
    return torch.einsum("cijk,ocijk->o", patch, weight.double()) + bias.double()
