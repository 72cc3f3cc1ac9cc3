"""Attention by the fused operators, without a mask and with the scale always said.

**Layout**, by shape and dtype. Queries, keys and values come as ``[b, s, h, d]``, which is BSND: nothing is transposed
in 16 bits. With one head (the VAE) BSND and BNSD are the same bytes, and BNSD is given, which CANN's documentation
calls the faster one in some cases. To transpose for it with 40 heads would read and write q, k, v and the result once
more: 0.9 GB a block at stage 2 (computed). Float32 is transposed: its operator may be captured in a graph in BNSD
alone, and that precision is for comparing, not for speed.

**Channels.** The operator for 16 bits wants heads of a multiple of 16 channels. Zeros appended to q and k add nothing
to a score, those appended to v make columns that are cut off: the same numbers, exactly. Published heads have 128 and
384 channels and need none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.backend import Kernel
from helios_ascend import operators

__all__ = ["KERNELS"]

CHANNELS = 16


def _attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
    d = q.shape[-1]
    scale = d**-0.5 if scale is None else scale
    if q.dtype == torch.float32 or q.shape[2] == 1:
        heads = [_by_head(x) for x in (q, k, v)]
        return _by_token(operators.attention(*heads, scale=scale, layout="BNSD")[..., :d])
    return operators.attention(_laid(q), _laid(k), _laid(v), scale=scale, layout="BSND")[..., :d].contiguous()


def _laid(x: Tensor) -> Tensor:
    missing = 0 if x.dtype == torch.float32 else -x.shape[-1] % CHANNELS
    return F.pad(x.contiguous(), (0, missing)) if missing else x.contiguous()


def _by_head(x: Tensor) -> Tensor:
    """``[b, h, s, d]``: of one head the same bytes, or else transposed."""
    return _laid(x).transpose(1, 2).contiguous()


def _by_token(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


KERNELS = {"attention": Kernel(_attention)}
