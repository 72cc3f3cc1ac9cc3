"""Kernels that quantise rows: the rounding itself, rows in any layout, what is fused, and what is launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from helios import op
from helios_cuda.kernels import KERNELS, numerics, quantize, rows
from helios_cuda.launch import Launch, Tile, forced, recording
from helios_cuda.tables import assumed

E4M3, BF16, F16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "fp16", "fp32"])
NUMBERS = torch.arange(256, dtype=torch.uint8)
SHAPES = [(2, 5, 24), (7, 33), (1, 129), (3, 1), (40,), (2, 3, 4, 128), (2, 300), (1, 2, 13824)]


@triton.jit  # type: ignore[untyped-decorator]
def _to_bytes(x, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(out + at, numerics.e4m3(tl.load(x + at), False))


@triton.jit  # type: ignore[untyped-decorator]
def _to_float(x, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(out + at, numerics.widened(tl.load(x + at), False))


def drawn(*shape: int, dtype: torch.dtype = F32, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run(name: str, *operands: Any, **attrs: Any) -> Any:
    return KERNELS[name].run(*operands, **{**op.get(name).attrs, **attrs})


def body(name: str, *operands: Any, **attrs: Any) -> Any:
    return op.get(name).fn(*operands, **attrs)


def same_bits(came: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    assert [x.shape for x in came] == [x.shape for x in wanted]
    assert [x.dtype for x in came] == [x.dtype for x in wanted]
    kinds = {E4M3: torch.uint8, F32: torch.int32, BF16: torch.int16}
    return all(torch.equal(x.view(kinds[x.dtype]), y.view(kinds[y.dtype])) for x, y in zip(came, wanted, strict=True))


def judge(quantised: tuple[Tensor, Tensor], exact: Tensor) -> None:
    """Against a float64 result that was not rounded: each row's scale, and each number half a step away at most."""
    q, scale = quantised
    assert q.is_contiguous()
    assert scale.is_contiguous()
    assert (q.dtype, scale.dtype) == (E4M3, F32)
    most = exact.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(scale.double(), most / 448, rtol=2e-6, atol=0)
    number = exact * (448 / most)
    step = torch.exp2(torch.clamp(torch.floor(torch.log2(number.abs().clamp(min=1e-30))), min=-6.0) - 3)
    # Sums in another order move a number by parts of 448, not of itself.
    assert ((q.double() - number).abs() <= step / 2 + 448 * 2e-6).all()
    assert (q.float().abs().amax(-1) == 448).all()


def test_bytes_are_widened_exactly() -> None:
    out = torch.empty(256)
    _to_float[1,](NUMBERS, out, 256)
    wanted = NUMBERS.view(E4M3).float()
    assert out.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert torch.equal(out.nan_to_num(1e6), wanted.nan_to_num(1e6))
    assert torch.equal(out.signbit()[:0x7F], wanted.signbit()[:0x7F])


def hard_numbers() -> Tensor:
    """Every e4m3 number, the middle between neighbours, the float32 numbers beside both, and what lies outside."""
    numbers = NUMBERS.view(E4M3).float()
    numbers = torch.unique(numbers[numbers.isfinite()])
    middles = (numbers[1:] + numbers[:-1]) / 2
    exact = torch.cat([numbers, middles])
    beside = [torch.nextafter(exact, torch.full_like(exact, far)) for far in (torch.inf, -torch.inf)]
    outside = [0.0, 464.0, 463.99, 465.0, 480.0, 1e9, 3e38, torch.inf, torch.nan, 2**-9, 2**-10, 1e-30, 1e-45]
    spread = drawn(2048) * torch.logspace(-6, 4, 2048)
    found = torch.cat([exact, *beside, torch.tensor(outside), torch.tensor([-x for x in outside]), spread])
    return torch.cat([found, torch.zeros(4096 - len(found))])


def test_rounding_is_to_nearest_with_ties_to_even() -> None:
    x = hard_numbers()
    out = torch.empty(len(x), dtype=torch.uint8)
    _to_bytes[1,](x, out, len(x))
    wanted = x.clamp(-448, 448).to(E4M3).view(torch.uint8)  # torch's own conversion, which NaN passes
    nan = x.isnan()
    assert ((out & 0x7F == 0x7F) == nan).all()
    assert torch.equal(out[~nan], wanted[~nan])


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_quantised_as_by_the_op(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = drawn(*shape, dtype=dtype) * torch.logspace(-3, 3, shape[0], dtype=dtype).reshape(-1, *[1] * (len(shape) - 1))
    before = x.clone()
    came = run("quantize_rows", x)
    assert same_bits(came, body("quantize_rows", x))
    judge(came, x.double())
    assert torch.equal(x, before)


@pytest.mark.parametrize("at", [0, 31, 32, 127, 128, 299])
def test_the_largest_element_is_found_wherever_it_is(at: int) -> None:
    """The last columns of a row of 300 lie in a tile of 512, with nothing beside them; each row has its own scale."""
    x = drawn(5, 300).clamp(-3, 3)
    x[:, at] = torch.tensor([40.0, -50.0, 60.0, -70.0, 80.0])
    q, scale = run("quantize_rows", x)
    assert torch.equal(scale[:, 0], torch.tensor([40.0, 50.0, 60.0, 70.0, 80.0]) / 448)
    assert q[:, at].float().tolist() == [448, -448, 448, -448, 448]
    _, scale = run("gelu_quantize", x.abs())
    torch.testing.assert_close(scale[:, 0], torch.tensor([40.0, 50.0, 60.0, 70.0, 80.0]) / 448)


LAYOUTS = {
    "a third of a fused buffer, by heads": lambda x: x.reshape(2, 6, 96).split(32, dim=2)[1].unflatten(2, (2, 16)),
    "the last tokens": lambda x: x.reshape(2, 12, 48)[:, 5:],
    "the last tokens of a third, by heads": lambda x: x.reshape(2, 6, 96)[:, 2:, 32:64].unflatten(2, (2, 16)),
    "the last tokens of a third": lambda x: x.reshape(2, 6, 96)[:, 2:, 32:64],
    "heads before tokens": lambda x: x.reshape(1, 12, 4, 24).transpose(1, 2),
    "heads before tokens of two": lambda x: x.reshape(2, 6, 4, 24).transpose(1, 2),
    "columns": lambda x: x.reshape(24, 48).t(),
    "every other element": lambda x: x.reshape(24, 48)[:, ::2],
    "one row for all": lambda x: x[:48].expand(5, 48),
    "one element for all": lambda x: x[:7, None].expand(7, 20),
    "not aligned": lambda x: x[1:].reshape(-1)[:1150].reshape(46, 25),
    "backwards in rows of 1": lambda x: x.reshape(1152, 1)[::3],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_may_lie_in_any_way(layout: str) -> None:
    x = LAYOUTS[layout](drawn(1152, dtype=BF16))
    came = run("quantize_rows", x)
    assert same_bits(came, body("quantize_rows", x))
    assert all(out.is_contiguous() for out in came)
    widened = run("dequantize_rows", LAYOUTS[layout](NUMBERS[:96].repeat(12).view(E4M3)), came[1])
    assert torch.equal(widened, body("dequantize_rows", LAYOUTS[layout](NUMBERS[:96].repeat(12).view(E4M3)), came[1]))


def test_parts_of_a_fused_buffer_are_not_copied() -> None:
    _, _, v = meta(1, 11040, 3 * 5120).split(5120, dim=2)
    heads, noisy = v.unflatten(2, (40, 128)), v[:, 2400:]
    for x, lie in (
        (heads, (441600, 40, 15360, 128)),
        (noisy, (8640, 1, 15360, 0)),
        (meta(2, 11040, 40, 128), (883200, 1, 128, 0)),
        (meta(2, 11040, 5120)[:, 2400:], (17280, 8640, 11040 * 5120, 5120)),
    ):
        (launch,) = launched("quantize_rows", x)
        assert launch.arguments[0] is x
        assert launch.arguments[3:] == lie
        assert launch.grid == (-(-lie[0] // max(1, 8192 // launch.constants["WIDTH"])),)


def launched(name: str, *operands: Any, **attrs: Any) -> list[Launch]:
    """With the tiles of a GPU."""
    with recording() as launches, forced(Tile({"ELEMENTS": 8192, "TOKENS": 1, "ROWS": 1})):
        run(name, *operands, **attrs)
    return launches


def test_rows_may_lie_more_than_2_to_the_31_apart() -> None:
    far = torch.empty(2**31 + 128, dtype=BF16)  # of which only the pages that are written take memory
    x = far.as_strided((1, 3, 48), (0, 2**30 + 16, 1))
    x.copy_(drawn(1, 3, 48))
    assert same_bits(run("quantize_rows", x), run("quantize_rows", x.clone()))
    heads = x.unflatten(2, (3, 16))
    assert same_bits(run("quantize_rows", heads), run("quantize_rows", heads.clone()))


def test_rows_that_no_program_holds() -> None:
    x = drawn(2, quantize.WIDEST + 1, dtype=BF16)
    with recording() as launches:
        came = run("quantize_rows", x)
        gelu = run("gelu_quantize", x)
    assert launches == []
    assert same_bits(came, body("quantize_rows", x))
    assert same_bits(gelu, body("gelu_quantize", x))


@pytest.mark.parametrize("name", ["quantize_rows", "gelu_quantize", "layer_norm_quantize"])
def test_every_tile_gives_the_same_rows(name: str) -> None:
    x = drawn(2, 5, 24, dtype=BF16)
    wanted = run(name, x)
    for size in (1, 4):
        with forced(Tile({"ELEMENTS": 32 * size, "ROWS": size})):
            assert same_bits(run(name, x), wanted)


def test_nothing_is_done_for_no_rows() -> None:
    for name in ("quantize_rows", "gelu_quantize", "layer_norm_quantize"):
        q, scale = run(name, torch.empty(2, 0, 24))
        assert (q.shape, scale.shape) == ((2, 0, 24), (2, 0, 1))
    assert run("dequantize_rows", q, scale, dtype=BF16).shape == (2, 0, 24)


@DTYPES
def test_rows_of_zeros_and_next_to_nothing(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 40, dtype=dtype)
    x[1, 3], x[2, 7], x[3, 39] = 1e-13, -1e-11, torch.finfo(dtype).max
    came = run("quantize_rows", x)
    assert same_bits(came, body("quantize_rows", x))
    assert came[0][0].float().count_nonzero() == 0
    assert came[1][0] == torch.tensor(1e-12) / 448
    assert came[0][3, 39].float() == 448


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["quantize_rows", "gelu_quantize", "layer_norm_quantize"])
def test_nan_and_infinity_stay_in_their_row_and_are_not_lost(name: str, bad: float) -> None:
    x = drawn(1, 6, 24, dtype=BF16)
    clean = run(name, x)
    x[0, 2, 23] = bad
    q, scale = run(name, x)
    wanted_q, wanted = body(name, x)
    assert torch.equal(scale[0, 2].isnan(), wanted[0, 2].isnan())
    assert torch.equal(scale[0, 2].isinf(), wanted[0, 2].isinf())
    assert not scale[0, 2].isfinite()
    assert torch.equal(q[0, 2].float().isnan(), wanted_q[0, 2].float().isnan())
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(q[0, others].float(), clean[0][0, others].float())
    assert torch.equal(scale[0, others], clean[1][0, others])


@DTYPES
@pytest.mark.parametrize("far", [1.0, 30.0])
def test_gelu(dtype: torch.dtype, far: float) -> None:
    x = drawn(2, 5, 183, dtype=dtype) * far
    came = run("gelu_quantize", x)
    judge(came, body("gelu", x.double()))


def test_a_row_that_gelu_makes_small_keeps_its_precision() -> None:
    """All of it far below zero, where a sum of 1 and a hyperbolic tangent has no digits left."""
    x = -torch.rand(3, 64, generator=torch.Generator().manual_seed(3)) - 4.0
    judge(run("gelu_quantize", x), body("gelu", x.double()))


@DTYPES
@pytest.mark.parametrize("weights", [(None, None), (BF16, None), (F32, BF16)], ids=str)
@pytest.mark.parametrize("width", [24, 183])
def test_layer_norm(dtype: torch.dtype, weights: tuple[torch.dtype | None, ...], width: int) -> None:
    x = drawn(2, 9, width + 5, dtype=dtype)[:, 2:, 5:]
    given = [None if w is None else drawn(width, dtype=w, seed=i) for i, w in enumerate(weights)]
    wide = [None if w is None else w.double() for w in given]
    judge(run("layer_norm_quantize", x, *given), body("layer_norm", x.double(), *wide))


@DTYPES
@pytest.mark.parametrize("count", [1, 2])
def test_adaln(dtype: torch.dtype, count: int) -> None:
    x, scale, shift = drawn(2, 7, 40, dtype=dtype), drawn(2, count, 40, seed=4), drawn(2, count, 40, seed=5)
    split = 3 if count == 2 else 0
    came = run("adaln_quantize", x, scale, shift, split=split)
    judge(came, body("adaln", x.double(), scale.double(), shift.double(), split=split))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("branch", [7, 4])
def test_gated_add_adaln(branch: int, gated: bool) -> None:
    x, y = drawn(2, 7, 33, dtype=BF16), drawn(2, branch, 33, dtype=BF16, seed=6)
    gate = drawn(2, 2, 33, seed=7) if gated else None
    scale, shift = drawn(2, 2, 33, seed=4), drawn(2, 2, 33, seed=5)
    splits = {"split": 3, "gate_split": 2 if gated else 0}
    total, q, s = run("gated_add_adaln_quantize", x, y, gate, scale, shift, **splits)
    assert torch.equal(total, run("gated_add_adaln", x, y, gate, scale, shift, **splits)[0])
    judge((q, s), body("adaln", total.double(), scale.double(), shift.double(), split=3))


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "fp16", "fp32"])
def test_all_numbers_are_widened_with_each_rows_scale(dtype: torch.dtype) -> None:
    x = NUMBERS.repeat(3).reshape(24, 32).view(E4M3)
    scale = torch.logspace(-12, 2, 24)[:, None]
    came, wanted = run("dequantize_rows", x, scale, dtype=dtype), body("dequantize_rows", x, scale, dtype=dtype)
    assert came.dtype == dtype
    assert came.isnan().sum() == 6
    assert torch.equal(came.nan_to_num(1e6), wanted.nan_to_num(1e6))


@pytest.mark.parametrize("width", [1, 1000, 1024, 1025, 2049])
def test_columns_beside_the_last_tile_are_widened_too(width: int) -> None:
    x, scale = NUMBERS[:120].repeat(width).reshape(-1, width).view(E4M3), drawn(120, 1)
    assert torch.equal(run("dequantize_rows", x, scale, dtype=BF16), body("dequantize_rows", x, scale, dtype=BF16))


def test_scales_of_another_shape_are_the_bodys() -> None:
    x = NUMBERS[:96].reshape(4, 24).view(E4M3)
    for scale in (drawn(1), drawn(4, 24), drawn(2, 4, 1)):
        with recording() as launches:
            assert torch.equal(run("dequantize_rows", x, scale), body("dequantize_rows", x, scale))
        assert launches == []


@pytest.mark.parametrize(("architecture", "instructions"), [("sm_80", False), ("sm_89", False), ("sm_90", True)])
def test_what_is_launched_at_the_real_sizes(architecture: str, instructions: bool) -> None:
    x, row = meta(1, 11040, 5120), meta(1, 2, 5120, dtype=F32)
    with assumed(architecture):
        assert rows.converts(torch.device("cpu")) == instructions
        found = [
            *launched("adaln_quantize", x, row, row, split=2400),
            *launched("gated_add_adaln_quantize", x, x, row, row, row, split=2400, gate_split=2400),
            *launched("layer_norm_quantize", x[:, 2400:]),
            *launched("gelu_quantize", meta(1, 11040, 13824)),
            *launched("dequantize_rows", meta(13824, 5120, dtype=E4M3), meta(13824, 1, dtype=F32), dtype=BF16),
        ]
    assert [launch.grid for launch in found] == [(11040,), (11040,), (8640,), (11040,), (1728, 5)]
    assert {launch.constants["CONVERTS"] for launch in found} == {instructions}
    assert [launch.kernel.name for launch in found] == [
        *("residual_norm_quantize", "residual_norm_quantize", "norm_quantize", "quantize", "dequantize")
    ]
    assert all(torch.uint8 in {x.dtype for x in launch.arguments if isinstance(x, Tensor)} for launch in found)
