"""Sampler steps, guidance and noise between stages: how many launches, which dtypes, sums that repeat."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helios import op
from helios.backend import select
from helios_cuda.kernels import KERNELS
from helios_cuda.launch import Tile, forced, recording

BF16, F32 = torch.bfloat16, torch.float32
LATENTS, COARSE = (1, 16, 9, 48, 80), (1, 16, 9, 24, 40)
NO_LAUNCH = {
    "expand",
    "permute",
    "promote_types",
    "select",
    "slice",
    "t",
    "unbind",
    "unsqueeze",
    "view",
    "_unsafe_view",
}


class Launches(TorchDispatchMode):
    """Counts what of torch would be a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in NO_LAUNCH:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


def zeros(*shapes: tuple[int, ...], half: Sequence[int] = ()) -> list[Tensor]:
    """Float32, and bfloat16 where ``half`` says."""
    return [torch.zeros(shape, dtype=BF16 if i in half else F32) for i, shape in enumerate(shapes)]


L, C = (1, 16, 9, 4, 8), (1, 16, 9, 2, 4)
PRODUCTION: Mapping[str, tuple[list[Tensor], int, int]] = {
    "dmd_step": (zeros(L, L, L, (3,), half=[1]), 6, 1),
    "euler_step": (zeros(L, L, (1,), half=[1]), 3, 1),
    "unipc_step": (zeros(L, L, L, L, L, (9,), half=[1]), 20, 1),
    "cfg": (zeros(L, L, (2,), half=[0, 1]), 7, 1),
    "cfg_zero_star": (zeros(L, L, (2,), half=[0, 1]), 15, 2),
    "renoise_upsample": (zeros(C, (*C, 4), (2,)), 7, 1),
    "downsample_noise": (zeros(L), 2, 1),
}
"""Operands as production has their dtypes; launches of the body, and of the kernel."""


@pytest.mark.parametrize("name", sorted(PRODUCTION))
def test_launches_of_the_body_and_of_the_kernel(name: str) -> None:
    operands, by_body, by_kernel = PRODUCTION[name]
    with Launches() as torch_alone:
        op.get(name).fn(*operands, **op.get(name).attrs)
    assert sum(torch_alone.counted.values()) == by_body, torch_alone.counted
    with recording() as launches, Launches() as beside:
        KERNELS[name].run(*operands, **op.get(name).attrs)
    assert len(launches) == by_kernel
    assert set(beside.counted) <= {"empty", "new_empty"}


def test_grids_at_the_last_stage() -> None:
    state, velocity, coeffs = (torch.empty(s, device="meta") for s in (LATENTS, LATENTS, (3,)))
    with recording() as launches, forced(Tile({"SIZE": 1024})):
        KERNELS["dmd_step"].run(state, velocity, state, coeffs)
        KERNELS["cfg_zero_star"].run(state, velocity, coeffs, eps=1e-8)
        KERNELS["downsample_noise"].run(state)
    assert [launch.grid for launch in launches] == [(540,), (128, 1), (540, 1), (135,)]


def test_a_step_is_fused_where_the_backend_says_so() -> None:
    assert {"unipc_step", "renoise_upsample", "qk_norm_rope"} <= set(select("cuda:interpret").fusions)


@pytest.mark.parametrize("name", ["dmd_step", "unipc_step", "cfg", "blend"])
def test_results_have_the_dtype_that_the_op_gives(name: str) -> None:
    count = {"dmd_step": 3, "unipc_step": 5, "cfg": 2, "blend": 2}[name]
    for last in (F32, BF16):
        operands = [torch.ones(1, 2, 3, 2, 5, dtype=BF16 if i % 2 else F32) for i in range(count - 1)]
        operands += [torch.ones(1, 2, 3, 2, 5, dtype=last), torch.linspace(0.1, 0.9, 9 if count == 5 else count)]
        came, wanted = KERNELS[name].run(*operands), op.get(name).fn(*operands)
        for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (came, wanted)), strict=True):
            torch.testing.assert_close(one, other)  # dtypes too


def test_latents_in_another_order_of_memory() -> None:
    x, y = torch.randn(2, 3, 4, 6, 2, 5).unbind(0)
    coeffs = torch.tensor([0.3, 0.0, 0.7])[::2]
    strange = y.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    assert torch.equal(KERNELS["blend"].run(x, strange, coeffs), KERNELS["blend"].run(x, y, coeffs.contiguous()))
    torch.testing.assert_close(KERNELS["blend"].run(x, strange, coeffs), 0.3 * x + 0.7 * y)


@pytest.mark.parametrize("shape", [(2, 3, 2, 5, 7), (2, 8, 3, 24, 40)], ids=["one part", "8 parts"])
def test_projection_of_each_video_by_itself(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    cond, uncond = (torch.randn(shape, generator=generator) + 0.5 for _ in range(2))
    cond[1] *= 100.0
    coeffs = torch.tensor([5.0, 1.0])
    together = KERNELS["cfg_zero_star"].run(cond, uncond, coeffs, eps=1e-8)
    wanted = op.get("cfg_zero_star").fn(cond.double(), uncond.double(), coeffs.double())
    torch.testing.assert_close(together.double(), wanted, rtol=1e-5, atol=1e-4)
    assert torch.equal(together, KERNELS["cfg_zero_star"].run(cond, uncond, coeffs, eps=1e-8))
    for i in range(2):
        alone = KERNELS["cfg_zero_star"].run(cond[i : i + 1], uncond[i : i + 1], coeffs, eps=1e-8)
        assert torch.equal(together[i : i + 1], alone)


def test_patches_of_renoised_latents_keep_their_mean() -> None:
    """At γ = 1/3 the noise of each patch sums to zero, so what remains of its mean is the latent."""
    latents, z = torch.randn(1, 2, 2, 3, 5), torch.randn(1, 2, 2, 3, 5, 4)
    out = KERNELS["renoise_upsample"].run(latents, z, torch.tensor([2.0, 0.5]), gamma=1.0 / 3.0)
    patches = out.unflatten(4, (5, 2)).unflatten(3, (3, 2))
    torch.testing.assert_close(patches.mean((4, 6)), 2.0 * latents)
    assert float(patches.var((4, 6)).min()) > 0.0


def test_nothing_is_done_for_no_latents() -> None:
    none = torch.empty(0, 3, 2, 4, 6)
    assert KERNELS["cfg_zero_star"].run(none, none, torch.ones(2), eps=1e-8).shape == none.shape
    assert KERNELS["blend"].run(none, none, torch.ones(2)).shape == none.shape
    assert KERNELS["downsample_noise"].run(none).shape == (0, 3, 2, 2, 3)


def test_keys_are_scaled_in_place_of_their_tokens_alone() -> None:
    kernel, k, logit = KERNELS["scale_history_keys"], torch.randn(2, 3, 9, 8).to(BF16).transpose(1, 2), torch.randn(3)
    assert kernel.prepare is not None
    handle = kernel.prepare(None, logit, split=5, gain=10.0)
    out = kernel.run(handle, k, split=5, gain=10.0)
    assert torch.equal(out, op.get("scale_history_keys").fn(k, logit, split=5))
    assert out.is_contiguous()
