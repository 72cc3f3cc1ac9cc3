"""Data movement. What can be a view is one; whoever needs it dense makes it so, and CANN's operators get nothing else.

CANN replicates no border in bfloat16 (aclnnReplicationPad3d knows float32 and float16). ``pad_replicate`` therefore
joins copies of the last slice, which is the same movement in every dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.backend import Kernel

__all__ = ["KERNELS"]


def _reshape(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    return x.contiguous().view(shape)


def _split_heads(x: Tensor, *, heads: int) -> Tensor:
    return x.contiguous().view(*x.shape[:-1], heads, -1)


def _permute(x: Tensor, *, dims: tuple[int, ...]) -> Tensor:
    return x.permute(dims).contiguous()


def _narrow(x: Tensor, *, dim: int, start: int, length: int) -> Tensor:
    return x.narrow(dim, start, length)


def _concat(xs: list[Tensor], *, dim: int) -> Tensor:
    return torch.cat([x.contiguous() for x in xs], dim=dim)


def _unbind(x: Tensor, *, dim: int) -> tuple[Tensor, ...]:
    return torch.unbind(x, dim)


def _expand(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    return x.expand(shape)


def _pad_replicate(x: Tensor, *, multiple: tuple[int, ...]) -> Tensor:
    for dim, m in enumerate(multiple, start=2):
        missing = -x.shape[dim] % m
        if missing:
            last = x.narrow(dim, x.shape[dim] - 1, 1).contiguous()
            x = torch.cat([x.contiguous(), *[last] * missing], dim=dim)
    return x


def _pad_zero(x: Tensor, *, before: tuple[int, int, int], after: tuple[int, int, int]) -> Tensor:
    sides = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
    return F.pad(x.contiguous(), sides)


def _last_frames(x: Tensor, *, count: int) -> Tensor:
    """Never a view, which would keep all of x."""
    return x[:, :, x.shape[2] - count :].clone(memory_format=torch.contiguous_format)


def _upsample(x: Tensor) -> Tensor:
    """Whole frames as channels of pictures: the operator for pictures copies each pixel into a square."""
    b, c, t, h, w = x.shape
    pictures = F.interpolate(x.contiguous().view(b, c * t, h, w), size=(2 * h, 2 * w), mode="nearest")
    return pictures.view(b, c, t, 2 * h, 2 * w)


def _interleave_frames(x: Tensor) -> Tensor:
    b, channels, t, h, w = x.shape
    halves = [half.contiguous() for half in x.chunk(2, dim=1)]
    return torch.stack(halves, dim=3).view(b, channels // 2, 2 * t, h, w)


def _unpatchify(x: Tensor, *, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    videos = [_latents(one, grid, patch) for one in x.contiguous()]
    return torch.stack(videos) if len(videos) > 1 else videos[0][None]


def _latents(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    (t, h, w), (pt, ph, pw) = grid, patch
    cells = tokens.view(t, h, w, pt, ph, pw, -1).permute(6, 0, 3, 1, 4, 2, 5).contiguous()
    return cells.view(-1, t * pt, h * ph, w * pw)


KERNELS = {
    "concat": Kernel(_concat),
    "expand": Kernel(_expand),
    "interleave_frames": Kernel(_interleave_frames),
    "last_frames": Kernel(_last_frames),
    "narrow": Kernel(_narrow),
    "pad_replicate": Kernel(_pad_replicate),
    "pad_zero": Kernel(_pad_zero),
    "permute": Kernel(_permute),
    "reshape": Kernel(_reshape),
    "split_heads": Kernel(_split_heads),
    "unbind": Kernel(_unbind),
    "unpatchify": Kernel(_unpatchify),
    "upsample_nearest": Kernel(_upsample),
    "upsample_nearest2": Kernel(_upsample),
}
