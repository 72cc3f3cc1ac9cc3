"""Settings of torch that make products err on a device, though every kernel is right."""

from __future__ import annotations

import torch

__all__ = ["likely"]

_PRODUCTS = frozenset({"linear", "linear_gelu", "qkv_linear"})
_CONVOLUTIONS = frozenset({"conv3d", "patch_embed"})


def likely(name: str, dtype: torch.dtype, device: str) -> str:
    """What is to be looked at first where an op is beyond its budget; "" where nothing is likelier than the kernel.

    Args:
        name: of the op.
        dtype: that it works in.
        device: type of the torch device, such as ``cuda``.
    """
    if device != "cuda" or name not in _PRODUCTS | _CONVOLUTIONS:
        return ""
    if dtype == torch.float32:
        of = "cudnn" if name in _CONVOLUTIONS else "cuda.matmul"
        return f"likely cause: TF32 keeps 10 of 23 bits of each factor; set torch.backends.{of}.allow_tf32 = False"
    if dtype != torch.bfloat16 or name in _CONVOLUTIONS:
        return ""
    setting = "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False"
    return f"likely cause: split-K adds partial sums in bfloat16; set {setting}"
