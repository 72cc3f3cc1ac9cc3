"""The Triton kernels, a family a module; each module gives its ``KERNELS`` by op name.

Importing this needs Triton and no GPU. Whether functions are made for the compiler or for the interpreter is decided
here, at import: see ``helios_cuda.interpreter``.
"""

from __future__ import annotations

from collections.abc import Mapping

from helios.backend import Kernel
from helios_cuda.kernels import norm, residual, rope

__all__ = ["KERNELS"]

KERNELS: Mapping[str, Kernel] = {**norm.KERNELS, **residual.KERNELS, **rope.KERNELS}
