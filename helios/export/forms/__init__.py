"""How each op is written in ONNX: one table, a family of the opset a file.

A form takes an emitter, and the op's operands and attributes as the op itself does. It accumulates where the op does:
what is rounded once there is widened, computed and rounded here.
"""

from __future__ import annotations

from collections.abc import Mapping

from helios import op
from helios.export.forms import attention, conv, layout, linear, norm, patch, pointwise, resample, rope, sampler
from helios.export.forms.table import FORMS, Form
from helios.graph import Node

__all__ = ["FORMS", "Form", "unsupported"]

_families = (attention, conv, layout, linear, norm, patch, pointwise, resample, rope, sampler)


def unsupported(node: Node, forms: Mapping[str, Form] = FORMS) -> str | None:
    """Why a node has no form in ONNX; ``None`` where it has one. A fused op has one if all that it is made of have."""
    if not node.inputs or node.op in forms:
        return None
    if op.get(node.op).kind != "fused":
        return f"{node.op} has no form in ONNX"
    inside = (unsupported(part, forms) for part in op.expand(node).nodes)
    return next((reason for reason in inside if reason is not None), None)
