"""The Triton kernels, a family a module; each module gives its ``KERNELS`` by op name.

Importing this needs Triton and no GPU. Whether functions are made for the compiler or for the interpreter is decided
here, at import: see ``helios_cuda.interpreter``.
"""

from __future__ import annotations

from collections.abc import Mapping

from helios.backend import Kernel
from helios_cuda.kernels import (
    attention,
    norm,
    pointwise,
    quantize,
    resample,
    residual,
    rope,
    sampler,
    scaled_attention,
    vae,
)

__all__ = ["KERNELS"]

FAMILIES = (attention, norm, pointwise, quantize, resample, residual, rope, sampler, scaled_attention, vae)

KERNELS: Mapping[str, Kernel] = {name: kernel for family in FAMILIES for name, kernel in family.KERNELS.items()}
