"""Convolutions and norms of the VAE.

**Convolutions** are aclnnConvolution on NCDHW. The bias joins the sums in float32 on the cube unit before they are
rounded: added to what was rounded it would cost three times the norm's budget (``docs/conformance.md``). In float32
HF32, CANN's default for convolutions, is off; see ``operators.begin``.

**Norms over channels**, which are no last dimension here, have no operator of their own: npu_rms_norm adds its epsilon
under the root where this op takes a maximum, and the suite's sample ``vanishing`` lies on both sides of that. So the
norm is torch's ``vector_norm`` with float32 sums, and the rest is float32 in place, rounded once at the end.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.backend import Kernel

__all__ = ["KERNELS"]

F32 = torch.float32
Triple = tuple[int, int, int]


def _prepare_conv(_x: None, weight: Tensor, bias: Tensor | None, **_attrs: object) -> tuple[Tensor, Tensor | None]:
    return weight.contiguous(), None if bias is None else bias.contiguous()


def _conv3d(held: tuple[Tensor, Tensor | None], x: Tensor, *, stride: Triple, padding: Triple) -> Tensor:
    return F.conv3d(x.contiguous(), *held, stride=stride, padding=padding)


def _prepare_norm(_x: None, gamma: Tensor, **_attrs: object) -> Tensor:
    """``gamma · √c`` ``[c, 1, 1, 1]`` float32."""
    return (gamma.contiguous().to(F32) * math.sqrt(gamma.shape[0])).view(-1, 1, 1, 1)


def _normed(gain: Tensor, x: Tensor, eps: float) -> Tensor:
    """Float32, in memory of its own."""
    whole = x.contiguous()
    length = torch.linalg.vector_norm(whole, dim=1, keepdim=True, dtype=F32).clamp_min_(eps)
    return torch.div(whole, length).mul_(gain)


def _channel_norm(gain: Tensor, x: Tensor, *, eps: float) -> Tensor:
    return _normed(gain, x, eps).to(x.dtype)


def _channel_norm_silu(gain: Tensor, x: Tensor, *, eps: float) -> Tensor:
    return F.silu(_normed(gain, x, eps), inplace=True).to(x.dtype)


KERNELS = {
    "channel_norm": Kernel(_channel_norm, _prepare_norm, ("gamma",)),
    "channel_norm_silu": Kernel(_channel_norm_silu, _prepare_norm, ("gamma",)),
    "conv3d": Kernel(_conv3d, _prepare_conv, ("weight", "bias")),
}
