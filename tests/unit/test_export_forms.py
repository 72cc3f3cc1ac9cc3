"""Every op in ONNX: checked in full, run by ONNX Runtime, and read back."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from helios import op
from helios.errors import GraphError, InputError, UnsupportedNode
from helios.export.emitter import NEWEST, OLDEST, Options
from helios.export.forms import FORMS, unsupported
from helios.export.model import METADATA, to_model
from helios.export.reimport import to_graph
from helios.export.wire import element
from helios.graph import Builder, Graph, Rate
from helios.op import Sample
from helios.ops import opset_hash

QUANTISED = {
    "dequantize_rows",
    "quantize_rows",
    "scaled_attention",
    "scaled_linear",
    "adaln_quantize",
    "gated_add_adaln_quantize",
    "gelu_quantize",
    "layer_norm_quantize",
    "packed_linear",
    "quantized_attention",
    "quantized_linear",
    "quantized_qkv_linear",
}
OPS = [name for name in op.names() if name not in QUANTISED]


def flat(items: Iterable[Any]) -> list[Any]:
    return [y for x in items for y in (flat(x) if isinstance(x, list | tuple) else [x]) if y is not None]


def graph_of(name: str, inputs: Sequence[Any], attrs: Any, rate: Rate = Rate.STEP) -> Graph:
    """One node, its operands in order as inputs ``i0`` …"""
    numbers = iter(range(99))

    def declared(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return [declared(y) for y in x]
        return None if x is None else build.input(f"i{next(numbers)}", x.shape, x.dtype, rate)

    with Builder(name) as build:
        made = op.get(name)(*[declared(x) for x in inputs], **attrs)
        for i, value in enumerate(made if isinstance(made, tuple) else (made,)):
            build.output(f"o{i}", value)
    return build.graph()


def checked(graph: Graph, options: Options) -> onnx.ModelProto:
    """Through the checker and strict shape inference, after which every value has a shape."""
    model = ir.to_proto(to_model(graph, options))
    onnx.checker.check_model(model, full_check=True)
    known = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    shaped = {v.name for v in (*known.graph.value_info, *known.graph.output) if v.type.tensor_type.HasField("shape")}
    assert {name for node in known.graph.node for name in node.output} <= shaped
    return model


def ran(model: onnx.ModelProto, inputs: Sequence[Tensor]) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    bound = session.io_binding()
    for value, tensor in zip(session.get_inputs(), inputs, strict=True):
        there = tensor.contiguous()
        bound.bind_input(value.name, "cpu", 0, int(element(tensor.dtype)), tuple(there.shape), there.data_ptr())
    for name in names:
        bound.bind_output(name)
    session.run_with_iobinding(bound)
    return [torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()).clone() for value in bound.get_outputs()]


def cases(dtype: torch.dtype, long: bool = True) -> list[Any]:
    return [
        pytest.param(name, sample, id=f"{name}.{sample.name}")
        for name in OPS
        for sample in op.get(name).samples()
        if not sample.big
        and (long or not sample.name.startswith("long"))
        and not (dtype == torch.float16 and sample.name in {"huge", "far", "outliers"})
    ]


def wanted(name: str, inputs: Sequence[Any], sample: Sample) -> tuple[Tensor, ...]:
    made = op.get(name)(*inputs, **sample.attrs)
    return made if isinstance(made, tuple) else (made,)


def doubled(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return [doubled(y) for y in x]
    return x if x is None else x.double()


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    difference = (got.double() - want.double()).norm()
    return float(difference / want.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize(("name", "sample"), cases(torch.float32))
def test_both_forms_compute_what_the_op_does(name: str, sample: Sample) -> None:
    inputs = sample.make(torch.float32)
    graph = graph_of(name, inputs, sample.attrs)
    standard, annotated = (ran(checked(graph, Options(form=f)), flat(inputs)) for f in ("standard", "annotated"))
    for got, same, want in zip(standard, annotated, wanted(name, inputs, sample), strict=True):
        assert torch.equal(got, same)
        assert got.dtype == want.dtype
        assert error(got, want) <= 2e-6


BY_OPSET = {"attention", "gelu", "linear_gelu", "qk_norm_rope", "rms_norm", "rope"}
"""Ops whose form depends on the opset of ONNX; of the others one sample tells whether their form exists there."""


def lower_cases() -> list[Any]:
    every = cases(torch.float32, long=False)
    return [p for p in every if p.values[0] in BY_OPSET or p.values[1].name == first(p.values[0])]


def first(name: str) -> str:
    return op.get(name).samples()[0].name


@pytest.mark.parametrize(("name", "sample"), lower_cases())
def test_lower_opsets_compute_the_same(name: str, sample: Sample) -> None:
    inputs = sample.make(torch.float32)
    graph = graph_of(name, inputs, sample.attrs)
    for opset in (OLDEST, 20):
        made = ran(checked(graph, Options(opset=opset)), flat(inputs))
        for got, want in zip(made, wanted(name, inputs, sample), strict=True):
            assert error(got, want) <= 2e-6


@pytest.mark.parametrize(("name", "sample"), cases(torch.float16, long=False))
def test_what_an_op_rounds_once_is_rounded_once(name: str, sample: Sample) -> None:
    """In 16 bits the form has the op's own error: a second rounding would show at half a unit in the last place."""
    inputs = sample.make(torch.float16)
    graph = graph_of(name, inputs, sample.attrs)
    made = ran(checked(graph, Options()), flat(inputs))
    exact = wanted(name, [doubled(x) for x in inputs], sample)
    for got, body, truth in zip(made, wanted(name, inputs, sample), exact, strict=True):
        assert got.dtype == body.dtype
        assert error(got, truth) <= 1.1 * error(body, truth) + 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OPS)
def test_each_dtype_has_a_form_that_comes_back(name: str, dtype: torch.dtype) -> None:
    for sample in [s for s in op.get(name).samples() if not s.big][:3]:
        graph = graph_of(name, sample.make(dtype), sample.attrs, Rate.CHUNK)
        for form in ("standard", "annotated"):
            model = checked(graph, Options(form=form))
            if form == "annotated":
                assert str(to_graph(ir.from_proto(model))) == str(graph)


@pytest.mark.parametrize("opset", range(OLDEST, NEWEST))
def test_each_opset_takes_bfloat16(opset: int) -> None:
    """Not every op of every opset does: what does not is widened."""
    for name in OPS:
        sample = op.get(name).samples()[0]
        checked(graph_of(name, sample.make(torch.bfloat16), sample.attrs), Options(opset=opset))


def test_a_softmax_of_16_bits_has_float32_scores() -> None:
    x = torch.zeros(1, 5, 2, 8, dtype=torch.bfloat16)
    graph = graph_of("attention", [x, x, x], {})
    for opset in (OLDEST, NEWEST):
        whole = ir.from_proto(checked(graph, Options(opset=opset)))
        inner = [n for n in whole.graph if n.op_type in ("Attention", "Softmax")]
        assert [n.inputs[0].dtype for n in inner if n.inputs[0] is not None] == [ir.DataType.FLOAT]
    trusted = ir.from_proto(checked(graph, Options(wide_attention=False)))
    (node,) = [n for n in trusted.graph if n.op_type == "Attention"]
    (query, _, _) = node.inputs
    assert query is not None
    assert query.dtype == ir.DataType.BFLOAT16
    assert node.attributes["softmax_precision"].as_int() == 1


def test_every_core_op_has_a_form_but_those_of_eight_bits() -> None:
    core = {name for name in op.names() if op.get(name).kind != "fused"}
    assert core - set(FORMS) == {name for name in QUANTISED if op.get(name).kind != "fused"}


def test_an_op_without_a_form_is_named_with_its_shapes() -> None:
    graph = graph_of("quantize_rows", [torch.zeros(2, 5, 24)], {})
    (node,) = graph.nodes
    assert unsupported(node) == "quantize_rows has no form in ONNX"
    with pytest.raises(UnsupportedNode, match=r"quantize_rows\(%i0\)") as caught:
        to_model(graph)
    assert "float8_e4m3fn[2,5,24]" in caught.value.why


def test_a_fused_op_without_a_form_inside_says_which() -> None:
    sample = op.get("gelu_quantize").samples()[0]
    (node,) = graph_of("gelu_quantize", sample.make(torch.float32), sample.attrs).nodes
    assert unsupported(node) == "quantize_rows has no form in ONNX"


@pytest.mark.parametrize("given", [{"form": "loose"}, {"opset": 17}, {"opset": 24}])
def test_options_that_cannot_be_written_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Options(**given)


@functools.cache
def annotated() -> onnx.ModelProto:
    graph = graph_of("rms_norm", [torch.zeros(2, 5, 24), torch.zeros(24)], {})
    return ir.to_proto(to_model(graph, Options(form="annotated")))


def test_metadata_says_what_the_model_is() -> None:
    told = {p.key: p.value for p in annotated().metadata_props}
    graph = to_graph(ir.from_proto(annotated()))
    assert told[f"{METADATA}opset.sha256"] == opset_hash()
    assert told[f"{METADATA}graph.sha256"] == graph.digest
    assert '["i0", "step"]' in told[f"{METADATA}inputs"]


def altered(change: Any) -> ir.Model:
    copy = onnx.ModelProto()
    copy.CopyFrom(annotated())
    change(copy)
    return ir.from_proto(copy)


def test_a_changed_model_is_no_graph() -> None:
    def other_op(m: onnx.ModelProto) -> None:
        m.graph.node[0].op_type = "layer_norm"

    def other_opset(m: onnx.ModelProto) -> None:
        next(p for p in m.metadata_props if p.key.endswith("helios.opset")).value = "1"

    def other_domain(m: onnx.ModelProto) -> None:
        m.graph.node[0].domain = "com.example"

    def other_shape(m: onnx.ModelProto) -> None:
        m.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 23

    told = {other_op: "does not fit", other_opset: "is of opset 1", other_domain: "no op of Helios", other_shape: "23"}
    for change, why in told.items():
        with pytest.raises(GraphError, match=why):
            to_graph(altered(change))
    with pytest.raises(GraphError, match="not an annotated model"):
        to_graph(to_model(to_graph(ir.from_proto(annotated()))))


def test_an_unused_weight_cannot_be_built_in() -> None:
    graph = graph_of("silu", [torch.zeros(2, 3)], {})
    with pytest.raises(GraphError, match="no input 'w'"):
        to_model(graph, initializers={"w": ir.tensor(np.zeros(3, dtype=np.float32))})
