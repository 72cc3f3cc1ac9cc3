"""The op record: schema, checks, recording; and what holds for every op of the opset."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import helios.ops  # noqa: F401
from helios import op as ops
from helios.errors import GraphError, OpError
from helios.graph import Builder, Graph, Node, Rate, TensorType, Value
from helios.op import Arg, Sample
from helios.ops.layout import concat, full
from helios.ops.linear import linear
from helios.ops.norm import rms_norm

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
CASES = [(name, sample.name) for name in ops.names() for sample in ops.get(name).samples() if not sample.big]
BIG = [(name, sample.name) for name in ops.names() for sample in ops.get(name).samples() if sample.big]
FUSED = [(name, case) for name, case in CASES if ops.get(name).kind == "fused"]
QUANTISING = {name for name in ops.names() if "quantize_rows" in inspect.getsource(ops.get(name).fn)}
"""Ops in whose bodies numbers become e4m3: by float32 arithmetic in any case, and by steps without derivatives."""
REFUSED = [(name, case.name) for name in ops.names() for case in ops.get(name).error_cases()]
CONSTANTS = {name for name in ops.names() if not ops.get(name).operands}
# Cases whose values are smaller than gradcheck's difference of 1e-6, which therefore says nothing about them.
TOO_FINE = {(name, case) for name in ("channel_norm", "channel_norm_silu") for case in ("faint", "vanishing")}


def sample_of(name: str, case: str) -> Sample:
    (found,) = (sample for sample in ops.get(name).samples() if sample.name == case)
    return found


def lifted(name: str, case: str, dtype: torch.dtype = F64) -> tuple[list[Any], dict[str, Any]]:
    """Inputs and attributes of a sample with every floating dtype replaced, those that the sample fixes too."""
    sample = sample_of(name, case)
    inputs = [each(x, lambda t: t.to(dtype)) for x in sample.make(dtype)]
    attrs = {key: dtype if isinstance(value, torch.dtype) else value for key, value in sample.attrs.items()}
    return inputs, attrs


def each(x: Any, f: Any) -> Any:
    if x is None:
        return None
    return [f(t) for t in x] if isinstance(x, list) else f(x)


def equal(a: Tensor, b: Tensor) -> bool:
    """Of one dtype and with the same numbers; torch compares none of eight bits."""
    return a.dtype == b.dtype and torch.equal(a.double(), b.double())


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def tensors(inputs: list[Any]) -> list[Tensor]:
    return [t for x in inputs if x is not None for t in (x if isinstance(x, list) else [x])]


def record(name: str, inputs: list[Any], attrs: dict[str, Any]) -> Graph:
    """The op's node over these inputs, as a graph with inputs ``a0, a1, …`` in the order of ``tensors``."""
    counter = iter(range(99))

    def declare(build: Builder, t: Tensor) -> Value:
        return build.input(f"a{next(counter)}", t.shape, t.dtype, Rate.STEP)

    with Builder(name) as build:
        result = ops.get(name)(*(each(x, lambda t: declare(build, t)) for x in inputs), **attrs)
        for i, value in enumerate(result if isinstance(result, tuple) else (result,)):
            build.output(str(i), value)
    return build.graph()


def run(graph: Graph, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs of a graph, node by node with the op bodies."""
    env = {v.name: t for v, t in zip(graph.inputs, inputs, strict=True)}
    for node in graph.nodes:
        operands = [each(list(x) if isinstance(x, tuple) else x, lambda v: env[v.name]) for x in node.inputs]
        results = outputs(ops.get(node.op).fn(*operands, **node.attributes))
        env.update({v.name: t for v, t in zip(node.outputs, results, strict=True)})
    return [env[value.name] for _, value in graph.outputs]


class OnlyFloat64(TorchDispatchMode):
    """Fails on every floating tensor that is made in less than float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                assert tensor.dtype == F64, f"{func} made {tensor.dtype}"
        return result


def test_every_op_has_samples_and_a_docstring() -> None:
    for name in ops.names():
        record_ = ops.get(name)
        assert [s for s in record_.samples() if not s.big], name
        assert record_.__doc__, name
        cases = [s.name for s in record_.samples()]
        assert len(set(cases)) == len(cases), name


def test_the_mode_sees_a_cast() -> None:
    with pytest.raises(AssertionError, match="made torch"), OnlyFloat64():
        torch.ones(2, dtype=F64).float()


@pytest.mark.parametrize(("name", "case"), [case for case in CASES if case[0] not in QUANTISING])
def test_float64_stays_float64(name: str, case: str) -> None:
    inputs, attrs = lifted(name, case)
    with OnlyFloat64():
        results = outputs(ops.get(name)(*inputs, **attrs))
    assert all(t.dtype == F64 for t in results if t.is_floating_point())


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_inference_gives_the_types_of_a_run(name: str, case: str, dtype: torch.dtype) -> None:
    sample = sample_of(name, case)
    inputs = sample.make(dtype)
    before = [t.clone() for t in tensors(inputs)]
    results = outputs(ops.get(name)(*inputs, **sample.attrs))
    (node,) = record(name, inputs, dict(sample.attrs)).nodes
    assert [v.type for v in node.outputs] == [TensorType(tuple(t.shape), t.dtype) for t in results]
    assert all(t.float().isfinite().all() for t in results if t.is_floating_point())
    assert all(equal(a, b) for a, b in zip(before, tensors(inputs), strict=True))


@pytest.mark.parametrize(("name", "case"), BIG)
def test_real_shapes_pass_inference(name: str, case: str) -> None:
    """The 14B samples without their arithmetic."""
    sample = sample_of(name, case)

    def empty(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return [empty(a) for a in arg]
        return None if arg is None else torch.empty(arg.shape, dtype=arg.dtype or BF16, device="meta")

    assert record(name, [empty(a) for a in sample.inputs], dict(sample.attrs)).nodes


def small(t: Tensor) -> bool:
    return t.numel() <= 700


GRADIENTS = [
    (name, case)
    for name, case in CASES
    if name not in CONSTANTS | QUANTISING
    and (name, case) not in TOO_FINE
    and all(map(small, tensors(lifted(name, case)[0])))
]


def test_gradients_are_checked_for_every_op_with_inputs() -> None:
    assert {name for name, _ in GRADIENTS} == set(ops.names()) - CONSTANTS - QUANTISING


@pytest.mark.parametrize(("name", "case"), GRADIENTS)
def test_gradients(name: str, case: str) -> None:
    """Along one random direction (``fast_mode``): every entry of the Jacobian takes part in it."""
    inputs, attrs = lifted(name, case)
    flat = [t.requires_grad_() for t in tensors(inputs)]

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        rest = iter(given)
        return outputs(ops.get(name)(*(each(x, lambda _: next(rest)) for x in inputs), **attrs))

    assert torch.autograd.gradcheck(call, flat, fast_mode=True)


def fused_node(name: str, case: str, dtype: torch.dtype) -> tuple[Node, list[Tensor]]:
    sample = sample_of(name, case)
    inputs = sample.make(dtype)
    (node,) = record(name, inputs, dict(sample.attrs)).nodes
    return node, tensors(inputs)


@pytest.mark.parametrize(("name", "case"), FUSED)
def test_a_fused_op_is_a_composition_of_other_ops(name: str, case: str) -> None:
    """Its expansion computes the very bits of its body."""
    for dtype in (F32, BF16):
        node, given = fused_node(name, case, dtype)
        graph = ops.expand(node)
        assert len(graph.nodes) > 1
        assert name not in {n.op for n in graph.nodes}
        sample = sample_of(name, case)
        wanted = outputs(ops.get(name)(*sample.make(dtype), **sample.attrs))
        for got, want in zip(run(graph, given), wanted, strict=True):
            assert equal(got, want)


def test_expansion_ends_at_core_ops() -> None:
    for name, case in FUSED:
        nodes = list(ops.expand(fused_node(name, case, F32)[0]).nodes)
        assert all(ops.get(node.op).kind != "fused" for node in nodes), name


@pytest.mark.parametrize(("name", "case"), REFUSED)
def test_refusals(name: str, case: str) -> None:
    """Eagerly and when recorded, with the same words."""
    (found,) = (c for c in ops.get(name).error_cases() if c.name == case)
    inputs = Sample(case, found.inputs, found.attrs).make(F32)
    with pytest.raises(OpError) as eager:
        ops.get(name)(*inputs, **found.attrs)
    assert found.match in str(eager.value)
    with pytest.raises(OpError) as recorded:
        record(name, inputs, dict(found.attrs))
    assert str(recorded.value) == str(eager.value)


def test_schema_comes_from_the_signature() -> None:
    linear_ = ops.get("linear")
    assert [(o.name, o.optional, o.many) for o in linear_.operands] == [
        ("x", False, False),
        ("weight", False, False),
        ("bias", True, False),
    ]
    assert [(o.name, o.many) for o in ops.get("concat").operands] == [("xs", True)]
    assert rms_norm.attrs == {"eps": 1e-6}
    assert repr(linear_) == "<op linear>"


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: rms_norm(ones(2, 3)), "x has shape [2, 3], but must have 3 dimensions (b s d)"),
        (lambda: rms_norm(ones(1, 2, 3), ones(4)), "'d' is 4 in weight [4], but 3 in x"),
        (lambda: ops.get("rope")(ones(1, 2, 3, 4), ones(2, 2, 3)), "'2' is 3 in table [2, 2, 3], but 2 in the op"),
        (lambda: ops.get("linear")(ones(2, 3)), "linear: input 'weight' is missing"),
        (lambda: ops.get("linear")(None, ones(2, 3)), "linear: input 'x' is missing"),
        (lambda: ops.get("linear")(ones(2), ones(2, 2), None, None), "takes 3 inputs, got 4"),
        (lambda: ops.get("linear")(ones(2), ones(2, 2), weight=ones(2, 2)), "input 'weight' is given twice"),
        (lambda: ops.get("concat")(ones(2), dim=0), "input 'xs' must be a list of tensors"),
        (lambda: ops.get("add")([ones(2)], ones(2)), "input 'x' must be one tensor"),
        (lambda: ops.get("concat")([ones(2)]), "attribute 'dim' is missing"),
        (lambda: ops.get("rms_norm")(ones(1, 1, 2), epps=1.0), "did you mean 'eps'?"),
        (lambda: ops.get("add")(ones(2), 3.0), "must be all tensors or all graph values, got float"),
        (lambda: ops.get("lineer"), "did you mean 'linear'?"),
    ],
)
def test_wrong_calls(call: Any, text: str) -> None:
    with pytest.raises(OpError) as refused:
        call()
    assert text in str(refused.value)


def test_tensors_and_values_do_not_mix() -> None:
    with Builder("g") as build:
        x = build.input("x", (2, 3), F32, Rate.STEP)
        with pytest.raises(OpError, match="got both"):
            linear(x, ones(4, 3))


def test_values_need_a_builder() -> None:
    x = Value("x", TensorType((2, 3), F32), Rate.STEP)
    with pytest.raises(GraphError, match="outside of"):
        ops.get("silu")(x)


def test_constants_are_recorded_inside_a_builder_and_computed_outside() -> None:
    assert isinstance(full(shape=(2,), value=1.0, dtype=F32), Tensor)
    with Builder("g"):
        value: Any = full(shape=(2,), value=1.0, dtype=F32)
    assert isinstance(value, Value)
    assert value.rate == Rate.WEIGHTS


def test_lists_of_tensors_and_of_values() -> None:
    assert concat([ones(2, 1), ones(2, 3)], dim=1).shape == (2, 4)
    with Builder("g") as build:
        x = build.input("x", (2, 1), F32, Rate.CHUNK)
        y = build.input("y", (2, 3), F32, Rate.STEP)
        assert concat([x, y], dim=1).type == TensorType((2, 4), F32)
    assert build.graph().nodes[0].inputs == ((x, y),)


def test_registration_refuses_a_second_op_and_wrong_dims() -> None:
    with pytest.raises(OpError, match="already has an op 'linear'"):

        @ops.op(dims="... -> ...", kind="move")
        def linear(x: Tensor) -> Tensor:  # type: ignore[unused-ignore]
            return x

    with pytest.raises(OpError, match="does not describe input 'y'"):
        ops.op(dims="b -> b", kind="move")(_two)
    with pytest.raises(OpError, match="describes 3 inputs, the signature has 2"):
        ops.op(dims="b, b, b -> b", kind="move")(_two)
    assert "_two" not in ops.names()


def _two(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def fills() -> Iterator[tuple[str, Tensor]]:
    for fill in ("normal", "outliers", "tiny", "flat", "table", "uniform"):
        shape = (6, 2) if fill == "table" else (6, 183)
        yield fill, Arg(shape, fill, scale=2.0, offset=0.0).make(F64, torch.Generator().manual_seed(1))


def test_fills_are_what_they_say() -> None:
    made = dict(fills())
    assert torch.allclose(made["table"].norm(dim=-1), torch.full((6,), 2.0, dtype=F64))
    assert made["uniform"].min() >= 0
    assert made["uniform"].max() < 2
    rows = made["tiny"].norm(dim=-1)
    assert (rows[::3] < 1e-2 * rows[1]).all()
    assert not made["flat"][::3].any()
    assert made["flat"][1::3].eq(0.75).all()
    assert made["flat"][2::3].std() > 1.0
    channels = made["outliers"].abs().mean(0)
    assert channels[::61].min() > 5 * channels[1:61].mean()
    assert math.isclose(made["normal"].std().item(), 2.0, rel_tol=0.1)


def test_samples_are_the_same_at_every_call_and_rounded_once_from_float64() -> None:
    sample = sample_of("linear", "small")
    for wide, low in zip(sample.make(F64), sample.make(BF16), strict=True):
        assert torch.equal(wide.to(BF16), low)
    assert not torch.equal(sample.make(F64)[0], sample.make(F64, seed=1)[0])


def test_cost_counts_products_and_bytes() -> None:
    with Builder("g") as build:
        x = build.input("x", (2, 5, 24), BF16, Rate.STEP)
        w = build.input("w", (32, 24), BF16, Rate.WEIGHTS)
        linear(x, w)
    cost = ops.cost(build.graph().nodes[0])
    assert cost.flops == 2 * 10 * 24 * 32
    assert cost.bytes == 2 * (10 * 24 + 24 * 32 + 10 * 32)


def graph_of(node: Node) -> Graph:
    inputs = tuple(node.values)
    return Graph("g", inputs, (node,), (("y", node.outputs[0]),))


def test_verify_refuses_what_its_op_would() -> None:
    with Builder("g") as build:
        x = build.input("x", (1, 2, 3), F32, Rate.STEP)
        build.output("y", rms_norm(x))
    (node,) = build.graph().nodes
    ops.verify(graph_of(node))
    (y,) = node.outputs
    wrong = [
        (dataclasses.replace(node, op="rms_nrom"), "did you mean 'rms_norm'"),
        (dataclasses.replace(node, attrs=()), "other attributes than its op: eps"),
        (dataclasses.replace(node, attrs=(*node.attrs, ("split", 1))), "other attributes than its op: split"),
        (dataclasses.replace(node, attrs=(("eps", "much"),)), "the op refuses it"),
        (dataclasses.replace(node, inputs=(x,)), "takes 2 inputs, got 1"),
        (dataclasses.replace(node, inputs=(None, None)), "input 'x' is missing"),
        (
            dataclasses.replace(node, outputs=(dataclasses.replace(y, type=TensorType((1, 2, 3), BF16)),)),
            "its op gives float32[1,2,3]",
        ),
    ]
    for bad, text in wrong:
        rate = max((v.rate for v in bad.values), default=Rate.WEIGHTS)
        outs = tuple(dataclasses.replace(v, rate=rate) for v in bad.outputs)
        with pytest.raises(GraphError) as refused:
            ops.verify(graph_of(dataclasses.replace(bad, outputs=outs)))
        assert text in str(refused.value)
