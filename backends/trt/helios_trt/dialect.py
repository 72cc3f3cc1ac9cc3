"""What TensorRT's parser wants of a model beyond ONNX; read off its source, as far as that is public.

- Attention is one fused kernel or an error, unless the attribute ``TRT_decomposable`` allows several. In float32 there
  is no fused kernel, and products and softmax by themselves are as exact; in 16 bits they would round scores to 16
  bits, so there only the fused kernel will do. It wants heads of 16 to 256 numbers, a multiple of 8; where others are,
  operands are widened to float32.
- The scale of scores is multiplied to queries and keys, its root to each, in their own type. In bfloat16 that rounds
  both, and is beyond the suite's budget: with the same rounding put into the reference, 5 of the suite's 24 cases of
  attention fail, by up to 9 times. So queries are multiplied here, in float32, and the scale that is left is 1; with
  queries alone rounded, once, all 24 pass.
- Where the parser lacks RMSNormalization, and takes attention, the norm alone is written in smaller ops: without
  attention as one op a score matrix of 19 GB (14b, float32) would have to lie in memory.
- A convolution whose kernel is not an initializer is built in another way, which is made for quantised networks. A
  kernel that is a reshaped initializer therefore becomes an initializer of that shape.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir
import torch

from helios.export.emitter import Options
from helios.graph import Graph, Node

__all__ = ["adapt", "fused_heads", "opset_for", "options_for"]

HALF = (torch.bfloat16, torch.float16)
DECOMPOSABLE = "TRT_decomposable"


def opset_for(lacks: Collection[str]) -> int:
    """Of ONNX, for a parser that lacks these ops of opset 23: the one before, which takes bfloat16 as it does."""
    return 22 if {"Attention", "RotaryEmbedding"} & set(lacks) else 23


def options_for(graph: Graph, lacks: Collection[str]) -> Options:
    """How a graph is written: with wide attention where scores would not be accumulated in float32 otherwise."""
    opset = opset_for(lacks)
    return Options(opset=opset, wide_attention=opset < 23 or not all(map(fused_heads, graph.nodes)))


def fused_heads(node: Node) -> bool:
    """Whether a fused kernel runs the node, if it is attention in 16 bits; of everything else True."""
    if node.op != "attention" or node.outputs[0].dtype not in HALF:
        return True
    head = node.values[0].shape[-1]
    return 16 <= head <= 256 and head % 8 == 0


def adapt(model: ir.Model, lacks: Collection[str]) -> None:
    """Change a model in place, as the module says, for a parser that lacks these ops."""
    for node in list(model.graph):
        if node.op_type == "Attention" and node.inputs[0] is not None:
            if node.inputs[0].dtype == ir.DataType.FLOAT:
                node.attributes[DECOMPOSABLE] = ir.AttrInt64(DECOMPOSABLE, 1)
            else:
                _scale_queries(model.graph, node, node.inputs[0])
        elif node.op_type == "Conv":
            _fold(model.graph, node)
        elif node.op_type == "RMSNormalization" and node.op_type in lacks:
            _normalize(model.graph, node)


def _normalize(graph: ir.Graph, norm: ir.Node) -> None:
    """``x / sqrt(mean(x²) + eps) · scale`` over the last axis, in the type of x: float32, as the graphs write norms."""
    x, scale = norm.inputs
    assert x is not None
    assert scale is not None
    assert x.dtype == scale.dtype == ir.DataType.FLOAT
    assert norm.attributes["axis"].as_int() == -1
    epsilon = ir.AttrTensor("value", ir.tensor(norm.attributes["epsilon"].as_float(), ir.DataType.FLOAT))
    axes = ir.AttrTensor("value", ir.tensor([-1], ir.DataType.INT64))
    square = _node("Mul", [x, x], ir.DataType.FLOAT)
    last = _node("Constant", [], ir.DataType.INT64, value=axes)
    mean = _node("ReduceMean", [square.outputs[0], last.outputs[0]], ir.DataType.FLOAT)
    small = _node("Constant", [], ir.DataType.FLOAT, value=epsilon)
    total = _node("Add", [mean.outputs[0], small.outputs[0]], ir.DataType.FLOAT)
    root = _node("Sqrt", [total.outputs[0]], ir.DataType.FLOAT)
    unit = _node("Div", [x, root.outputs[0]], ir.DataType.FLOAT)
    made = _node("Mul", [unit.outputs[0], scale], ir.DataType.FLOAT)
    _put_before(graph, norm, (square, last, mean, small, total, root, unit, made))
    made.outputs[0].shape = norm.outputs[0].shape
    ir.convenience.replace_all_uses_with(norm.outputs[0], made.outputs[0])
    graph.remove(norm, safe=True)


def _put_before(graph: ir.Graph, node: ir.Node, made: Sequence[ir.Node]) -> None:
    for i, one in enumerate(made):
        one.outputs[0].name = f"{node.outputs[0].name}.part.{i}"
    graph.insert_before(node, made)


def _scale_queries(graph: ir.Graph, attention: ir.Node, queries: ir.Value) -> None:
    """Multiply the queries by the scale in float32, round once, and leave a scale of 1."""
    dtype = queries.dtype
    assert dtype is not None
    scale = attention.attributes["scale"].as_float()
    number = _node("Constant", [], ir.DataType.FLOAT, value=ir.AttrTensor("value", ir.tensor(scale, ir.DataType.FLOAT)))
    wide = _node("Cast", [queries], ir.DataType.FLOAT, to=ir.AttrInt64("to", int(ir.DataType.FLOAT)))
    scaled = _node("Mul", [wide.outputs[0], number.outputs[0]], ir.DataType.FLOAT)
    rounded = _node("Cast", [scaled.outputs[0]], dtype, to=ir.AttrInt64("to", int(dtype)))
    for node in (wide, scaled, rounded):
        node.outputs[0].shape = queries.shape
    number.outputs[0].shape = ir.Shape([])
    _put_before(graph, attention, (number, wide, scaled, rounded))
    attention.replace_input_with(0, rounded.outputs[0])
    attention.attributes["scale"] = ir.AttrFloat32("scale", 1.0)


def _node(kind: str, inputs: list[ir.Value], dtype: ir.DataType, **attributes: ir.Attr) -> ir.Node:
    made = ir.Node("", kind, inputs, list(attributes.values()))
    made.outputs[0].type = ir.TensorType(dtype)
    return made


def _fold(graph: ir.Graph, conv: ir.Node) -> None:
    """Make a kernel that is a reshaped initializer one by itself, at the same place in the same file."""
    kernel = conv.inputs[1]
    reshape = None if kernel is None else kernel.producer()
    if kernel is None or reshape is None or reshape.op_type != "Reshape" or reshape.inputs[0] is None:
        return
    source = reshape.inputs[0].const_value
    if not isinstance(source, ir.ExternalTensor) or kernel.shape is None:
        return
    name = f"{reshape.inputs[0].name}.{kernel.name}"
    shape = ir.Shape(kernel.shape.numpy())
    tensor = ir.ExternalTensor(
        source.location, source.offset, source.length, source.dtype, shape=shape, name=name, base_dir=source.base_dir
    )
    folded = ir.Value(name=name, type=kernel.type, shape=shape, const_value=tensor)
    graph.register_initializer(folded)
    conv.replace_input_with(1, folded)
    _drop(graph, reshape)


def _drop(graph: ir.Graph, reshape: ir.Node) -> None:
    """What nothing reads any more."""
    source = reshape.inputs[0]
    if reshape.outputs[0].uses():
        return
    graph.remove(reshape, safe=True)
    if source is not None and source.name is not None and not source.uses() and source.name in graph.initializers:
        del graph.initializers[source.name]
