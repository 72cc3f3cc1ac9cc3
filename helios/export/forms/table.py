"""The table of forms, and how one is entered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios.errors import OpError

__all__ = ["FORMS", "Form", "form"]

Form: TypeAlias = Callable[..., Any]
"""Takes an emitter and then what the op takes, with ``Wire``s for tensors; returns a ``Wire``, or a tuple of them."""

FORMS: dict[str, Form] = {}
"""By op name; ops without operands stand here only if their sizes may depend on dimensions."""


def form(fn: Form) -> Form:
    """Enter a function as the form of the op that it is named after."""
    name = fn.__name__.rstrip("_")
    if name in FORMS:
        raise OpError(f"the op {name!r} already has a form in ONNX")
    FORMS[op.get(name).name] = fn
    return fn
