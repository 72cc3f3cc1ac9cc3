"""The opset: closed and versioned. Importing this package registers every op; a family a file."""

from helios.ops import attention as _attention
from helios.ops import layout, linear, norm, patch, pointwise, rope

OPSET = 1
"""Raised whenever an op is added, removed or changes meaning; graphs and bundles carry it."""

__all__ = ["OPSET"]
_families = (_attention, layout, linear, norm, patch, pointwise, rope)
