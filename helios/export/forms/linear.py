"""Matrix products with weights."""

from __future__ import annotations

import math

from helios.export.emitter import Emitter
from helios.export.forms.table import form
from helios.export.wire import Wire

__all__ = ["linear"]


@form
def linear(e: Emitter, x: Wire, weight: Wire, bias: Wire | None = None) -> Wire:
    """As a product of matrices with its bias: an engine can pack the weight as it lies, without a transposed copy."""
    out = weight.sizes[0]
    rows = x.sizes[0] if x.rank == 2 else math.prod(x.sizes[:-1])
    flat = e.reshape(x, (rows, x.sizes[-1]))
    made = e.op("Gemm", flat, weight, bias, sizes=(rows, out), transB=1)
    return e.reshape(made, (*x.sizes[:-1], out))
