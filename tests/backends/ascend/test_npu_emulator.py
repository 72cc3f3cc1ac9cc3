"""The emulated operators against their documented formulas in float64, where a slip would suit a backend's."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from ascend_rig import TOOLS
from torch import Tensor

sys.path.append(str(TOOLS))

from npu_emulator import attention, norms, pointwise  # noqa: F401  (they enter their operators)
from npu_emulator.products import coarse
from npu_emulator.rules import OPERATORS, Refused


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_attention_hides_where_the_mask_is_one_and_scales_by_one_unless_told() -> None:
    q, k, v = (draw(1, 2, 5, 16, seed=i) for i in range(3))
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[:, 3:] = True
    right = torch.softmax(q.double() @ k.double()[:, :, :3].mT, -1) @ v.double()[:, :, :3]
    out = OPERATORS["npu_fusion_attention_v3"](q, k, v, 2, "BNSD", atten_mask=mask)[0]
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)


def test_layouts_agree_and_key_heads_are_shared() -> None:
    q, k, v = draw(2, 4, 5, 16), draw(2, 2, 7, 16, seed=1), draw(2, 2, 7, 16, seed=2)
    run = OPERATORS["npu_fusion_attention"]
    one = run(q, k, v, 4, "BNSD", scale=0.25)[0]
    other = run(*(x.transpose(1, 2) for x in (q, k, v)), 4, "BSND", scale=0.25)[0]
    flat = run(*(x.transpose(1, 2).flatten(2) for x in (q, k, v)), 4, "BSH", scale=0.25)[0]
    assert torch.equal(one, other.transpose(1, 2))
    assert torch.equal(flat, other.flatten(2))
    first = torch.softmax(q[:, 1].double() @ k[:, 0].double().mT * 0.25, -1) @ v[:, 0].double()
    torch.testing.assert_close(one[:, 1].double(), first, rtol=1e-5, atol=1e-5)


def test_the_sum_of_exponentials_is_told_as_its_logarithm() -> None:
    q = draw(1, 5, 2, 16, dtype=torch.bfloat16)
    told = OPERATORS["npu_fused_infer_attention_score"](
        q, q, q, num_heads=2, scale=0.5, input_layout="BSND", softmax_lse_flag=True
    )[1]
    x = q.double().transpose(1, 2)
    torch.testing.assert_close(told.double(), torch.logsumexp(x @ x.mT * 0.5, -1, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotation_is_that_of_complex_numbers(mode: str) -> None:
    x, angle = draw(2, 5, 3, 8), draw(5, 4, seed=1)
    doubled = torch.cat((angle, angle), -1) if mode == "half" else angle.repeat_interleave(2, -1)
    tables = [f(doubled)[None, :, None] for f in (torch.cos, torch.sin)]
    out = OPERATORS["npu_rotary_mul"](x, *tables, mode)
    pairs = torch.stack(x.chunk(2, -1), -1) if mode == "half" else x.unflatten(-1, (4, 2))
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.double().contiguous()) * torch.exp(1j * angle)[None, :, None]
    )
    right = torch.cat(turned.unbind(-1), -1) if mode == "half" else turned.flatten(-2)
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)


def test_norms_take_epsilon_under_the_root_and_the_sum_only_if_asked() -> None:
    x, y, g, b = draw(3, 8) * 1e-3, draw(3, 8, seed=1) * 1e-3, draw(8, seed=2), draw(8, seed=3)
    out, rstd = OPERATORS["npu_rms_norm"](x, g, 1e-4)
    root = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-4)
    torch.testing.assert_close(rstd.double(), root, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.double(), x.double() * root * g, rtol=1e-5, atol=1e-7)
    normed, _, _, left = OPERATORS["npu_add_layer_norm"](x, y, g, b, 1e-4)
    right = torch.nn.functional.layer_norm((x + y).double(), (8,), g.double(), b.double(), 1e-4)
    torch.testing.assert_close(normed.double(), right, rtol=1e-4, atol=1e-6)
    assert left.isnan().all()
    assert torch.equal(OPERATORS["npu_add_layer_norm"](x, y, g, b, 1e-4, True)[3], x + y)


def test_fast_gelu_is_its_own_formula_and_not_gelu() -> None:
    x = draw(64) * 3
    out = OPERATORS["npu_fast_gelu"](x)
    torch.testing.assert_close(out, x * torch.sigmoid(1.702 * x), rtol=1e-5, atol=1e-6)
    assert (out - torch.nn.functional.gelu(x)).abs().max() > 1e-3
    exact = OPERATORS["npu_gelu"](x, approximate="tanh")
    torch.testing.assert_close(exact, torch.nn.functional.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)


def test_hf32_loses_about_twelve_bits() -> None:
    x = draw(4096)
    lost = ((coarse(x) - x) / x).abs().max().item()
    assert 2.0**-13 < lost <= 2.0**-12
    assert torch.equal(coarse(torch.tensor([1.0, -2.5, 0.0])), torch.tensor([1.0, -2.5, 0.0]))


HALF = torch.float16
REFUSED: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "float32": ("npu_prompt_flash_attention", (draw(1, 4, 16),) * 3, {"num_heads": 1}),
    "gaps": ("npu_prompt_flash_attention", (draw(1, 16, 4, dtype=HALF).mT,) * 3, {"num_heads": 1}),
    "uneven heads": ("npu_prompt_flash_attention", (draw(1, 4, 12, dtype=HALF),) * 3, {"num_heads": 1}),
    "other heads": ("npu_fusion_attention", (*(draw(1, 4, 2, 16),) * 3, 2, "BNSD"), {}),
    "dropout": ("npu_fusion_attention", (*(draw(1, 2, 4, 16),) * 3, 2, "BNSD"), {"keep_prob": 0.5}),
    "gamma": ("npu_rms_norm", (draw(3, 8, dtype=HALF), draw(8)), {}),
    "tables": ("npu_rotary_mul", (draw(2, 5, 3, 8), draw(2, 5, 3, 8), draw(2, 5, 3, 8), "interleave"), {}),
    "mode": ("npu_rotary_mul", (draw(2, 5, 3, 8), draw(1, 5, 1, 8), draw(1, 5, 1, 8), "quarter"), {}),
    "bfloat16": ("npu_silu", (draw(3, dtype=torch.bfloat16),), {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_page_does_not_allow_is_refused(case: str) -> None:
    name, args, kwargs = REFUSED[case]
    with pytest.raises(Refused, match=name):
        OPERATORS[name](*args, **kwargs)


def test_scale_that_was_forgotten_shows() -> None:
    q = draw(1, 2, 9, 64)
    run = OPERATORS["npu_fusion_attention"]
    right, wrong = run(q, q, q, 2, "BNSD", scale=1 / math.sqrt(64))[0], run(q, q, q, 2, "BNSD")[0]
    assert (right - wrong).abs().max() > 0.1
