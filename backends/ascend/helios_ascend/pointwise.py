"""Elementwise ops. One operator where it is the whole op, else float32 between and one rounding.

**GELU.** CANN has three: the tanh form and that with erf (``aten::gelu``, aclnnGeluV2), and ``npu_fast_gelu``, which
its documentation gives as ``x · sigmoid(1.702 x)`` on the 910B. By the suite's four statistics on its own sample
``wide`` of ``gelu``, in bfloat16, against float64 (``tests/backends/ascend/test_gelu_choice.py`` computes and holds
them):

==============  =========  ========  =========  ==========
form            norm       worst     gain       misrounded
==============  =========  ========  =========  ==========
bound           0.00234    0.0300    0.00075    0.052
tanh            0.00126    0.0056    0.00018    0.016
erf             0.00127    0.0059    0.00011    0.219
fast            0.0077     0.0200    −0.0036    0.895
==============  =========  ========  =========  ==========

So the fast ones stay out, by three of the four, and so does the form with erf, by one. In bfloat16 the tanh form is
called on what came: a vector unit of the 910B has no arithmetic in bfloat16, so that the operator has to compute in
float32 and round once. In float16 it has one, and CANN does not say which it takes; there the input is widened first.

**SiLU** only ever sees small tensors by itself, and is computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.backend import Kernel

__all__ = ["KERNELS"]

F32 = torch.float32


def _add(x: Tensor, y: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, y.dtype)
    return x.contiguous().to(wide) + y.contiguous().to(wide)


def _gelu(x: Tensor) -> Tensor:
    whole = x.contiguous()
    if x.dtype == torch.float16:
        return F.gelu(whole.to(F32), approximate="tanh").to(x.dtype)
    return F.gelu(whole, approximate="tanh")


def _silu(x: Tensor) -> Tensor:
    return F.silu(x.contiguous().to(F32)).to(x.dtype)


def _cast(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    return x.contiguous().to(dtype)


def _clamp(x: Tensor, *, low: float, high: float) -> Tensor:
    return x.contiguous().clamp(low, high)


def _prepare_history_keys(_k: None, logit: Tensor, *, split: int, gain: float) -> Tensor:
    """The factor of each head ``[1, 1, n, 1]``, float32, once at load."""
    return (torch.sigmoid(logit.contiguous().to(F32)) * (gain - 1.0) + 1.0).view(1, 1, -1, 1)


def _scale_history_keys(factor: Tensor, k: Tensor, *, split: int, gain: float) -> Tensor:
    whole = k.contiguous()
    videos = [_with_scaled_head(whole[i : i + 1], factor, split) for i in range(k.shape[0])]
    return videos[0] if len(videos) == 1 else torch.cat(videos)


def _with_scaled_head(k: Tensor, factor: Tensor, split: int) -> Tensor:
    head = (k[:, :split] * factor).to(k.dtype)
    return torch.cat((head, k[:, split:]), dim=1)


KERNELS = {
    "add": Kernel(_add),
    "cast": Kernel(_cast),
    "clamp": Kernel(_clamp),
    "gelu": Kernel(_gelu),
    "scale_history_keys": Kernel(_scale_history_keys, _prepare_history_keys, ("logit",)),
    "silu": Kernel(_silu),
}
