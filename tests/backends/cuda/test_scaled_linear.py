"""Products of e4m3 numbers: the kernel against float64, what the library is asked, what is chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from e4m3 import BF16, E4M3, F32, UNIT, body, drawn, prepared, run, wide
from torch import Tensor

from helios.backend import select
from helios.errors import BackendError
from helios_conformance import execute, references, suite
from helios_conformance.draws import Root
from helios_conformance.session import Session
from helios_cuda import packed, scaled
from helios_cuda.choice import Choices, Variant
from helios_cuda.held import Quantised
from helios_cuda.kernels import scaled_linear as kernel
from helios_cuda.launch import Tile, forced, recording
from helios_cuda.scaled import CHOICES, Form


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHOICES, "record", {})


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


# --- the suite --------------------------------------------------------------------------------------------------------

NAMES = sorted({**scaled.KERNELS, **packed.KERNELS})


def judge(name: str, *, long: bool) -> None:
    session = Session(select("cuda:interpret"), Root(11, "n"))
    precision = "fp8-weights" if name in packed.KERNELS else "fp8"
    listed = suite.choose(precision, "quick", ["ops"])
    of_op = [case for case in listed if case.params.get("op") == name and case.check in ("op_values", "op_misfed")]
    cases = [case for case in of_op if (case.params.get("sample") == "long") == long]
    verdicts = {case.id: execute.run_here(case, session, references.committed())[1] for case in cases}
    assert {i: v.reason for i, v in verdicts.items() if v.state != "pass"} == {}
    assert verdicts


@pytest.mark.parametrize("name", NAMES)
def test_products_pass_the_suite(name: str) -> None:
    judge(name, long=False)


@pytest.mark.slow
def test_the_product_of_more_than_8192_rows_passes_the_suite() -> None:
    judge("scaled_linear", long=True)


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


def chosen(library: Callable[..., Tensor], inner: int = 96) -> tuple[str, dict[str, Any]]:
    seconds = iter([2.0, 1.0])
    form, among = Form(40, inner, 48, BF16, True), choices(library)
    name = among.choose(str(form), partial(form.drawn, torch.device("cpu")), lambda _: next(seconds), scaled.alike)
    json.dumps(among.record)
    return name, among.record[str(form)]


def test_a_faster_library_is_taken_if_it_is_right() -> None:
    name, entry = chosen(scaled._library)
    assert name == "torch"
    assert entry["seconds"] == {"triton": 2.0, "torch": 1.0}

    def refuses(*_: Any) -> Tensor:
        raise RuntimeError("cutlass cannot run")

    name, entry = chosen(refuses)
    assert name == "triton"
    assert entry["why_not"]["torch"] == "cutlass cannot run"


def cut(x: Tensor, largest: Tensor) -> Tensor:
    """x without what lies more than 13 bits behind the first one of the largest."""
    unit = torch.exp2(torch.floor(torch.log2(largest.clamp(min=2.0**-99))) - 13)
    return torch.trunc(x / unit) * unit


def short_sums(x: Tensor, x_scale: Tensor, w: Quantised, *, promoted: int) -> Tensor:
    """As tensor cores of Hopper are said to add: 32 products and the sum so far, aligned by the largest and cut."""
    terms = (x.double()[:, None] * w.weight.double()).unflatten(2, (-1, 32))
    total = torch.zeros(terms.shape[:2], dtype=torch.float64)
    short = total
    for i in range(terms.shape[2]):
        largest = torch.maximum(terms[:, :, i].abs().amax(-1), short.abs())
        short = cut(terms[:, :, i], largest[..., None]).sum(-1) + cut(short, largest)
        short = cut(short, short.abs())
        if promoted and 32 * (i + 1) % promoted == 0:
            total, short = (total + short).float().double(), torch.zeros_like(total)
    assert w.bias is not None
    return ((total + short) * x_scale.double() * w.scale.double().T + w.bias.double()).to(w.dtype)


def test_a_library_that_leaves_long_sums_to_the_tensor_cores_is_not_taken() -> None:
    name, entry = chosen(partial(short_sums, promoted=0), inner=5120)
    assert name == "triton"
    assert "wrong by 0.00" in entry["why_not"]["torch"]
    assert chosen(partial(short_sums, promoted=128), inner=5120)[0] == "torch"


def test_results_are_alike_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled, "BLOCK", 8)
    wanted = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).to(BF16)
    neighbours = wanted.clone()
    neighbours[::8, :2] *= 1 + 2**-7
    assert scaled.alike(neighbours, wanted) == ""
    for value in (torch.nan, 1.0):
        wrong = wanted.clone()
        wrong[17, :2] = value
        assert "rows from 16 on" in scaled.alike(wrong, wanted)


def test_a_library_of_the_plan_that_is_not_there_is_told() -> None:
    x, x_scale, w = drawn(3, 16, 16)
    run("quantized_linear", w, x, x_scale)
    next(iter(CHOICES.record.values()))["variant"] = "torch"
    with pytest.raises(BackendError, match="no CUDA device"):
        run("quantized_linear", w, x, x_scale)


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
