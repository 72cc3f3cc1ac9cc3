"""Products with weights that are held as e4m3 numbers and multiplied in the working dtype: for memory, on any GPU.

``packed_linear`` widens a weight into memory that lives for one product, and cuBLASLt multiplies as in ``gemm``. Beside
the product that reads one byte an element, writes two, and the product reads the two as it would anyway: 3 bytes an
element more than a weight that is held wide, and one launch. At the published sizes (384 × 640), a weight:

==============  =================  ===============  =================
weight          bytes more         µs at 4.3 TB/s   µs at 1 TB/s
==============  =================  ===============  =================
5120 × 5120     79 MB              18               79
13824 × 5120    212 MB             49               212
a whole step    35.9 GB            8.3 ms           36 ms
==============  =================  ===============  =================

Of a step's products at stage 0, 1, 2 that is 11, 7 and 2.6 % on an H200 at 790 TFLOP/s, and 10, 6 and 2.3 % on a card
of 24 GB with 1 TB/s and 165 TFLOP/s (predictions). The largest widened weight is 142 MB. It is freed as soon as its
product is launched: a captured step, whose memory comes from one pool, takes it once and not for each product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helios.backend import Kernel
from helios_cuda.held import Quantised
from helios_cuda.kernels import KERNELS as TRITON
from helios_cuda.scaled import quantised

__all__ = ["KERNELS"]


def _prepare(_x: None, weight: Tensor, bias: Tensor | None) -> Quantised:
    return quantised(weight, bias)


def _widened(w: Quantised) -> Tensor:
    """``[o, i]`` in the working dtype."""
    wide: Tensor = TRITON["dequantize_rows"].run(w.weight, w.scale, dtype=w.dtype)
    return wide


def _packed_linear(w: Quantised, x: Tensor) -> Tensor:
    rows, weight = x.reshape(-1, x.shape[-1]), _widened(w)
    out = torch.mm(rows, weight.t()) if w.bias is None else torch.addmm(w.bias, rows, weight.t())
    return out.view(*x.shape[:-1], out.shape[1])


KERNELS: dict[str, Kernel] = {"packed_linear": Kernel(_packed_linear, _prepare, ("weight", "bias"))}
