"""A graph as an ONNX model, standard or annotated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from helios import op
from helios.errors import GraphError, UnsupportedNode
from helios.export.attributes import to_onnx
from helios.export.dynamic import Unified
from helios.export.emitter import Emitter, Options, shape_of
from helios.export.forms import FORMS, Form, unsupported
from helios.export.wire import Sizes, Wire, element
from helios.graph import Graph, Node, Operand, Value
from helios.ops import OPSET, opset_hash

__all__ = ["DOMAIN", "IR_VERSION", "METADATA", "require_forms", "to_model"]

DOMAIN = "ai.helios"
"""Of the functions of the annotated form; its version is that of the opset."""

IR_VERSION = 10
"""The first that has overloads of functions."""

METADATA = "ai.helios."
"""Before each key of ours in a model's metadata."""


def to_model(
    graph: Graph | Unified,
    options: Options | None = None,
    *,
    initializers: Mapping[str, ir.TensorProtocol] | None = None,
    forms: Mapping[str, Form] = FORMS,
) -> ir.Model:
    """The graph as a model.

    Inputs stand in the order of the graph's, without those that are initializers, and under their names; outputs one
    for one in the order of the graph's, under their names, or with ``.out`` behind where
    another value has that name.

    Args:
        graph: with exact sizes; or, of several sizes, unified into one: in the standard form only.
        options: the form, and how it is written.
        initializers: tensors of inputs that are built into the model, by name: weights. They are not read.
        forms: how ops are written, by name: those of Helios unless an engine takes another form better.

    Raises:
        UnsupportedNode: names an op without a form, with its operands' types.
        GraphError: a size that cannot be left open.
    """
    options = options or Options()
    whole = graph if isinstance(graph, Unified) else _exact(graph)
    require_forms(whole.graph, forms)
    if options.form == "annotated" and isinstance(graph, Unified):
        raise GraphError(
            "the annotated form has exact sizes: they are attributes of its ops", fix="--form standard, or no --dynamic"
        )
    return _Model(whole, options, dict(initializers or {}), forms).build()


def require_forms(graph: Graph, forms: Mapping[str, Form] = FORMS) -> None:
    """Raises UnsupportedNode for the first node that has no form in ONNX."""
    for node in graph.nodes:
        reason = unsupported(node, forms)
        if reason is not None:
            operands = ", ".join(f"{value}: {value.type}" for value in node.values)
            raise UnsupportedNode(
                f"graph {graph.name} cannot be exported: {node}\n  operands: {operands}\n  reason: {reason}",
                fix="choose a precision that is not quantised: fp32, bf16 or fp16",
            )


def _exact(graph: Graph) -> Unified:
    """A graph whose sizes are all known, as one of many."""
    sizes = {v.name: v.shape for v in (*graph.inputs, *(v for node in graph.nodes for v in node.outputs))}
    return Unified(graph, dict(sizes), tuple(node.attributes for node in graph.nodes), ({},))


class _Model:
    """Writes the nodes of one graph."""

    def __init__(
        self,
        whole: Unified,
        options: Options,
        initializers: dict[str, ir.TensorProtocol],
        forms: Mapping[str, Form],
    ) -> None:
        self.whole, self.graph, self.options, self.forms = whole, whole.graph, options, forms
        self.emitter = Emitter(options)
        self.emitter.dimension = self.dimension
        self.functions: dict[tuple[str, str], ir.Function] = {}
        self.wires: dict[str, Wire] = {}
        self.inputs: list[ir.Value] = []
        self.built_in: list[ir.Value] = []
        for value in self.graph.inputs:
            self.input(value, initializers.pop(value.name, None))
        if initializers:
            raise GraphError(f"graph {self.graph.name} has no input {next(iter(initializers))!r} to build in")

    def input(self, value: Value, tensor: ir.TensorProtocol | None) -> None:
        wire = self.declared(value)
        wire.value.const_value = tensor
        (self.inputs if tensor is None else self.built_in).append(wire.value)
        self.wires[value.name] = wire

    def declared(self, value: Value) -> Wire:
        sizes = self.sizes(value)
        made = ir.Value(name=value.name, type=ir.TensorType(element(value.dtype)), shape=shape_of(sizes))
        return Wire(made, value.dtype, sizes)

    def dimension(self, symbol: tuple[str, int]) -> Wire:
        """One dimension of an input, as a vector of one."""
        name, axis = symbol
        e = self.emitter
        return e.op("Shape", self.wires[name], sizes=(1,), dtype=torch.int64, start=axis, end=axis + 1)

    def build(self) -> ir.Model:
        write = self.annotated if self.options.form == "annotated" else self.standard
        for node, attributes in zip(self.graph.nodes, self.whole.attributes, strict=True):
            self.emitter.place = node.outputs[0].name
            write(node, attributes)
        body = ir.Graph(
            self.inputs,
            [self.output(name, value) for name, value in self.graph.outputs],
            nodes=self.emitter.nodes,
            initializers=self.built_in,
            opset_imports=self.domains(),
            name=self.graph.name,
        )
        return ir.Model(
            body,
            ir_version=IR_VERSION,
            producer_name="helios",
            functions=list(self.functions.values()),
            metadata_props=self.metadata(),
        )

    def domains(self) -> dict[str, int]:
        own = {DOMAIN: OPSET} if self.options.form == "annotated" else {}
        return {"": self.options.opset, **own}

    def standard(self, node: Node, attributes: Mapping[str, Any]) -> None:
        exact = all(attributes[name] == value for name, value in node.attrs)
        if not node.inputs and exact:
            made: tuple[Wire, ...] = tuple(self.computed(node))
        else:
            self.emitter.expected = tuple(self.sizes(value) for value in node.outputs)
            made = _written(self.emitter, self.forms, node, attributes, self.operands(node), self.sizes)
        self.keep(node, made)

    def computed(self, node: Node) -> Iterator[Wire]:
        """A node without operands: its values are constants of the model."""
        for value, tensor in zip(node.outputs, constants(node), strict=True):
            wire = self.declared(value)
            wire.value.const_value = tensor_adapters.TorchTensor(tensor, name=value.name)
            self.built_in.append(wire.value)
            yield wire

    def annotated(self, node: Node, attributes: Mapping[str, Any]) -> None:
        key = overload(node)
        if (node.op, key) not in self.functions:
            self.functions[node.op, key] = function(node, key, self.options, self.forms)
        made = tuple(self.declared(value) for value in node.outputs)
        inputs = [None if x is None else x.value for x in _flat(self.operands(node))]
        while inputs and inputs[-1] is None:
            inputs.pop()
        call = ir.Node(
            DOMAIN, node.op, inputs, to_onnx(node.attrs), overload=key, outputs=[wire.value for wire in made]
        )
        self.emitter.nodes.append(call)
        self.keep(node, made)

    def sizes(self, value: Value) -> Sizes:
        return self.whole.sizes[value.name]

    def operands(self, node: Node) -> list[Any]:
        return [_mapped(operand, self.wires) for operand in node.inputs]

    def keep(self, node: Node, made: tuple[Wire, ...]) -> None:
        """Remember what a node gave, under its name where it is nobody else's."""
        outputs = {name for name, _ in self.graph.outputs}
        taken = {wire.name for wire in self.wires.values()} | self.emitter.shared
        for value, wire in zip(node.outputs, made, strict=True):
            if wire.name not in taken and value.name not in outputs:
                wire.value.name = value.name
            self.wires[value.name] = wire

    def output(self, name: str, value: Value) -> ir.Value:
        """A value as an output: itself where a node made it under that name, or else a copy."""
        wire = self.wires[value.name]
        if wire.name == name and wire.value.producer() is not None:
            return wire.value
        taken = {known.name for known in self.wires.values()}
        made = self.emitter.op("Identity", wire)
        made.value.name = f"{name}.out" if name in taken else name
        return made.value

    def metadata(self) -> dict[str, str]:
        graph = self.graph
        order = [[v.name, v.rate.label] for v in graph.inputs]
        known = {
            "form": self.options.form,
            "graph": graph.name,
            "graph.sha256": graph.digest,
            "inputs": json.dumps(order),
            "opset": str(OPSET),
            "opset.sha256": opset_hash(),
            "outputs": json.dumps([name for name, _ in graph.outputs]),
        }
        return {METADATA + key: value for key, value in known.items()}


def constants(node: Node) -> tuple[torch.Tensor, ...]:
    """What a node without operands gives: its op's body, on the host."""
    made = op.get(node.op).fn(**node.attributes)
    return made if isinstance(made, tuple) else (made,)


def _mapped(operand: Operand, wires: Mapping[str, Wire]) -> Any:
    if isinstance(operand, tuple):
        return tuple(wires[value.name] for value in operand)
    return None if operand is None else wires[operand.name]


def _flat(operands: list[Any]) -> Iterator[Wire | None]:
    for operand in operands:
        if isinstance(operand, tuple):
            yield from operand
        else:
            yield operand


def _written(
    e: Emitter,
    forms: Mapping[str, Form],
    node: Node,
    attributes: Mapping[str, Any],
    operands: list[Any],
    sizes_of: Callable[[Value], Sizes],
) -> tuple[Wire, ...]:
    """The standard form of a node; of a fused op that of what it is made of."""
    if node.op in forms:
        e.expected = tuple(sizes_of(value) for value in node.outputs)
        made = forms[node.op](e, *operands, **attributes)
        return made if isinstance(made, tuple) else (made,)
    if attributes != node.attributes or any(not isinstance(n, int) for x in _flat(operands) if x for n in x.sizes):
        raise GraphError(f"{node.op} is a fused op: with sizes left open only core ops are written", "expand it first")
    inside = op.expand(node)
    given = [x for x in _flat(operands) if x is not None]
    wires = {value.name: wire for value, wire in zip(node.values, given, strict=True)}
    for part in inside.nodes:
        parts = [_mapped(operand, wires) for operand in part.inputs]
        made = _written(e, forms, part, part.attributes, parts, lambda value: value.shape)
        wires |= {value.name: wire for value, wire in zip(part.outputs, made, strict=True)}
    return tuple(wires[value.name] for _, value in inside.outputs)


def overload(node: Node) -> str:
    """A name for what a node computes: that of its attributes and its operands' types."""
    text = [str(node.attrs), *(_types(operand) for operand in node.inputs)]
    return hashlib.sha256("\x00".join(text).encode()).hexdigest()[:12]


def _types(operand: Operand) -> str:
    if isinstance(operand, tuple):
        return f"[{' '.join(str(value.type) for value in operand)}]"
    return "_" if operand is None else str(operand.type)


def function(node: Node, key: str, options: Options, forms: Mapping[str, Form]) -> ir.Function:
    """The function that a node calls: its standard form, on inputs of exactly these types."""
    e = Emitter(options)
    e.place = node.op
    names: dict[str, Wire] = {}
    inputs: list[ir.Value] = []
    operands = [_parameter(operand, names, inputs) for operand in node.inputs]
    if node.inputs:
        made = _written(e, forms, node, node.attributes, operands, lambda value: value.shape)
    else:
        made = tuple(e.constant(tensor) for tensor in constants(node))
    outputs = [e.op("Identity", wire) for wire in made]
    for i, wire in enumerate(outputs):
        wire.value.name = f"out{i}"
    body = ir.Graph(inputs, [w.value for w in outputs], nodes=e.nodes, opset_imports={"": options.opset}, name=node.op)
    return ir.Function(DOMAIN, node.op, key, graph=body, attributes=_declared(node))


def _parameter(operand: Operand, names: dict[str, Wire], inputs: list[ir.Value]) -> Any:
    """One parameter an operand; an absent one keeps its place."""

    def one(value: Value | None) -> Wire | None:
        made = ir.Value(name=f"in{len(inputs)}")
        inputs.append(made)
        if value is None:
            return None
        made.type, made.shape = ir.TensorType(element(value.dtype)), shape_of(value.shape)
        return Wire(made, value.dtype, value.shape)

    return tuple(one(value) for value in operand) if isinstance(operand, tuple) else one(operand)


def _declared(node: Node) -> list[ir.Attr]:
    """The names of a function's attributes: what they say stands in its calls, and is built into its body."""
    return [ir.Attr(attr.name, attr.type, None) for attr in to_onnx(node.attrs)]
