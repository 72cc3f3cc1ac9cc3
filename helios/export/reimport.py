"""An annotated ONNX model back as the graph that it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from helios import op
from helios.errors import GraphError
from helios.export.attributes import from_onnx
from helios.export.model import DOMAIN, METADATA
from helios.export.wire import torch_dtype
from helios.graph import Graph, Node, Operand, Rate, TensorType, Value
from helios.ops import OPSET

__all__ = ["to_graph"]


def to_graph(model: ir.Model) -> Graph:
    """The graph of an annotated model: its nodes are read, not a copy of the text.

    Rates of inputs, the order of weights among them and the names of outputs come from the model's metadata; ops,
    attributes, operands, types and values from its nodes. Weights that are built in become inputs again.

    Raises:
        GraphError: not an annotated model of this opset, a node of another domain, a graph that does not verify, or
            another one than was exported.
    """
    told = _metadata(model)
    values = _inputs(model, told)
    nodes = [_node(node, values) for node in model.graph if not _is_output(node)]
    inputs = tuple(values[name] for name, _ in told["inputs"])
    outputs = tuple(
        (name, _behind(value, values)) for name, value in zip(told["outputs"], model.graph.outputs, strict=True)
    )
    graph = Graph(told["graph"], inputs, tuple(nodes), outputs)
    op.verify(graph)
    if graph.digest != told["graph.sha256"]:
        raise GraphError(
            f"the graph {graph.name} does not fit its digest: the model was changed", fix="export it again"
        )
    return graph


def _metadata(model: ir.Model) -> dict[str, Any]:
    known = {key.removeprefix(METADATA): value for key, value in model.metadata_props.items() if METADATA in key}
    if known.get("form") != "annotated":
        raise GraphError("not an annotated model of Helios", fix="export it with --form annotated")
    if known["opset"] != str(OPSET):
        raise GraphError(f"the model is of opset {known['opset']}, this Helios has {OPSET}", fix="export it again")
    return {**known, "inputs": json.loads(known["inputs"]), "outputs": json.loads(known["outputs"])}


def _inputs(model: ir.Model, told: Mapping[str, Any]) -> dict[str, Value]:
    rates = {rate.label: rate for rate in Rate}
    there = {value.name: value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    absent = [name for name, _ in told["inputs"] if name not in there]
    if absent:
        raise GraphError(f"the model lacks its input {absent[0]!r}", fix="export it again")
    return {name: Value(name, _type(there[name]), rates[rate]) for name, rate in told["inputs"]}


def _type(value: ir.Value) -> TensorType:
    if value.shape is None or any(not isinstance(size, int) for size in value.shape):
        raise GraphError(f"{value.name!r} has no exact shape, which every value of a graph has")
    return TensorType(tuple(int(size) for size in value.shape if isinstance(size, int)), torch_dtype(value.dtype))


def _is_output(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type == "Identity"


def _behind(value: ir.Value, values: Mapping[str, Value]) -> Value:
    """The value that an output is, or is a copy of."""
    producer = value.producer()
    source = producer.inputs[0] if producer is not None and _is_output(producer) else value
    if source is None or source.name not in values:
        raise GraphError(f"the output {value.name!r} is nothing that the graph has made", fix="export it again")
    return values[str(source.name)]


def _node(node: ir.Node, values: dict[str, Value]) -> Node:
    if node.domain != DOMAIN:
        raise GraphError(f"{node.op_type} of the domain {node.domain or 'ai.onnx'!r} is no op of Helios")
    operands = _operands(node, values)
    rate = max((v.rate for v in _given(operands)), default=Rate.WEIGHTS)
    outputs = tuple(Value(str(value.name), _type(value), rate) for value in node.outputs)
    values |= {value.name: value for value in outputs}
    return Node(node.op_type, operands, from_onnx(node.op_type, node.attributes), outputs)


def _given(operands: tuple[Operand, ...]) -> list[Value]:
    flat = [x for operand in operands for x in (operand if isinstance(operand, tuple) else (operand,))]
    return [x for x in flat if x is not None]


def _operands(node: ir.Node, values: Mapping[str, Value]) -> tuple[Operand, ...]:
    """In the order of the op's signature; absent ones at the end are not written in ONNX."""
    given: list[Operand] = [None if x is None else values[str(x.name)] for x in node.inputs]
    declared = op.get(node.op_type).operands
    if any(operand.many for operand in declared):
        return (tuple(x for x in given if isinstance(x, Value)),)
    return (*given, *[None] * (len(declared) - len(given)))
