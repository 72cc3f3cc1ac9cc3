"""The attention kernel beyond the suite's cases: layouts, odd sizes, extreme scores; what is launched and compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helios_cuda.kernels.attention import flash
from helios_cuda.launch import Launch, recording
from helios_cuda.tables import Tile, assumed

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BOUNDS = {F32: 2e-6, BF16: 6e-3, F16: 8e-4}
"""Of the largest error, relative to the largest value: some roundings of the result, and of the probabilities."""
INF = float("inf")


def drawn(*shape: int, dtype: torch.dtype = F32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(b: int, s: int, t: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((s, 1), (t, 2), (t, 3))
    q, k, v = (drawn(b, n, h, d, dtype=dtype, seed=seed) for n, seed in sizes)
    return q, k, v


def right(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    wide_q, wide_k, wide_v = (x.double().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=scale).transpose(1, 2)


def require_close(out: Tensor, wanted: Tensor) -> None:
    assert (out.double() - wanted).abs().max() <= BOUNDS[out.dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("b", "s", "t", "h", "d"),
    [(1, 5, 1, 2, 33), (2, 3, 128, 1, 20), (1, 257, 130, 1, 6), (1, 4, 300, 1, 160)],
    ids=["one key", "a whole block", "blocks of queries", "wide heads, blocks of keys"],
)
def test_odd_sizes(b: int, s: int, t: int, h: int, d: int, dtype: torch.dtype) -> None:
    q, k, v = operands(b, s, t, h, d, dtype)
    out = flash(q, k, v)
    assert (out.shape, out.dtype, out.is_contiguous()) == (q.shape, dtype, True)
    require_close(out, right(q, k, v))


@pytest.mark.parametrize("scale", [0.5, 0.0, -0.25])
def test_scales(scale: float) -> None:
    q, k, v = operands(1, 4, 70, 1, 16, F32)
    require_close(flash(q, k, v, scale=scale), right(q, k, v, scale))


def test_a_negative_scale_turns_the_order_of_large_scores() -> None:
    q, k, v = operands(1, 4, 70, 1, 16, F32)
    torch.testing.assert_close(flash(q, k, v, scale=-30.0).double(), right(q, k, v, -30.0), atol=1e-3, rtol=1e-3)


def test_keys_that_are_not_there_do_not_outweigh_scores_far_below_zero() -> None:
    q, k, v = operands(1, 4, 130, 1, 16, F32)
    q[0, :, 0, 0], k[0, :, 0, 0] = 32.0, -32.0
    torch.testing.assert_close(flash(q, k, v, scale=1.0).double(), right(q, k, v, 1.0), atol=1e-3, rtol=1e-3)


def test_nothing_beyond_a_head_is_read_into_it() -> None:
    wide = [drawn(1, n, 1, 16, seed=n) for n in (5, 200, 200)]
    for x in wide:
        x[..., 12:] = float("nan")
    q, k, v = (x[..., :12] for x in wide)
    require_close(flash(q, k, v), right(q, k, v))


def test_thirds_of_a_fused_buffer_and_heads_before_tokens() -> None:
    fused = drawn(2, 9, 3, 2, 16, dtype=BF16)
    q, k, v = fused.unbind(2)
    require_close(flash(q, k, v), right(q, k, v))
    before = fused.clone()
    tokens_inside = drawn(2, 2, 9, 16, dtype=BF16, seed=5).transpose(1, 2)
    channels_apart = drawn(2, 9, 16, 2, dtype=BF16, seed=6).transpose(2, 3)
    require_close(flash(q, tokens_inside, channels_apart), right(q, tokens_inside, channels_apart))
    require_close(flash(q[:, 4:], k[:, ::2], v[:, ::2]), right(q[:, 4:], k[:, ::2], v[:, ::2]))
    assert torch.equal(fused, before)


def test_one_key_for_all_and_one_head_for_all() -> None:
    q, k, v = operands(1, 5, 7, 2, 16, F32)
    shared = k[:, :1].expand(k.shape)
    torch.testing.assert_close(flash(q, shared, v), v.mean(1, keepdim=True).expand(q.shape), atol=1e-6, rtol=1e-6)
    one_head = v[:, :, :1].expand(v.shape)
    require_close(flash(q, k, one_head), right(q, k, one_head))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_scores_of_thousands_become_a_choice_and_do_not_overflow(dtype: torch.dtype) -> None:
    """The highest score comes in the last block for one query, and in the first for another."""
    q, k, v = operands(1, 2, 300, 1, 16, dtype)
    k[0, 7, 0], k[0, 299, 0] = 64.0, 64.0
    q[0, 0, 0], k[0, 7, 0, 0] = 1.0, 64.0
    q[0, 0, 0, 0], q[0, 1, 0, 0] = 512.0, -512.0
    k[0, :, 0, 0] = torch.linspace(-30, 30, 300).to(dtype)
    require_close(flash(q, k, v, scale=1.0), right(q, k, v, 1.0))


def test_a_score_of_minus_infinity_is_no_key_wherever_it_comes() -> None:
    q, k, v = operands(1, 3, 260, 1, 16, F32)
    q[0, :, 0, 0] = q[0, :, 0, 0].abs()
    hidden = k.clone()
    hidden[0, :130, 0, 0] = -INF  # the whole first block, and more
    require_close(flash(q, hidden, v), right(q, k[:, 130:], v[:, 130:]))
    hidden[0, :, 0, 0] = -INF
    assert flash(q, hidden, v).isnan().all()  # none is left


def test_nan_reaches_what_it_should_and_nothing_else() -> None:
    q, k, v = operands(1, 4, 200, 2, 16, F32)
    wanted = flash(q, k, v)
    q[0, 2, 1, 3] = float("nan")
    v[0, 150, 0, 5] = float("nan")
    out = flash(q, k, v)
    spoiled = torch.zeros_like(out, dtype=torch.bool)
    spoiled[0, 2, 1], spoiled[0, :, 0, 5] = True, True
    assert torch.equal(out.isnan(), spoiled)
    assert torch.equal(out[~spoiled], wanted[~spoiled])


def recorded(s: int, t: int, d: int = 128, dtype: torch.dtype = BF16) -> Launch:
    q, k, v = (torch.empty(1, n, 40, d, dtype=dtype, device="meta") for n in (s, t, t))
    with recording() as launches:
        out = flash(q, k, v)
    assert (out.shape, out.device.type) == (q.shape, "meta")
    (launch,) = launches
    return launch


@pytest.mark.parametrize(("s", "t", "blocks"), [(2940, 2940, 12), (8640, 11040, 34), (8640, 512, 34), (256, 5, 1)])
def test_a_program_for_each_block_of_queries_of_each_head(s: int, t: int, blocks: int) -> None:
    launch = recorded(s, t)
    assert launch.tile.sizes["QUERIES"] == 256  # the interpreter's
    assert launch.grid == (40 * blocks,)


@pytest.mark.parametrize(
    ("d", "dtype", "name", "width"),
    [(128, BF16, "attention", 128), (12, F16, "attention", 16), (96, BF16, "attention", 128)]
    + [(160, BF16, "attention_wide", 256), (128, F32, "attention_fp32", 128)],
)
def test_which_kernel_by_head_size_and_dtype(d: int, dtype: torch.dtype, name: str, width: int) -> None:
    launch = recorded(16, 16, d, dtype)
    assert (launch.kernel.name, launch.constants["WIDTH"]) == (name, width)
    assert launch.constants["PADDED"] == (d != width)


def test_large_blocks_only_where_shared_memory_is() -> None:
    first: dict[str, Tile] = {}
    for architecture in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"):
        with assumed(architecture):
            first[architecture] = recorded(16, 16).kernel.fitting(architecture)[0]
    keys = {name: tile.sizes["KEYS"] for name, tile in first.items()}
    assert keys == {"sm_80": 64, "sm_86": 64, "sm_89": 64, "sm_90": 128, "sm_100": 128, "sm_120": 64}


COMPILE = """
import json, sys, torch
from helios_cuda import offline
from helios_cuda.kernels.attention import flash
from helios_cuda.launch import recording
from helios_cuda.tables import assumed
architecture = sys.argv[1]
fused = torch.empty(1, 11040, 3, 40, 128, dtype=torch.bfloat16, device="meta")
with assumed(architecture), recording() as launches:
    flash(*fused.unbind(2))
form = offline.form_of(launches[0])
binary = offline.compiled(form, architecture)
problems = list(offline.problems(form, architecture, binary, chosen=True))
products = {unit: n for unit, n in binary.units.items() if "mma" in unit}
print(json.dumps([products, problems, {name: list(widths) for name, widths in binary.access.items()}]))
"""


def slow(*parameters: object) -> object:
    return pytest.param(*parameters, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("architecture", "products"),
    [
        slow("sm_80", {"mma.sync": 256}),
        slow("sm_86", {"mma.sync": 256}),
        slow("sm_89", {"mma.sync": 256}),
        ("sm_90", {"wgmma.mma_async": 32}),  # 8 of q kᵀ and 8 of the second product, for whole blocks and for the last
        slow("sm_100", {"tcgen05.mma": 56}),
        slow("sm_120", {"mma.sync": 256}),
    ],
)
def test_what_runs_unasked_compiles_to_tensor_cores_without_spills(architecture: str, products: dict[str, int]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, architecture]
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found, problems, widths = json.loads(result.stdout)
    assert (found, problems) == (products, [])
    assert widths == {"q": [16], "k": [16], "v": [16], "out": [16]}
