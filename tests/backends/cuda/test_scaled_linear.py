"""Products of e4m3 numbers: the kernel against float64, what the library is asked, what is chosen, handles, a model."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from slow_link import SlowLink
from torch import Tensor
from torch.utils import _pytree as trees

from helios import op
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
from helios_cuda import CudaBackend, packed, scaled
from helios_cuda.choice import Choices, Variant
from helios_cuda.kernels import scaled_linear as kernel
from helios_cuda.launch import Tile, forced, recording
from helios_cuda.offload import Streamed
from helios_cuda.scaled import CHOICES, Form, Quantised

BF16, F32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
UNIT = {BF16: 2.0**-8, F32: 2.0**-24}
QUANTISED = frozenset(("packed_linear", "quantized_linear", "quantized_qkv_linear"))


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHOICES, "record", {})


def body(name: str, *operands: Any, **attrs: Any) -> Any:
    return op.get(name).fn(*operands, **attrs)


def drawn(m: int, n: int, k: int, bias: bool = True, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, Quantised]:
    g = torch.Generator().manual_seed(m + n + k)
    x, weight = torch.randn(m, k, generator=g), torch.randn(n, k, generator=g) * k**-0.5
    b = torch.randn(n, generator=g).to(BF16) if bias else None
    return *body("quantize_rows", x), Quantised(*body("quantize_rows", weight), b, dtype)


def wide(x: Tensor, x_scale: Tensor, w: Quantised) -> tuple[Tensor, Tensor]:
    """The product in float64, and the sum of its terms' sizes."""
    left, right = x.double() * x_scale.double(), w.weight.double() * w.scale.double()
    bias = 0.0 if w.bias is None else w.bias.double()
    return left @ right.T + bias, left.abs() @ right.abs().T + abs(bias)


def run(name: str, handle: Any, *operands: Tensor) -> Any:
    return {**scaled.KERNELS, **packed.KERNELS}[name].run(handle, *operands)


def prepared(name: str, *operands: Any) -> Any:
    prepare = {**scaled.KERNELS, **packed.KERNELS}[name].prepare
    assert prepare is not None
    return prepare(*operands)


# --- the kernel -------------------------------------------------------------------------------------------------------

SIZES = [(5, 48, 32), (7, 17, 33), (65, 640, 512), (300, 272, 1024), (1, 1, 1), (257, 33, 700)]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_are_those_of_float64_but_for_float32_and_one_rounding(
    size: tuple[int, int, int], bias: bool, dtype: torch.dtype
) -> None:
    x, x_scale, w = drawn(*size, bias, dtype)
    out = run("quantized_linear", w, x, x_scale)
    assert (out.dtype, out.shape, out.is_contiguous()) == (dtype, (size[0], size[1]), True)
    exact, terms = wide(x, x_scale, w)
    allowed = UNIT[dtype] * exact.abs() + 8 * UNIT[F32] * terms
    assert bool(((out.double() - exact).abs() <= allowed).all())
    if dtype == BF16:
        assert float((out != exact.to(BF16)).double().mean()) <= 0.002 + 1 / exact.numel()
        same = body("scaled_linear", x, x_scale, w.weight, w.scale, w.bias, dtype=dtype)
        assert float((out != same).double().mean()) <= 0.002 + 1 / exact.numel()


@pytest.mark.parametrize("sizes", [(16, 32, 32, 3), (32, 16, 64, 1), (128, 128, 128, 8)])
def test_tiles_and_their_order_cover_everything_once(sizes: tuple[int, ...]) -> None:
    x, x_scale, w = drawn(150, 90, 140)
    out = run("quantized_linear", w, x, x_scale)
    tile = Tile(dict(zip(("ROWS", "OUTPUTS", "INNER", "GROUP"), sizes, strict=True)))
    with forced(tile):
        other = run("quantized_linear", w, x, x_scale)
    exact, terms = wide(x, x_scale, w)
    assert bool(((other.double() - exact).abs() <= UNIT[BF16] * exact.abs() + 8 * UNIT[F32] * terms).all())
    assert float((out != other).double().mean()) < 0.005


def test_all_codes_are_multiplied_and_a_nan_stays_in_its_row() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(E4M3)
    real = torch.tensor([i for i in range(256) if i & 0x7F != 0x7F])
    ones = torch.ones(1, 1).to(E4M3)
    handle = Quantised(ones, torch.ones(1, 1), None, F32)
    column = codes.view(torch.uint8)[real].view(E4M3)[:, None]
    assert torch.equal(run("quantized_linear", handle, column, torch.ones(254, 1))[:, 0], column[:, 0].float())
    x, x_scale, w = drawn(5, 48, 32)
    x.view(torch.uint8)[3, 7] = 0x7F
    out = run("quantized_linear", w, x, x_scale)
    assert bool(out[3].isnan().all())
    assert not bool(out[[0, 1, 2, 4]].isnan().any())


def test_operands_may_lie_anyhow() -> None:
    x, x_scale, w = drawn(12, 48, 32)
    wanted = run("quantized_linear", w, x, x_scale)
    bytes_ = torch.zeros(12 * 80 + 1, dtype=torch.uint8)
    part = bytes_[1:].view(12, 80)[:, 5:37]  # no address is a multiple of anything
    part.copy_(x.view(torch.uint8))
    scales = torch.zeros(12, 3)
    scales[:, 1:2] = x_scale
    assert torch.equal(run("quantized_linear", w, part.view(E4M3), scales[:, 1:2]), wanted)
    batch = x.view(3, 4, 32).transpose(0, 1)
    out = run("quantized_linear", w, batch, x_scale.view(3, 4, 1).transpose(0, 1))
    assert torch.equal(out, wanted.view(3, 4, 48).transpose(0, 1))
    turned = w.weight.view(torch.uint8).t().contiguous().t().view(E4M3)
    attrs = {"dtype": BF16}
    core = scaled.KERNELS["scaled_linear"].run(x, x_scale, turned, w.scale.expand(48, 2)[:, :1], w.bias, **attrs)
    assert torch.equal(core, wanted)


def test_without_a_dtype_the_result_has_that_of_the_scales() -> None:
    x, x_scale, w = drawn(3, 16, 32)
    out = scaled.KERNELS["scaled_linear"].run(x, x_scale, w.weight, w.scale)
    torch.testing.assert_close(out, body("scaled_linear", x, x_scale, w.weight, w.scale), rtol=2e-6, atol=2e-6)


def test_rows_may_lie_more_than_2_to_the_31_apart() -> None:
    """Though neither the row nor its stride is that large, their product is. An index that wraps ends the process."""
    far = torch.empty(2**31 + 128, dtype=torch.uint8)  # of which only the pages that are written take memory
    x, x_scale, w = drawn(3, 16, 32)
    apart = far.as_strided((3, 32), (2**30 + 16, 1))
    apart.copy_(x.view(torch.uint8))
    out = kernel.scaled_linear(apart.view(E4M3), x_scale.view(-1), w.weight, w.scale.view(-1), w.bias, BF16)
    assert torch.equal(out, run("quantized_linear", w, x, x_scale))


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    w = drawn(1, 16, 32)[2]
    x, scales, wanted = torch.empty(shape), torch.empty(*shape[:-1], 1), (*shape[:-1], 16)
    assert run("quantized_linear", w, x.to(E4M3), scales).shape == wanted
    assert run("packed_linear", w, x.to(BF16)).shape == wanted


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_real_sizes_need_no_memory_to_be_recorded() -> None:
    w = Quantised(meta(13824, 5120, dtype=E4M3), meta(13824, 1, dtype=F32), meta(13824), BF16)
    x = meta(1, 11040, 5120, dtype=E4M3)
    with recording() as launches:
        out = run("quantized_linear", w, x, meta(1, 11040, 1, dtype=F32))
    assert tuple(out.shape) == (1, 11040, 13824)
    (launch,) = launches
    assert launch.grid == (-(-11040 // launch.tile.sizes["ROWS"]) * (13824 // launch.tile.sizes["OUTPUTS"]),)
    assert launch.arguments[0]._base is x  # not copied


# --- the library ------------------------------------------------------------------------------------------------------


def test_the_library_gives_what_ours_gives() -> None:
    """torch's own function, which has the same signature and scales on a CPU."""
    for size in ((7, 48, 32), (65, 640, 512), (1, 16, 16)):
        for bias in (True, False):
            x, x_scale, w = drawn(*size, bias)
            assert scaled._library_takes(x, w) == ""
            assert scaled.alike(scaled._library(x, x_scale, w), run("quantized_linear", w, x, x_scale)) == ""


def strict(
    input: Tensor,
    mat2: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """What torch's CUDA function checks for a scale a row, and what its kernels take for granted."""
    (m, k), (_, n) = input.shape, mat2.shape
    assert (input.dtype, mat2.dtype, mat2.shape[0]) == (E4M3, E4M3, k)
    assert (input.stride(), mat2.stride()) == ((k, 1), (1, k))
    assert input.data_ptr() % 16 == mat2.data_ptr() % 16 == 0
    assert k % 16 == n % 16 == 0
    assert (scale_a.dtype, scale_b.dtype) == (F32, F32)
    assert (scale_a.shape, scale_b.shape) == ((m, 1), (1, n))
    assert scale_a.is_contiguous()
    assert scale_b.t().is_contiguous()
    assert scale_b.stride(1) == 1
    assert out_dtype in (BF16, torch.float16, F32)
    assert bias is None or (bias.dtype == out_dtype != F32 and bias.shape == (n,) and bias.is_contiguous())
    assert scale_result is None
    assert not use_fast_accum
    out = (input.float() @ mat2.float()) * scale_a * scale_b
    return (out if bias is None else out + bias.float()).to(out_dtype)


class OnDevice(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


@pytest.fixture
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake in torch's place, on an H200."""
    monkeypatch.setattr(torch, "_scaled_mm", strict)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("_library")
def test_what_the_library_is_given() -> None:
    x, x_scale, w = drawn(12, 48, 32)
    wanted = run("quantized_linear", w, x, x_scale)
    (key,) = CHOICES.record
    CHOICES.record[key]["variant"] = "torch"
    bytes_ = torch.zeros(12 * 80 + 1, dtype=torch.uint8)
    part = bytes_[1:].view(12, 80)[:, 5:37]
    part.copy_(x.view(torch.uint8))
    for given in (x, part.view(E4M3)):
        out = run("quantized_linear", w, given.as_subclass(OnDevice), x_scale)
        assert torch.equal(out, wanted)
    three = [torch.randn(n, 32).to(BF16) for n in (48, 32, 16)]
    handle = prepared("quantized_qkv_linear", None, None, *three, None, torch.randn(32).to(BF16), None)
    outs = run("quantized_qkv_linear", handle, x, x_scale)
    CHOICES.record[next(name for name in CHOICES.record if name != key)]["variant"] = "torch"
    again = run("quantized_qkv_linear", handle, x.as_subclass(OnDevice), x_scale)
    assert all(torch.equal(a, b) for a, b in zip(outs, again, strict=True))


@pytest.mark.usefixtures("_library")
def test_where_the_library_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(size: tuple[int, int, int], dtype: torch.dtype = BF16, bias: bool = True) -> str:
        x, x_scale, w = drawn(*size, bias, dtype)
        return scaled._library_there(x.as_subclass(OnDevice), x_scale, w)

    assert why((7, 48, 32)) == why((7, 48, 32), F32, bias=False) == ""
    assert "multiples of 16" in why((7, 48, 33))
    assert "multiples of 16" in why((7, 17, 32))
    assert "a bias in bf16 for a result in fp32" in why((7, 48, 32), F32)
    x, x_scale, w = drawn(3, 16, 16)
    assert scaled._library_there(x, x_scale, w) == "no CUDA device"
    large = meta(2**27, 16, dtype=E4M3)
    assert "32 bits" in scaled._library_takes(large, w)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert "no e4m3" in why((7, 48, 32))
    monkeypatch.delattr(torch, "_scaled_mm")
    assert "no scaled product" in why((7, 48, 32))


# --- what is chosen ---------------------------------------------------------------------------------------------------


def choices(library: Callable[..., Tensor]) -> Choices:
    """Ours, which is slow, and a library."""
    ours, theirs = scaled.VARIANTS
    return Choices([Variant(ours.name, ours.run), Variant(theirs.name, library)])


def chosen(library: Callable[..., Tensor]) -> tuple[str, dict[str, Any]]:
    seconds = iter([2.0, 1.0])
    form, among = Form(40, 96, 48, BF16, True), choices(library)
    name = among.choose(str(form), partial(form.drawn, torch.device("cpu")), lambda _: next(seconds), scaled.alike)
    json.dumps(among.record)
    return name, among.record[str(form)]


def test_a_faster_library_is_taken_if_it_is_right() -> None:
    name, entry = chosen(scaled._library)
    assert name == "torch"
    assert entry["seconds"] == {"triton": 2.0, "torch": 1.0}

    def shortened(x: Tensor, x_scale: Tensor, w: Quantised) -> Tensor:
        """As if the sum lost 1 % towards zero on its way: what sums without promotion were seen to do."""
        return scaled._library(x, x_scale, w._replace(scale=w.scale * 0.99))

    def refuses(*_: Any) -> Tensor:
        raise RuntimeError("cutlass cannot run")

    name, entry = chosen(shortened)
    assert name == "triton"
    assert "wrong by" in entry["why_not"]["torch"]
    name, entry = chosen(refuses)
    assert name == "triton"
    assert entry["why_not"]["torch"] == "cutlass cannot run"


def test_results_are_alike_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled, "BLOCK", 8)
    wanted = torch.randn(40, 16).to(BF16)
    neighbours = torch.where(torch.rand(40, 16) < 0.1, wanted * (1 + 2**-7), wanted)
    assert scaled.alike(neighbours, wanted) == ""
    for value in (torch.nan, 1.0):
        wrong = wanted.clone()
        wrong[17, :2] = value
        assert "rows from 16 on" in scaled.alike(wrong, wanted)


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


def test_a_library_of_the_plan_that_is_not_there_is_told() -> None:
    x, x_scale, w = drawn(3, 16, 16)
    run("quantized_linear", w, x, x_scale)
    next(iter(CHOICES.record.values()))["variant"] = "torch"
    with pytest.raises(BackendError, match="no CUDA device"):
        run("quantized_linear", w, x, x_scale)


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
    handles = {
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


def loaded(backend: Backend, precision: str) -> KernelProgram:
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
    backend = ReferenceBackend() if spec == "reference" else select(spec)
    program = loaded(backend, precision)
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


# --- as the compiler makes it -----------------------------------------------------------------------------------------

COMPILE = """
import json, torch
from helios_cuda import offline
from helios_cuda.kernels import scaled_linear
from helios_cuda.launch import recording
from helios_cuda.tables import assumed

def meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")

f32, e4m3, bf16 = torch.float32, torch.float8_e4m3fn, torch.bfloat16
assembly, units = [], offline.units
offline.units = lambda ptx: assembly.append(ptx) or units(ptx)
found = {}
for name in ("sm_89", "sm_90", "sm_100", "sm_120"):
    rows = []
    with assumed(name), recording() as launches:
        for k, n in ((5120, 13824), (13824, 5120)):
            x, weight = meta(11040, k, dtype=e4m3), meta(n, k, dtype=e4m3)
            scales = meta(11040, dtype=f32), meta(n, dtype=f32)
            scaled_linear.scaled_linear(x, scales[0], weight, scales[1], meta(n, dtype=bf16), bf16)
    tiles = scaled_linear._scaled_linear.fitting(name)
    for launch in (*launches, *(launches[0].retiled(tile) for tile in tiles[1:])):
        form = offline.form_of(launch)
        binary = offline.compiled(form, name)
        rows.append([list(offline.problems(form, name, binary, chosen=True)), form.even, sorted(binary.units)])
    loop = [line.split()[0] for line in assembly[-1].splitlines() if line.strip()]
    found[name] = [rows, loop]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_every_tile_compiles_without_spills_and_adds_what_tensor_cores_would_lose() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    kinds = {"sm_89": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "sm_120": "mma.sync"}
    for name, (rows, lines) in found.items():
        assert [wrong for wrong, _, _ in rows] == [[]] * len(rows), name
        assert [even for _, even, _ in rows] == [["x", "weight", "out"]] * len(rows)
        assert {unit for _, _, units in rows for unit in units} == {kinds[name]}
        adds = [i for i, line in enumerate(lines) if line.startswith("add.") and "f32" in line]
        assert bool(adds) == (name in kernel.SHORT_SUMS), name
    _, lines = found["sm_90"]
    products = [i for i, line in enumerate(lines) if line.startswith("wgmma.mma_async")]
    first = next(i for i, line in enumerate(lines) if line.startswith("add.") and "f32" in line)
    assert any(line.startswith("wgmma.wait_group") for line in lines[products[-1] : first])  # its sums are finished
