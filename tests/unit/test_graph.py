"""The text form of graphs, and what parsing and verifying refuse."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import helios.ops  # noqa: F401
from helios import op as ops
from helios.errors import GraphError
from helios.graph import DTYPES, Attr, Builder, Graph, Node, Rate, TensorType, Value, format_attr, parse, verify
from helios.ops.layout import concat, full
from helios.ops.linear import linear
from helios.ops.pointwise import cast

F32, BF16 = torch.float32, torch.bfloat16
SAMPLES = [(name, sample.name) for name in ops.names() for sample in ops.get(name).samples()]


def sample_graph(name: str, case: str) -> Graph:
    """One node over the sample's shapes, real ones too: nothing is computed."""
    (sample,) = (s for s in ops.get(name).samples() if s.name == case)
    with Builder(f"{name}-{case}") as build:

        def declare(arg: Any, at: str) -> Any:
            if isinstance(arg, tuple):
                return [declare(a, f"{at}.{i}") for i, a in enumerate(arg)]
            return None if arg is None else build.input(at, arg.shape, arg.dtype or BF16, Rate.STEP)

        operands = [declare(arg, f"a{i}") for i, arg in enumerate(sample.inputs)]
        result = ops.get(name)(*operands, **sample.attrs)
        for i, value in enumerate(result if isinstance(result, tuple) else (result,)):
            build.output(f"y{i}", value)
    return build.graph()


@pytest.mark.parametrize(("name", "case"), SAMPLES)
def test_every_op_comes_back_from_its_text(name: str, case: str) -> None:
    graph = sample_graph(name, case)
    again = parse(str(graph))
    assert again == graph
    assert str(again) == str(graph)
    assert again.digest == graph.digest
    ops.verify(again)


def test_the_samples_have_every_kind_of_operand() -> None:
    nodes = [sample_graph(name, case).nodes[0] for name, case in SAMPLES]
    assert any(len(node.outputs) > 1 for node in nodes)
    assert any(None in node.inputs for node in nodes)
    assert any(isinstance(x, tuple) for node in nodes for x in node.inputs)
    assert any(isinstance(v, torch.dtype) for node in nodes for _, v in node.attrs)
    assert any(isinstance(v, tuple) for node in nodes for _, v in node.attrs)


def test_the_text_is_what_the_contract_says() -> None:
    with Builder("block") as build:
        x = build.input("x", (1, 4, 8), BF16, Rate.STEP)
        w = build.input("blocks.0.w", (2, 8), BF16, Rate.WEIGHTS)
        wide = cast(linear(x, w), dtype=F32)
        build.output("y", concat([wide, wide], dim=1))
    assert str(build.graph()).splitlines() == [
        "graph block {",
        "  input %x: bfloat16[1,4,8] @step",
        "  input %blocks.0.w: bfloat16[2,8] @weights",
        "  %0: bfloat16[1,4,2] = linear(%x, %blocks.0.w, _)",
        "  %1: float32[1,4,2] = cast(%0) {dtype=float32}",
        "  %2: float32[1,8,2] = concat([%1, %1]) {dim=1}",
        "  output y = %2",
        "}",
    ]


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.sampled_from(sorted(DTYPES.values(), key=str)),
)
attrs = st.dictionaries(
    st.from_regex(r"[a-z][a-z_0-9]{0,7}x", fullmatch=True),
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=8),
    max_size=5,
)


def with_attrs(values: dict[str, Attr]) -> Graph:
    x = Value("x", TensorType((2, 3), F32), Rate.STEP)
    y = Value("0", TensorType((), torch.bool), Rate.STEP)
    node = Node("thing", (x, None, (x, x), ()), tuple(sorted(values.items())), (y,))
    return Graph("g", (x,), (node,), (("y", y),))


def exact(value: Attr) -> Any:
    """Apart what Python holds equal: 1, 1.0 and True; 0.0 and -0.0."""
    if isinstance(value, tuple):
        return tuple(exact(v) for v in value)
    return type(value), math.copysign(1.0, value) if isinstance(value, float) else 0, value


@given(attrs)
def test_any_attributes_come_back(values: dict[str, Attr]) -> None:
    graph = with_attrs(values)
    again = parse(str(graph))
    assert str(again) == str(graph)
    assert {k: exact(v) for k, v in again.nodes[0].attrs} == {k: exact(v) for k, v in values.items()}


def test_not_a_number_comes_back() -> None:
    ((_, value),) = parse(str(with_attrs({"v": math.nan}))).nodes[0].attrs
    assert isinstance(value, float)
    assert math.isnan(value)
    assert format_attr(-math.inf) == "-inf"


GOOD = """graph g {
  input %x: float32[2,3] @step
  input %w: float32[3] @weights
  %0: float32[2,3] = add(%x, %w)
  output y = %0
}"""


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("input %x: float32[2,3] @step", "input %x: float33[2,3] @step", "line 2: 'float33[2,3]' is not a tensor type"),
        ("@weights", "@weight", "line 3: unknown rate 'weight': did you mean 'weights'?"),
        ("input %w: float32[3]", "input %x: float32[3]", "line 3: %x is assigned twice"),
        ("add(%x, %w)", "add(%x, %v)", "line 4: %v is used before it is defined"),
        ("add(%x, %w)", "add(%x, %w", "line 4: neither an input, an output nor a node"),
        ("%w)\n", "%w) {a=bfloat17}\n", "line 4: unknown dtype 'bfloat17': did you mean 'bfloat16'?"),
        ("%w)\n", "%w) {a=1, a=2}\n", "line 4: {a=1, a=2} names an attribute twice"),
        ("%w)\n", "%w) {a=1), print(b=2}\n", "line 4: {a=1), print(b=2} is not a list of name=value"),
        ("%w)\n", "%w) {7}\n", "is not a list of name=value"),
        ("%w)\n", "%w) {**{}}\n", "is not a list of name=value"),
        ("%w)\n", "%w) {a=open('x')}\n", "line 4: "),
        ("%w)\n", "%w) {a=2j}\n", "line 4: '2j' is not an attribute value"),
        ("%0: float32[2,3] =", "%x: float32[2,3] =", "line 4: %x is assigned twice"),
        ("output y = %0", "output y = %1", "line 5: %1 is used before it is defined"),
        ("output y = %0", "outputs y = %0", "line 5: neither an input, an output nor a node"),
        ("graph g {", "graf g {", "must start with `graph NAME {`"),
        ("\n}", "", "must start with `graph NAME {` and end with `}`"),
    ],
)
def test_wrong_text(old: str, new: str, text: str) -> None:
    parse(GOOD)
    assert GOOD.count(old) == 1
    with pytest.raises(GraphError) as refused:
        parse(GOOD.replace(old, new))
    assert text in str(refused.value)


def test_no_text() -> None:
    for text in ("", "\n", "}"):
        with pytest.raises(GraphError, match="not a graph"):
            parse(text)


X = Value("x", TensorType((2, 3), F32), Rate.STEP)
W = Value("w", TensorType((3,), F32), Rate.WEIGHTS)
Y = Value("0", TensorType((2, 3), F32), Rate.STEP)
ADD = Node("add", (X, W), (), (Y,))


@pytest.mark.parametrize(
    ("graph", "text"),
    [
        (Graph("g", (X, W, X), (ADD,), (("y", Y),)), "%x is assigned twice"),
        (Graph("g", (X, W), (ADD, ADD), (("y", Y),)), "%0 is assigned twice"),
        (Graph("g", (X,), (ADD,), (("y", Y),)), "add uses %w before it is defined"),
        (Graph("g", (X, W), (), (("y", Y),)), "output y uses %0 before it is defined"),
        (
            Graph("g", (X, W), (dataclasses.replace(ADD, outputs=(dataclasses.replace(Y, rate=Rate.CHUNK),)),), ()),
            "%0 has rate chunk, its inputs step",
        ),
        (
            Graph("g", (dataclasses.replace(X, type=TensorType((2, 3), BF16)), W), (ADD,), ()),
            "takes %x for float32[2,3], but it is bfloat16[2,3]",
        ),
        (Graph("g", (X,), (), (("y", X), ("y", X))), "two outputs share a name"),
        (Graph("g", (dataclasses.replace(X, name="a b"),), (), ()), "'a b' cannot stand in the text form"),
        (Graph("g", (X,), (), (("y = 1", X),)), "'y = 1' cannot stand in the text form"),
        (Graph("a graph", (X,), (), ()), "'a graph' cannot stand in the text form"),
    ],
)
def test_verify_refuses(graph: Graph, text: str) -> None:
    verify(Graph("g", (X, W), (ADD,), (("y", Y),)))
    with pytest.raises(GraphError) as refused:
        verify(graph)
    assert text in str(refused.value)


def test_rates_follow_the_fastest_input() -> None:
    with Builder("g") as build:
        by_rate = {rate: build.input(rate.label, (2, 2), F32, rate) for rate in Rate}
        pairs = [(a, b, concat([by_rate[a], by_rate[b]], dim=0)) for a in Rate for b in Rate]
        constant: Any = full(shape=(1,), value=0.0, dtype=F32)
    assert all(value.rate == max(a, b) for a, b, value in pairs)
    assert constant.rate == Rate.WEIGHTS
    assert [v.name for v in build.graph().inputs_at(Rate.CHUNK)] == ["chunk"]


def test_an_input_is_declared_once() -> None:
    with Builder("g") as build:
        x = build.input("x", (2,), F32, Rate.STEP)
        assert build.input("x", (2,), F32, Rate.STEP) is x or build.input("x", (2,), F32, Rate.STEP) == x
        with pytest.raises(GraphError, match=r"was declared as float32\[2\], and now as float32\[3\]"):
            build.input("x", (3,), F32, Rate.STEP)
    assert len(build.graph().inputs) == 1


def test_builders_nest() -> None:
    with Builder("outer") as outer:
        x = outer.input("x", (2,), F32, Rate.STEP)
        with Builder("inner") as inner:
            ops.get("silu")(inner.input("z", (2,), F32, Rate.STEP))
        ops.get("gelu")(x)
    assert [node.op for node in outer.graph().nodes] == ["gelu"]
    assert [node.op for node in inner.graph().nodes] == ["silu"]


def test_sizes() -> None:
    assert TensorType((2, 3), BF16).nbytes == 12
    assert TensorType((), torch.float64).nbytes == 8
    assert X.ndim == 2
