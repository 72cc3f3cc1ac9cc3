"""Attention of e4m3 numbers: against float64 and the ops' bodies, in any layout; how operands lie; what is compiled."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helios.ops.quantize import quantize_rows, quantized_attention, scaled_attention
from helios_cuda.kernels import scaled_attention as kernels
from helios_cuda.kernels.attention_rows import BLOCK, laid, padded
from helios_cuda.kernels.scaled_attention import NARROW, quantized, scaled
from helios_cuda.launch import Launch, recording
from helios_cuda.tables import Tile, assumed

F32, BF16, F16, E4M3 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
SIZES = [(1, 5, 1, 2, 33), (2, 3, 128, 1, 20), (1, 257, 130, 1, 6), (1, 4, 300, 1, 160), (2, 140, 161, 2, 128)]
"""Sequences, queries, keys, heads and channels."""
MOST = 1.5
"""Error that a kernel may have, over that of the op's body, which rounds to e4m3 in the same places."""


def drawn(*shape: int, dtype: torch.dtype = BF16, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(b: int, s: int, t: int, h: int, d: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (drawn(b, n, h, d, dtype=dtype, seed=seed) for n, seed in ((s, 1), (t, 2), (t, 3)))
    return q, k, v


def right(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    wide_q, wide_k, wide_v = (x.double().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=scale).transpose(1, 2)


def error(out: Tensor, wanted: Tensor) -> float:
    return float((out.double() - wanted).norm() / wanted.norm())


def require_as_good(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """As near to float64 as the op's body is."""
    out, wanted = quantized(q, k, v, scale=scale), right(q, k, v, scale)
    body = quantized_attention(q, k, v, scale=scale)
    assert isinstance(body, Tensor)
    assert (out.shape, out.dtype, out.is_contiguous()) == (body.shape, body.dtype, True)
    rounding = 2.0**-9 if q.dtype == BF16 else 1e-3
    assert 0 < error(body, wanted) < 0.2
    assert error(out, wanted) <= MOST * error(body, wanted) + rounding
    return out


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("b", "s", "t", "h", "d"), SIZES)
def test_odd_sizes_are_as_near_as_the_body(b: int, s: int, t: int, h: int, d: int, dtype: torch.dtype) -> None:
    require_as_good(*operands(b, s, t, h, d, dtype))


@pytest.mark.parametrize(("b", "s", "t", "h", "d"), SIZES)
def test_given_numbers_and_scales_come_to_the_same(b: int, s: int, t: int, h: int, d: int) -> None:
    q, k, v = operands(b, s, t, h, d)
    given = [*quantize_rows(q), *quantize_rows(k), *quantize_rows(v)]
    out = scaled(*given, dtype=BF16)
    assert torch.equal(out, quantized(q, k, v))
    wide = scaled(*given)
    body = scaled_attention(*given)
    assert (wide.dtype, body.dtype) == (F32, F32)
    exact = right(*(given[i].double() * given[i + 1].double() for i in (0, 2, 4)))  # type: ignore[arg-type]
    assert error(wide, exact) <= MOST * error(body, exact) + 1e-6


@pytest.mark.parametrize("keys", [32, 64])
def test_blocks_of_keys_add_up(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NARROW, "interpreted", Tile({"QUERIES": 64, "KEYS": keys}))
    q, k, v = operands(1, 70, 203, 1, 32)
    out = require_as_good(q, k, v)
    monkeypatch.setattr(NARROW, "interpreted", Tile({"QUERIES": 128, "KEYS": 128}))
    assert error(out, quantized(q, k, v).double()) < 0.04  # other roundings of the same probabilities


def test_each_key_has_its_own_value() -> None:
    """One-hot probabilities: the order of values in memory is the order of the columns of scores."""
    t, d = 61, 64
    q = k = 8.0 * torch.eye(d)[:t].reshape(1, t, 1, d)
    v = drawn(1, t, 1, d, dtype=F32).clamp(-2, 2)
    v[..., 0] = 2.0  # rows of one size, so that 448 is a probability of 1 for each
    numbers, sizes = quantize_rows(v)
    torch.testing.assert_close(quantized(q, k, v, scale=1.0), numbers.float() * sizes, rtol=1e-5, atol=1e-6)


# --- extremes ----------------------------------------------------------------------------------------------------


def test_values_of_very_different_sizes() -> None:
    q, k, v = operands(1, 40, 200, 2, 64, F32)
    require_as_good(q, k, v * torch.logspace(-6, 6, 200).reshape(1, -1, 1, 1))
    require_as_good(q, k, v * torch.logspace(3, -3, 200).reshape(1, -1, 1, 1))


def test_scores_of_hundreds_become_a_choice_and_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest score comes in the last block for one query, and in the first for another."""
    monkeypatch.setattr(NARROW, "interpreted", Tile({"QUERIES": 64, "KEYS": 64}))
    q, k, v = operands(1, 2, 300, 1, 16, F32)
    k[..., 0] = torch.linspace(-60, 60, 300).reshape(1, -1, 1)
    q[0, 0, 0, 0], q[0, 1, 0, 0] = 64.0, -64.0
    out = quantized(q, k, v, scale=1.0)
    body = quantized_attention(q, k, v, scale=1.0)
    assert isinstance(body, Tensor)
    torch.testing.assert_close(out, body, rtol=0.02, atol=0.02)
    assert out.isfinite().all()


def test_a_negative_scale_turns_the_order_and_none_makes_the_mean() -> None:
    q, k, v = operands(1, 4, 70, 1, 16, F32)
    assert torch.equal(quantized(q, k, v, scale=-3.0), quantized(q, -k, v, scale=3.0))
    mean = v.mean(1, keepdim=True).expand(q.shape)
    body = quantized_attention(q, k, v, scale=0.0)
    assert isinstance(body, Tensor)
    assert error(quantized(q, k, v, scale=0.0), mean.double()) <= MOST * error(body, mean.double())


def test_keys_that_are_not_there_do_not_outweigh_scores_far_below_zero() -> None:
    q, k, v = operands(1, 4, 130, 1, 16, F32)
    q[0, :, 0, 0], k[0, :, 0, 0] = 32.0, -32.0
    require_as_good(q, k, v, 1.0)


def test_zeros_give_the_mean_of_values_and_zero_values_zero() -> None:
    zero = torch.zeros(1, 9, 2, 16)
    v = drawn(1, 9, 2, 16, dtype=F32)
    assert error(quantized(zero, zero, v), v.double().mean(1, keepdim=True).expand(v.shape)) < 0.05
    assert torch.equal(quantized(v, v, zero), zero)


@pytest.mark.parametrize(("at", "spoils"), [(0, "row"), (1, "head"), (2, "head")])
def test_nan_reaches_what_the_body_says_and_nothing_else(at: int, spoils: str) -> None:
    given = list(operands(1, 6, 200, 2, 16, F32))
    wanted = quantized(*given)
    given[at][0, 3, 1, 5] = float("nan")
    out = quantized(*given)
    spoiled = torch.zeros_like(out, dtype=torch.bool)
    spoiled[0, 3 if spoils == "row" else slice(None), 1] = True
    body = quantized_attention(*given)
    assert isinstance(body, Tensor)
    assert torch.equal(body.isnan(), spoiled)
    assert torch.equal(out.isnan(), spoiled)
    assert torch.equal(out[~spoiled], wanted[~spoiled])


# --- layouts ----------------------------------------------------------------------------------------------------


def test_thirds_of_a_fused_buffer_and_any_strides() -> None:
    fused = drawn(2, 9, 3, 2, 16)
    before = fused.clone()
    q, k, v = fused.unbind(2)
    assert torch.equal(quantized(q, k, v), quantized(q.clone(), k.clone(), v.clone()))
    heads_first = drawn(2, 2, 9, 16, seed=5).transpose(1, 2)
    channels_apart = drawn(2, 9, 16, 2, seed=6).transpose(2, 3)
    plain = quantized(q.clone(), heads_first.contiguous(), channels_apart.contiguous())
    assert torch.equal(quantized(q, heads_first, channels_apart), plain)
    assert torch.equal(
        quantized(q[:, 4:], k[:, ::2], v[:, ::2]), quantized(*(x.clone() for x in (q[:, 4:], k[:, ::2], v[:, ::2])))
    )
    assert torch.equal(fused, before)


def test_given_scales_may_have_any_strides() -> None:
    q, k, v = operands(2, 5, 7, 3, 16)
    given = [x for one in (q, k, v) for x in quantize_rows(one)]
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    assert torch.equal(scaled(*apart), scaled(*given))


def test_nothing_beyond_a_head_is_read_into_it() -> None:
    wide = [drawn(1, n, 1, 16, seed=n) for n in (5, 200, 200)]
    for x in wide:
        x[..., 12:] = float("nan")
    q, k, v = (x[..., :12] for x in wide)
    require_as_good(q, k, v)


@pytest.mark.parametrize(("tokens", "d"), [(5, 16), (131, 24), (256, 128)])
def test_rows_are_laid_with_heads_outside_and_zeros_behind(tokens: int, d: int) -> None:
    x = drawn(2, tokens, 3, d)
    numbers, sizes = quantize_rows(x)
    made = laid(x, gain=0.5)
    room = math.ceil(tokens / BLOCK) * BLOCK
    assert (made.numbers.shape, made.scales.shape) == ((2, 3, room, padded(d)), (2, 3, room))
    assert (made.tokens, made.width) == (tokens, d)
    assert torch.equal(made.numbers[:, :, :tokens, :d].float(), numbers.float().transpose(1, 2))
    assert torch.equal(made.scales[:, :, :tokens], 0.5 * sizes[..., 0].transpose(1, 2))
    assert not made.numbers[:, :, tokens:].view(torch.uint8).any()
    assert not made.numbers[..., d:].view(torch.uint8).any()
    assert not made.scales[:, :, tokens:].any()


@pytest.mark.parametrize("given", [False, True])
def test_values_are_laid_with_tokens_inside_in_their_order(given: bool) -> None:
    x = drawn(1, 37, 2, 20)
    numbers, sizes = quantize_rows(x)
    made = laid(numbers, sizes, turned=True) if given else laid(x, turned=True)
    assert made.numbers.shape == (1, 2, 32, 128)
    order = torch.tensor(
        [16 * n + 8 * j + 2 * t + e for n in range(8) for t in range(4) for j in (0, 1) for e in (0, 1)]
    )
    assert sorted(order.tolist()) == list(range(128))
    wanted = torch.zeros(1, 2, 32, 128)
    wanted[:, :, :20, :37] = numbers.float().permute(0, 2, 3, 1)
    assert torch.equal(made.numbers.float(), wanted[..., order])
    assert torch.equal(made.scales[:, :, :37], sizes[..., 0].transpose(1, 2))
    assert not made.scales[:, :, 37:].any()


# --- launches ----------------------------------------------------------------------------------------------------


def recorded(s: int, t: int, d: int = 128, dtype: torch.dtype = BF16) -> list[Launch]:
    q, k, v = (torch.empty(1, n, 40, d, dtype=dtype, device="meta") for n in (s, t, t))
    with recording() as launches:
        out = quantized(q, k, v)
    assert (out.shape, out.device.type, out.dtype) == (q.shape, "meta", dtype)
    return launches


@pytest.mark.parametrize(("s", "t", "of_queries", "of_keys"), [(2940, 2940, 23, 23), (8640, 11040, 68, 87)])
def test_three_launches_lay_and_one_attends(s: int, t: int, of_queries: int, of_keys: int) -> None:
    launches = recorded(s, t)
    assert [launch.kernel.name for launch in launches] == ["laid", "laid", "laid", "scaled_attention"]
    assert [launch.grid[0] for launch in launches] == [40 * of_queries, 40 * of_keys, 40 * of_keys, 40 * of_queries]
    assert [launch.constants.get("TURNED") for launch in launches] == [False, False, True, None]


def test_the_parts_of_a_fused_buffer_are_read_where_they_are() -> None:
    fused = torch.empty(1, 64, 3, 2, 128, dtype=BF16, device="meta")
    with recording() as launches:
        quantized(*fused.unbind(2))
    for launch in launches[:3]:
        source = launch.arguments[0]
        assert source.untyped_storage()._cdata == fused.untyped_storage()._cdata


def test_which_tiles_by_head_size_and_shared_memory() -> None:
    assert recorded(16, 16, 160)[-1].kernel.name == "scaled_attention_wide"
    assert recorded(16, 16, 6)[-1].constants["WIDTH"] == 32
    first = {}
    for architecture in ("sm_89", "sm_90", "sm_100", "sm_120"):
        with assumed(architecture):
            first[architecture] = NARROW.fitting(architecture)[0].sizes["KEYS"]
    assert first == {"sm_89": 64, "sm_90": 128, "sm_100": 128, "sm_120": 64}
    assert all(BLOCK % tile.sizes[n] == 0 for tile in NARROW.candidates for n in ("QUERIES", "KEYS"))


def test_kernels_are_those_of_the_ops() -> None:
    assert {name: kernel.run for name, kernel in kernels.KERNELS.items()} == {
        "quantized_attention": quantized,
        "scaled_attention": scaled,
    }


COMPILE = """
import json, sys, torch
from helios_cuda import offline
from helios_cuda.kernels.scaled_attention import quantized
from helios_cuda.launch import recording
from helios_cuda.tables import assumed
architecture, found = sys.argv[1], []
fused = torch.empty(1, 11040, 3, 40, 128, dtype=torch.bfloat16, device="meta")
with assumed(architecture), recording() as launches:
    quantized(*fused.unbind(2))
for launch in launches[1:]:
    form = offline.form_of(launch)
    binary = offline.compiled(form, architecture)
    problems = list(offline.problems(form, architecture, binary, chosen=True))
    products = {unit: n for unit, n in binary.units.items() if "mma" in unit}
    found.append([products, problems, {name: list(widths) for name, widths in binary.access.items()}])
print(json.dumps(found))
"""


def slow(*parameters: object) -> object:
    return pytest.param(*parameters, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("architecture", "products"),
    [
        slow("sm_89", {"mma.sync": 128}),
        ("sm_90", {"wgmma.mma_async": 16}),  # 4 of either product, for whole blocks and the last: 32 bytes each
        slow("sm_100", {"tcgen05.mma": 28}),
        slow("sm_120", {"mma.sync": 128}),
    ],
)
def test_what_runs_unasked_compiles_to_products_of_bytes_without_spills(
    architecture: str, products: dict[str, int]
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, architecture]
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows, turned, attention = json.loads(result.stdout)
    lies = {"numbers": [16], "scales": [4], "x": [16]}
    assert rows == turned == [{}, [], lies]
    read = {name: attention[2][name] for name in ("q", "k", "v", "out")}
    assert (attention[0], attention[1]) == (products, [])
    assert read == {"q": [16], "k": [16], "v": [16], "out": [16]}
