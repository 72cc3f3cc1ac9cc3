"""Weights that are held as e4m3 numbers: handles, streaming, what a device must have, a whole model."""

from __future__ import annotations

import gc
from collections.abc import Hashable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from e4m3 import BF16, F32, UNIT, body, drawn, prepared, run
from slow_link import SlowLink
from torch import Tensor
from torch.utils import _pytree as trees

from helios.backend import Backend, ReferenceBackend, select
from helios.errors import BackendError, UnsupportedNode
from helios.graph import Graph, Rate
from helios.kernel_program import KernelProgram
from helios.lower import lower, plan_for
from helios.model import presets
from helios.model.random_weights import RandomWeights
from helios.model.transformer import DenoiseShape, HistoryShape, denoise_graph, frame_indices
from helios.passes.quantize import quantize
from helios.precision import PRECISIONS
from helios_cuda import CudaBackend, scaled
from helios_cuda.failures import sized
from helios_cuda.held import Quantised
from helios_cuda.offload import RESERVE, Streamed
from helios_cuda.scaled import CHOICES

QUANTISED = frozenset(("packed_linear", "quantized_linear", "quantized_qkv_linear"))


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHOICES, "record", {})


# --- handles ----------------------------------------------------------------------------------------------------------


def test_a_weight_is_one_byte_an_element_and_four_a_row() -> None:
    weight, bias = torch.randn(48, 33).to(BF16), torch.randn(2, 48).to(BF16).t()[:, 0]
    for name, operands in (("quantized_linear", (None, None)), ("packed_linear", (None,))):
        handle = prepared(name, *operands, weight, bias)
        q, scale = body("quantize_rows", weight)
        assert torch.equal(handle.weight.view(torch.uint8), q.view(torch.uint8))
        assert torch.equal(handle.scale, scale)
        assert handle.weight.nbytes + handle.scale.nbytes == 48 * (33 + 4)
        assert handle.bias.is_contiguous()
        assert handle.dtype == BF16


@pytest.mark.parametrize("biases", [(None, None, None), (1, None, 1)], ids=["none", "some"])
def test_qkv_is_one_matrix_and_three_views_of_one_buffer(biases: tuple[int | None, ...]) -> None:
    x, x_scale, _ = drawn(10, 16, 24)
    weights = [torch.randn(n, 24).to(BF16) for n in (24, 16, 8)]
    given = [None if b is None else torch.randn(w.shape[0]).to(BF16) for b, w in zip(biases, weights, strict=True)]
    handle = prepared("quantized_qkv_linear", None, None, *weights, *given)
    assert handle.weight.shape == (48, 24)
    assert (handle.bias is None) == (biases[0] is None)
    outs = run("quantized_qkv_linear", handle, x.view(2, 5, 24), x_scale.view(2, 5, 1))
    assert [tuple(o.shape) for o in outs] == [(2, 5, 24), (2, 5, 16), (2, 5, 8)]
    assert len({o.untyped_storage().data_ptr() for o in outs}) == 1
    for out, weight, bias in zip(outs, weights, given, strict=True):
        alone = run("quantized_linear", prepared("quantized_linear", None, None, weight, bias), x, x_scale)
        assert float((out.flatten(0, 1) != alone).double().mean()) < 0.01  # another order of the sum


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
def test_packed_is_the_product_with_the_widened_weight(bias: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 5, 33).to(dtype), (torch.randn(17, 33) * 0.2).to(dtype)
    b = torch.randn(17).to(dtype) if bias else None
    handle = prepared("packed_linear", None, weight, b)
    for given in (x, x.transpose(0, 1), torch.cat([x, x], -1)[..., 33:]):
        out, wanted = run("packed_linear", handle, given), body("packed_linear", given, weight, b)
        assert (out.dtype, out.shape) == (dtype, wanted.shape)
        torch.testing.assert_close(out, wanted, rtol=2 * UNIT[dtype], atol=4 * UNIT[dtype])


def test_handles_stream_as_matrices_do() -> None:
    three = [torch.randn(n, 33).to(BF16) for n in (24, 16, 8)]
    handles: dict[Hashable, Any] = {
        0: prepared("quantized_qkv_linear", None, None, *three, torch.randn(24).to(BF16), None, None),
        1: prepared("quantized_linear", None, None, three[0], None),
        2: prepared("packed_linear", None, three[1], torch.randn(16).to(BF16)),
    }
    streamed = Streamed(SlowLink(), torch.device("cpu"), 0.0, slots=2)
    streamed.update(handles)
    tensors = [x for w in handles.values() for x in (w.weight, w.scale, w.bias) if x is not None]
    assert streamed.nbytes == (0, sum(-(-x.nbytes // 256) * 256 for x in tensors))  # all of them are away
    streamed.begin([0, 1, 2])
    for key, w in handles.items():
        came = streamed[key]
        assert isinstance(came, Quantised)
        assert (came.dtype, came.parts) == (w.dtype, w.parts)
        assert torch.equal(came.weight.view(torch.uint8), w.weight.view(torch.uint8))
        assert torch.equal(came.scale, w.scale)
        assert (came.bias is None and w.bias is None) or torch.equal(came.bias, w.bias)  # type: ignore[arg-type]
    streamed.end()


# --- a model ----------------------------------------------------------------------------------------------------------

SHAPE = DenoiseShape(4, 4, 5, frame_indices((4, 2, 1), 2), HistoryShape(8, 8))


@cache
def graph(precision: str) -> Graph:
    """The smallest transformer's forward with what a precision quantises."""
    found = PRECISIONS[precision]
    plain = denoise_graph(presets.size("tiny").transformer, SHAPE, dtype=found.dtype)
    result, any_ = quantize(plain, found)
    assert any_ == found.quantised
    return result


def loaded(backend: Backend, precision: str) -> Any:
    program = lower({"main": graph(precision)}, backend)
    program.load(RandomWeights({name: v.shape for name, v in program.weight_inputs().items()}, seed=0))
    assert isinstance(program, KernelProgram)
    return program


class Ran(NamedTuple):
    """What a forward gives, the ops that ran as one kernel, and what was recorded of the choices."""

    velocity: Tensor
    fused: frozenset[str]
    record: dict[str, Any]


@cache
def run_model(spec: str, precision: str) -> Ran:
    return forward(loaded(ReferenceBackend() if spec == "reference" else select(spec), precision))


def forward(program: KernelProgram) -> Ran:
    g = torch.Generator().manual_seed(1)
    values = {v.name: v for one in program.plan.graphs.values() for v in one.inputs}
    CHOICES.record = {}

    def inputs(rate: Rate) -> dict[str, Tensor]:
        return {n: torch.randn(values[n].shape, generator=g) for n in sorted(program.input_names(rate))}

    context = program.bind(inputs(Rate.PROMPT))
    context = context | program.bind(inputs(Rate.CHUNK), context)
    step = {"sample": torch.randn(values["sample"].shape, generator=g), "timestep": torch.tensor([500.0])}
    fused = frozenset(name for name, counts in program.coverage.counts.items() if counts["fused"])
    return Ran(program.run("main", step, context)["velocity"].double(), fused, CHOICES.record)


def away(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("precision", ["fp8", "fp8-weights"])
def test_a_forward_is_as_near_to_float64_as_the_reference(precision: str) -> None:
    ours, fused, _ = run_model("cuda:interpret", precision)
    bodies, exact = (run_model("reference", p).velocity for p in (precision, "fp64"))
    error = away(bodies, exact)
    assert away(ours, exact) < 1.1 * error
    assert away(ours, bodies) < error
    assert fused & QUANTISED == ({"packed_linear"} if precision == "fp8-weights" else QUANTISED - {"packed_linear"})


@pytest.mark.parametrize("precision", ["fp8", "fp8-weights"])
def test_the_loader_lets_go_of_what_was_quantised(precision: str) -> None:
    program = loaded(select("cuda:interpret"), precision)
    handles = [h for h in program._handles.values() if isinstance(h, Quantised)]
    nodes = [node for one in program.plan.graphs.values() for node in one.nodes if node.op in QUANTISED]
    weights = {v.name: v for n in nodes for v in n.values if v.rate == Rate.WEIGHTS and len(v.shape) == 2}
    assert weights
    assert not set(weights) & set(program.weights)
    elements = sum(v.shape[0] * v.shape[1] for v in weights.values())
    assert sum(h.weight.nbytes for h in handles) == elements
    assert sum(h.scale.nbytes for h in handles) == 4 * sum(v.shape[0] for v in weights.values())
    others = [h for h in program._handles.values() if not isinstance(h, Quantised)]
    held = {tuple(x.shape) for x in trees.tree_leaves([others, program.weights]) if isinstance(x, Tensor)}
    shapes = {v.shape for v in weights.values()} - held
    assert shapes
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) is Tensor and x.dtype == BF16 and tuple(x.shape) in shapes]
    assert alive == []


class Small(CudaBackend):
    """The interpreter with as much memory as is said, and a link to the host."""

    free = 0

    def __init__(self, free: int, **more: Any) -> None:
        super().__init__("interpret", **more)
        self.free = free

    def memory(self) -> tuple[int, int] | None:
        return self.free, 10 << 30

    def reusable(self) -> int:
        return 0

    def link(self) -> Any:
        return SlowLink()


def test_room_is_needed_for_what_is_held() -> None:
    program = loaded(select("cuda:interpret"), "fp8-weights")
    came = sum(v.type.nbytes for v in program.weight_inputs().values())
    held = [h for h in program._handles.values() if isinstance(h, Quantised)]
    needed = came - sum(h.weight.nbytes - h.scale.nbytes for h in held)
    with pytest.raises(BackendError, match=sized(needed)):
        loaded(Small(needed - 1), "fp8-weights")
    loaded(Small(needed), "fp8-weights")
    there = loaded(Small(RESERVE + needed, memory="low"), "fp8-weights")
    assert "resident_bytes" not in there.execution()


def test_a_forward_with_weights_on_the_host_is_the_same() -> None:
    program = loaded(Small(RESERVE, memory="low"), "fp8")
    kept, fetched = (program.execution()[name] for name in ("resident_bytes", "fetched_bytes"))
    assert kept == 0 < fetched
    assert torch.equal(forward(program).velocity, run_model("cuda:interpret", "fp8").velocity)


# --- devices and plans ------------------------------------------------------------------------------------------------


def test_devices_before_sm_89_are_told_what_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {n.op: n for p in ("fp8", "fp8-attention", "fp8-weights") for n in graph(p).nodes}
    assert {"scaled_linear", "scaled_attention", "quantize_rows", "dequantize_rows"} < set(nodes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    reasons = {name: CudaBackend().supports(node) for name, node in nodes.items()}
    refused = {name: why for name, why in reasons.items() if why is not None}
    assert set(refused) == {"scaled_linear", "scaled_attention"}
    assert all("from sm_89 on" in w and "this is sm_86" in w and "fp8-weights" in w for w in refused.values())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    for backend in (CudaBackend(), select("cuda:interpret")):
        assert not any(backend.supports(node) for node in nodes.values())


def test_fp8_on_such_a_device_is_refused_and_fp8_weights_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    backend = CudaBackend()
    monkeypatch.setattr(CudaBackend, "compile", Backend.compile)
    with pytest.raises(UnsupportedNode, match="this is sm_80: take fp8-weights"):
        lower({"main": graph("fp8")}, backend)
    assert "packed_linear" in lower({"main": graph("fp8-weights")}, backend).coverage.counts


def test_a_form_is_the_same_from_a_plan_and_from_operands() -> None:
    """What was settled before the first run is found by it; and what nobody settled runs in Triton, and is recorded."""
    backend = select("cuda:interpret")
    plan = plan_for({"main": graph("fp8")}, backend)
    forms = scaled.forms(plan)
    scaled.settle(forms, torch.device("cpu"), "nothing")
    assert CHOICES.record == {}
    assert {form.outputs // form.inner for form in forms} >= {1, 3}  # q, k and v are one
    CHOICES.record = {key: dict(entry) for key, entry in run_model("cuda:interpret", "fp8").record.items()}
    assert set(CHOICES.record) == set(map(str, forms))
    assert {entry["variant"] for entry in CHOICES.record.values()} == {"triton"}
    assert isinstance(backend, CudaBackend)
    told = backend.execution_plan()
    assert told["scaled"] == CHOICES.record
    CHOICES.record = {}
    backend.use_execution_plan(told)
    assert CHOICES.record == told["scaled"]
    key = next(iter(told["scaled"]))
    with pytest.raises(BackendError, match="triton 1\\.0"):
        backend.use_execution_plan({"scaled": {key: {**told["scaled"][key], "version": "triton 1.0"}}})
