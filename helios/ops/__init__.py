"""The opset: closed and versioned. Importing this package registers every op; a family a file."""

import functools
import hashlib
import inspect
from typing import Any

from helios import op
from helios.ops import attention as _attention
from helios.ops import conv, layout, linear, norm, patch, pointwise, quantize, resample, rope, sampler

OPSET = 2
"""Raised whenever an op is added, removed or changes meaning; graphs and bundles carry it."""

__all__ = ["OPSET", "opset_hash", "opset_text"]
_families = (_attention, conv, layout, linear, norm, patch, pointwise, quantize, resample, rope, sampler)


def opset_text() -> str:
    """The schemas, one line an op: name, kind, ranks and sizes, operands (``?`` optional, ``*`` a list), attributes."""
    return "\n".join(_schema(op.get(name)) for name in op.names())


def _schema(record: op.Op[Any, Any]) -> str:
    operands = ", ".join(o.name + "?" * o.optional + "*" * o.many for o in record.operands)
    given: dict[str, Any] = dict(record.attrs)
    attrs = ", ".join(k if v is inspect.Parameter.empty else f"{k}={v}" for k, v in given.items())
    return f"{record.name} {record.kind} [{record.dims}] ({operands}) {{{attrs}}}"


@functools.cache
def opset_hash() -> str:
    """SHA-256 of the schemas' text: two hosts with the same hash mean the same ops by the same names."""
    return hashlib.sha256(opset_text().encode()).hexdigest()
