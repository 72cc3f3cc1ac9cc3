"""Norms and RoPE: parts of a fused buffer without a copy, rows far apart, what is launched at the real sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helios import op
from helios_cuda.kernels import KERNELS
from helios_cuda.launch import Launch, Tile, forced, recording

BF16, F32 = torch.bfloat16, torch.float32


def drawn(*shape: int, dtype: torch.dtype = F32, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run(name: str, *operands: Any, **attrs: Any) -> Any:
    return KERNELS[name].run(*operands, **{**op.get(name).attrs, **attrs})


def launched(name: str, *operands: Any, **attrs: Any) -> list[Launch]:
    """With a row a program, as on a GPU."""
    with recording() as launches, forced(Tile({"TOKENS": 1, "ROWS": 1})):
        run(name, *operands, **attrs)
    return launches


def queries_and_keys(dtype: torch.dtype, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """2 videos of 7 tokens, 3 heads × 16 channels; q, the last n tokens, and k are parts of one buffer."""
    buffer = drawn(2, 7, 3 * 48, dtype=dtype)
    q, k, _ = buffer.split(48, dim=2)
    return q[:, 7 - n :], k, drawn(48, seed=4), drawn(48, seed=5), drawn(7, 8, 2, seed=6)


@pytest.mark.parametrize("n", [7, 4])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
def test_parts_of_a_fused_buffer_give_the_same_bits(dtype: torch.dtype, n: int) -> None:
    q, k, *rest = queries_and_keys(dtype, n)
    outs = run("qk_norm_rope", q, k, *rest, heads=3)
    alone = run("qk_norm_rope", q.contiguous(), k.contiguous(), *rest, heads=3)
    wanted = op.get("qk_norm_rope").fn(*(x.double() for x in (q, k, *rest)), heads=3)
    for out, same, right, rows in zip(outs, alone, wanted, (n, 7), strict=True):
        assert out.shape == (2, rows, 3, 16)
        assert out.is_contiguous()
        assert torch.equal(out, same)
        torch.testing.assert_close(out.double(), right, rtol=2**-8 if dtype == BF16 else 1e-5, atol=1e-6)


def test_parts_of_a_fused_buffer_are_not_copied() -> None:
    q, k, v = meta(1, 11040, 3 * 5120).split(5120, dim=2)
    q = q[:, 2400:]
    weight, table = meta(5120), meta(11040, 64, 2, dtype=F32)
    (launch,) = launched("qk_norm_rope", q, k, weight, weight, table, heads=40)
    assert launch.arguments[0] is q
    assert launch.arguments[1]._base is k._base  # heads are a view
    assert launch.grid == (11040, 2)
    (launch,) = launched("rope", v.unflatten(2, (40, 128)), table)
    assert launch.arguments[1]._base is v._base
    assert launch.grid == (11040, 1)
    for name, operands in {"rms_norm": (v, weight), "layer_norm": (v, weight, weight)}.items():
        (launch,) = launched(name, *operands)
        assert launch.arguments[0] is v
        assert launch.grid == (11040,)


def test_heads_may_lie_before_tokens() -> None:
    x, table = drawn(2, 3, 5, 8).transpose(1, 2), drawn(5, 4, 2, seed=4)
    out = run("rope", x, table)
    assert out.is_contiguous()
    assert torch.equal(out, run("rope", x.contiguous(), table))


def test_rows_may_lie_more_than_2_to_the_31_apart() -> None:
    """Though neither the row nor its stride is that large, their product is. An index that wraps ends the process."""
    far = torch.empty(2**31 + 128, dtype=BF16)  # of which only the pages that are written take memory
    x = far.as_strided((1, 3, 48), (0, 2**30 + 16, 1))
    x.copy_(drawn(1, 3, 48))
    assert torch.equal(run("rms_norm", x), run("rms_norm", x.clone()))
    heads, table = x.unflatten(2, (3, 16)), drawn(3, 8, 2)
    for apart in (heads, heads.transpose(1, 2)):
        assert torch.equal(run("rope", apart, table), run("rope", apart.clone(), table))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("weights", [(None, None), (BF16, None), (F32, BF16), (None, F32)], ids=str)
@pytest.mark.parametrize("out", [None, F32], ids=["same", "fp32"])
def test_layer_norm_takes_weights_of_any_dtype(
    dtype: torch.dtype, weights: tuple[torch.dtype | None, ...], out: torch.dtype | None
) -> None:
    x = drawn(2, 3, 40, dtype=dtype)
    weight, bias = (None if w is None else drawn(40, dtype=w, seed=i) for i, w in enumerate(weights))
    came = run("layer_norm", x, weight, bias, dtype=out)
    assert came.dtype == (out or dtype)
    wide = [None if y is None else y.double() for y in (x, weight, bias)]
    unit = torch.finfo(came.dtype).eps
    torch.testing.assert_close(came.double(), op.get("layer_norm").fn(*wide), rtol=max(unit, 2e-6), atol=2e-6)


def test_every_tile_gives_the_same_rows() -> None:
    """Rows, and tokens of two videos, that do not fill the last tile."""
    x, weight = drawn(2, 5, 24, dtype=BF16), drawn(24)
    heads, table = x.unflatten(2, (3, 8)), drawn(5, 4, 2)
    rows, turned = run("rms_norm", x, weight), run("rope", heads, table)
    for size in (1, 4):
        with forced(Tile({"ROWS": size})):
            assert torch.equal(run("rms_norm", x, weight), rows)
        with forced(Tile({"TOKENS": size})):
            assert torch.equal(run("rope", heads, table), turned)


def test_nothing_is_done_for_no_rows() -> None:
    table = torch.empty(0, 4, 2)
    assert run("rms_norm", torch.empty(1, 0, 24)).shape == (1, 0, 24)
    assert run("rope", torch.empty(2, 0, 3, 8), table).shape == (2, 0, 3, 8)
    q, k, *rest = queries_and_keys(F32, 0)
    outs = run("qk_norm_rope", q, k, *rest, heads=3)
    assert [out.shape for out in outs] == [(2, 0, 3, 16), (2, 7, 3, 16)]
