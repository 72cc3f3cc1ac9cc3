"""The opset: closed and versioned. Importing this package registers every op; a family a file."""

from helios.ops import attention as _attention
from helios.ops import conv, layout, linear, norm, patch, pointwise, resample, rope, sampler

OPSET = 1
"""Raised whenever an op is added, removed or changes meaning; graphs and bundles carry it."""

__all__ = ["OPSET"]
_families = (_attention, conv, layout, linear, norm, patch, pointwise, resample, rope, sampler)
