"""One op as the folder of an ONNX backend test: a model, and a test data set a run.

An op that has a form in ONNX is written in it (``helios.export``); any other is one node of the domain ``ai.helios``,
named as the op, with its attributes. ``onnx`` and ``onnx_ir`` are needed for this alone, and only here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from helios.errors import InputError
from helios.graph import DTYPES, Graph, Node
from helios.media.storage import atomic

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import TensorProto

__all__ = ["OPSET", "need", "write"]

OPSET = 20
"""Of ONNX: an older one than the exporter's default, since engines under test may know no newer."""


def need() -> None:
    """Raises InputError where ``onnx`` or ``onnx_ir`` is not installed."""
    try:
        import onnx
        import onnx_ir
    except ImportError as error:
        package = (error.name or "onnx").replace("_", "-")
        raise InputError(
            f"the format onnx needs the package {package}, which is not installed", "pip install onnx onnx-ir"
        ) from error
    del onnx, onnx_ir


def write(
    folder: Path, graph: Graph, told: Mapping[str, Any], inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """``model.onnx`` and ``test_data_set_<run>/`` beside a case's other files.

    Args:
        graph: of one node, with the case's inputs and outputs under their names.
        told: the case, as its case.json says it.
        inputs, expected: by name, as its other files hold them.
    """
    from onnx_ir import to_proto

    _save(folder / "model.onnx", to_proto(_model(graph)))
    for number, run in enumerate(told["runs"]):
        place = folder / f"test_data_set_{number}"
        place.mkdir()
        for kind, named in (("input", inputs), ("output", expected)):
            names = [name for name in told[f"{kind}s"] if name.partition("@")[2] == run]
            for i, name in enumerate(names):
                tensor = named[name] if kind == "input" else named[name].to(DTYPES[told["outputs"][name][0]])
                _save(place / f"{kind}_{i}.pb", _tensor(name.partition("@")[0], tensor))


def _save(path: Path, proto: Any) -> None:
    with atomic(path) as part:
        part.write_bytes(proto.SerializeToString(deterministic=True))


def _tensor(name: str, tensor: Tensor) -> TensorProto:
    from onnx import helper

    from helios.export.wire import element

    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return helper.make_tensor(name, int(element(tensor.dtype)), list(tensor.shape), raw, raw=True)


def _model(graph: Graph) -> ir.Model:
    from helios.export.emitter import Options
    from helios.export.forms import unsupported
    from helios.export.model import to_model

    (node,) = graph.nodes
    return to_model(graph, Options(opset=OPSET)) if unsupported(node) is None else _own(graph, node)


def _own(graph: Graph, node: Node) -> ir.Model:
    """The op as a node of our own domain, which an engine has to know by name."""
    import onnx_ir as ir

    from helios.export.attributes import to_onnx
    from helios.export.emitter import shape_of
    from helios.export.model import DOMAIN, IR_VERSION
    from helios.export.wire import element
    from helios.ops import OPSET as VERSION

    def declared(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(element(dtype)), shape=shape_of(shape))

    values = {v.name: declared(v.name, v.dtype, v.shape) for v in graph.inputs}
    operands = [values[v.name] for v in node.values]
    outputs = [declared(name, v.dtype, v.shape) for name, v in graph.outputs]
    call = ir.Node(DOMAIN, node.op, operands, to_onnx(node.attrs), outputs=outputs)
    domains = {"": OPSET, DOMAIN: VERSION}
    body = ir.Graph([*values.values()], outputs, nodes=[call], opset_imports=domains, name=node.op)
    return ir.Model(body, ir_version=IR_VERSION, producer_name="helios")
