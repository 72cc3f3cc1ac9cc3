"""Quantised ops beyond their samples: bit by bit against arithmetic of our own, and against exact products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helios.errors import OpError
from helios.ops import quantize
from helios.ops.attention import attention
from helios.ops.quantize import (
    E4M3,
    LARGEST,
    SMALLEST,
    dequantize_rows,
    quantize_rows,
    quantized_attention,
    scaled_attention,
    scaled_linear,
)


def e4m3_bits(x: Tensor) -> Tensor:
    """Bits of the e4m3 numbers nearest to finite float32 numbers within ±448, ties to even, by integers alone.

    The sign, four bits of exponent with bias 7, three of mantissa; below 2⁻⁶ multiples of 2⁻⁹.
    """
    bits = x.contiguous().view(torch.int32).to(torch.int64)
    sign, exponent = (bits >> 31) & 1, (bits >> 23) & 0xFF
    mantissa = (bits & 0x7FFFFF) | torch.where(exponent > 0, 1 << 23, 0)
    # The last place of the result is 2**(e - 127 - 3) for normal numbers, 2**-9 below.
    drop = torch.where(exponent >= 121, 20, 20 + 121 - exponent.clamp(min=1)).clamp(max=40)
    kept, rest, half = mantissa >> drop, mantissa & ((1 << drop) - 1), 1 << (drop - 1)
    kept = kept + ((rest > half) | ((rest == half) & (kept & 1 == 1))).long()
    # Of a normal number ``kept`` has its leading one, which the exponent counts once too often.
    return (sign << 7) | torch.where(exponent >= 121, ((exponent - 121) << 3) + kept, kept)


def of_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.uint8).view(E4M3).float()


EVERY = of_bits(torch.arange(127))
"""All e4m3 numbers that are not negative, ascending; 127 is NaN."""


def test_the_bits_stand_for_what_the_format_says() -> None:
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        assert EVERY[code] == value
    assert EVERY[126] == LARGEST
    assert torch.equal(e4m3_bits(EVERY), torch.arange(127))


def tricky() -> Tensor:
    """Every number, every tie, both float32 neighbours of each tie, subnormals and what rounds to zero."""
    ties = (EVERY[1:] + EVERY[:-1]) / 2
    near = [torch.nextafter(ties, torch.tensor(edge)) for edge in (0.0, 1e3)]
    small = torch.tensor([2.0**-10, 2.0**-11, 1e-30, 1e-42, 2.0**-9 * 1.5, 2.0**-6 - 2.0**-11])
    found = torch.cat([EVERY, ties, *near, small])
    return torch.cat([found, -found])


def test_torch_converts_as_the_integers_do() -> None:
    x = torch.cat([tricky(), torch.randn(20000, generator=torch.Generator().manual_seed(1)) * 40])
    assert torch.equal(x.to(E4M3).view(torch.uint8).long(), e4m3_bits(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 3e-7, 5e4])
def test_rows_are_quantised_to_the_bit(dtype: torch.dtype, size: float) -> None:
    """Reciprocal and products in float32, rounded once each; then to nearest, ties to even."""
    draws = torch.Generator().manual_seed(2)
    x = (torch.randn(64, 97, generator=draws) * size * torch.logspace(-3, 3, 64)[:, None]).to(dtype)
    q, scale = quantize_rows(x)
    most = x.float().abs().amax(-1, keepdim=True)
    inverse = (1.0 / most.double()).float()  # float64 has bits enough that rounding twice is rounding once
    factor = (inverse.double() * LARGEST).float()
    product = (x.double() * factor.double()).float().clamp(-LARGEST, LARGEST)
    assert torch.equal(q.view(torch.uint8).long(), e4m3_bits(product))
    assert torch.equal(scale, most / LARGEST)
    assert q.float().abs().amax(-1).eq(LARGEST).all()


def test_ties_within_a_row_go_to_the_even_neighbour() -> None:
    """The row's largest is 448, so its numbers are taken as they are."""
    x = torch.cat([tricky(), torch.tensor([LARGEST])])[None]
    q, scale = quantize_rows(x)
    assert torch.equal(q.view(torch.uint8).long()[0], e4m3_bits(x[0]))
    assert scale.item() == 1.0
    for low, value, even in ((16.0, 17.0, 16.0), (18.0, 19.0, 20.0), (2.0**-9, 2.0**-9 * 1.5, 2.0**-8)):
        assert low < value
        assert quantize_rows(torch.tensor([[value, LARGEST]]))[0].float()[0, 0] == even


def test_a_row_of_zeros_and_one_that_is_nearly_so() -> None:
    x = torch.zeros(3, 5)
    x[1, 2] = SMALLEST / 4
    x[2, 2] = -2 * SMALLEST
    q, scale = quantize_rows(x)
    assert torch.equal(q[0].float(), torch.zeros(5))
    assert scale.flatten().tolist() == pytest.approx([SMALLEST / LARGEST, SMALLEST / LARGEST, 2 * SMALLEST / LARGEST])
    assert q.float()[1, 2] == LARGEST / 4
    assert q.float()[2, 2] == -LARGEST
    assert scale.isfinite().all()
    assert (scale > torch.finfo(torch.float32).tiny).all()


def test_the_largest_and_smallest_finite_numbers_have_finite_results() -> None:
    for top in (3e38, torch.finfo(torch.bfloat16).max):
        q, scale = quantize_rows(torch.tensor([[top, -top, 1.0]]))
        assert q.float().tolist() == [[LARGEST, -LARGEST, 0.0]]
        assert scale.isfinite().all()


def test_rows_know_nothing_of_each_other() -> None:
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(3))
    q, scale = quantize_rows(x)
    one, its = quantize_rows(x[1, 2, 3])
    assert torch.equal(q[1, 2, 3].float(), one.float())
    assert torch.equal(scale[1, 2, 3], its)
    x[0] *= 1000
    assert torch.equal(quantize_rows(x)[0][1].float(), q[1].float())


def test_what_comes_back_is_near_in_each_row() -> None:
    """A number errs by at most 1/16 of itself, or half the least step of its row."""
    x = torch.randn(50, 200, generator=torch.Generator().manual_seed(4)) * torch.logspace(-6, 6, 50)[:, None]
    q, scale = quantize_rows(x)
    back = dequantize_rows(q, scale)
    assert back.dtype == torch.float32
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16, scale * 2.0**-10) * (1 + 1e-6)).all()
    assert torch.equal(dequantize_rows(q, scale, dtype=torch.bfloat16), back.bfloat16())


def random_rows(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    return quantize_rows(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def test_a_scaled_product_is_the_product_of_what_its_operands_stand_for() -> None:
    x, weight = random_rows(5, 2, 9, 96), random_rows(6, 40, 96)
    bias = torch.randn(40, generator=torch.Generator().manual_seed(7))
    wide = [(q.double() * s.double()) for q, s in (x, weight)]
    wanted = wide[0] @ wide[1].T + bias.double()
    for dtype, bound in ((torch.float32, 96 * 2.0**-24), (torch.bfloat16, 2.0**-8)):
        came = scaled_linear(*x, *weight, bias, dtype=dtype)
        assert came.dtype == dtype
        sizes = wide[0].abs() @ wide[1].abs().T + bias.double().abs()
        assert ((came.double() - wanted).abs() <= bound * sizes).all()
    oracle = scaled_linear(x[0].double(), x[1].double(), weight[0].double(), weight[1].double(), bias.double())
    assert torch.allclose(oracle, wanted, rtol=1e-13, atol=1e-13)
    without = scaled_linear(*x, *weight, dtype=torch.float32)
    assert torch.allclose(without + bias, scaled_linear(*x, *weight, bias, dtype=torch.float32), rtol=1e-6, atol=1e-5)


def test_each_scale_reaches_its_own_row_and_column() -> None:
    x, weight = random_rows(8, 5, 32), random_rows(9, 7, 32)
    usual = scaled_linear(*x, *weight)
    x[1][3] *= 4
    weight[1][2] *= 8
    ratio = scaled_linear(*x, *weight) / usual
    wanted = torch.ones(5, 7)
    wanted[3] *= 4
    wanted[:, 2] *= 8
    assert torch.equal(ratio, wanted)


def test_a_product_that_does_not_fit_is_refused() -> None:
    x, weight = random_rows(8, 5, 32), random_rows(9, 7, 31)
    with pytest.raises(OpError, match=r"ends in 32, weight .* takes 31"):
        scaled_linear(*x, *weight)


def heads(seed: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, tokens, 2, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("scale", [None, 0.05])
def test_quantised_attention_is_attention_but_for_the_noise_of_e4m3(scale: float | None) -> None:
    q, k, v = heads(1, 33), heads(2, 65), heads(3, 65)
    plain = attention(q.double(), k.double(), v.double(), scale=scale)
    came = quantized_attention(q, k, v, scale=scale)
    assert came.dtype == torch.bfloat16
    error = float((came.double() - plain).norm() / plain.norm())
    # A number that is rounded errs by 2.6 % in the norm: values and probabilities, and scores through both operands.
    assert 0.01 < error < 0.08
    kept = tuple(t for x in (q, k, v) for t in quantize_rows(x))
    wide = [(kept[i].double() * kept[i + 1].double()) for i in (0, 2, 4)]
    exact = attention(*wide, scale=scale)
    left = float((came.double() - exact).norm() / exact.norm())
    assert left < error, "beside the operands' noise there is only that of the probabilities"
    assert left < 0.03


def test_the_oracle_of_scaled_attention_rounds_no_probability() -> None:
    kept = [t for seed, n in ((1, 9), (2, 17), (3, 17)) for t in quantize_rows(heads(seed, n))]
    wide = [t.double() for t in kept]
    oracle = scaled_attention(*wide)
    exact = attention(*((wide[i] * wide[i + 1]) for i in (0, 2, 4)), scale=None)
    assert torch.allclose(oracle, exact, rtol=1e-12, atol=1e-12)


def test_values_with_scales_of_their_own_keep_their_sizes() -> None:
    """The scale of a value belongs to its probability: tokens a thousand times as large count as such."""
    q, k, v = heads(4, 5, torch.float32), heads(5, 9, torch.float32), heads(6, 9, torch.float32)
    v = v * torch.logspace(-3, 0, 9)[None, :, None, None]
    came = scaled_attention(*quantize_rows(q), *quantize_rows(k), *quantize_rows(v))
    plain = attention(q, k, v, scale=None)
    assert float((came - plain).norm() / plain.norm()) < 0.08


def test_constants() -> None:
    assert torch.finfo(E4M3).max == LARGEST == quantize.LARGEST
    assert math.log2(SMALLEST / LARGEST) > -126, "scales are normal numbers of float32"
