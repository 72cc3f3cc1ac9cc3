"""Products of the CUDA backend: the suite's cases on the CPU's arithmetic, layouts, and what is asked of cuBLASLt."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helios.backend import select
from helios_conformance import execute, references, suite
from helios_conformance.draws import Root
from helios_conformance.session import Session
from helios_cuda import gemm

CHECKS = ("op_values", "op_specials", "op_refusals")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", sorted(gemm.KERNELS))
def test_products_pass_the_suite(name: str, precision: str) -> None:
    session = Session(select("cuda:interpret"), Root(11, "n"))
    assert session.backend.kernels[name] is gemm.KERNELS[name]
    listed = suite.choose(precision, "quick", ["ops"])
    chosen = [case for case in listed if case.params.get("op") == name and case.check in CHECKS]
    verdicts = {case.id: execute.run_here(case, session, references.committed())[1] for case in chosen}
    assert {i: v.reason for i, v in verdicts.items() if v.state != "pass"} == {}
    assert verdicts


def test_qkv_is_three_views_of_one_buffer() -> None:
    x, weights = torch.randn(2, 5, 24), [torch.randn(n, 24) for n in (24, 16, 8)]
    kernel = gemm.KERNELS["qkv_linear"]
    assert kernel.prepare is not None
    handle = kernel.prepare(None, *weights, torch.randn(24), None, torch.randn(8))
    outs = kernel.run(handle, x)
    assert [tuple(o.shape) for o in outs] == [(2, 5, 24), (2, 5, 16), (2, 5, 8)]
    assert len({o.untyped_storage().data_ptr() for o in outs}) == 1
    assert {o.stride() for o in outs} == {(5 * 48, 48, 1)}
    torch.testing.assert_close(outs[1], F.linear(x, weights[1]))


def test_a_third_of_a_fused_buffer_is_multiplied_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    third = torch.randn(1, 6, 24)[..., 8:16]
    seen: list[Tensor] = []
    real = torch.addmm

    def addmm(bias: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        seen.append(rows)
        return real(bias, rows, weight)

    monkeypatch.setattr(torch, "addmm", addmm)
    gemm.KERNELS["linear"].run(gemm.Matrix(torch.randn(4, 8), torch.randn(4)), third)
    assert seen[0].data_ptr() == third.data_ptr()
    assert seen[0].stride() == (24, 1)


class OnDevice(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(("dtype", "fused"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_the_gelu_is_in_the_epilogue_on_a_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fused: bool) -> None:
    calls: list[tuple[Tensor, ...]] = []

    def activation(bias: Tensor, rows: Tensor, weight: Tensor, *, use_gelu: bool) -> Tensor:
        assert use_gelu
        assert bias.is_contiguous()
        calls.append((bias, rows, weight))
        return torch.zeros(rows.shape[0], weight.shape[1], dtype=rows.dtype)

    monkeypatch.setattr(torch, "_addmm_activation", activation)
    kernel = gemm.KERNELS["linear_gelu"]
    assert kernel.prepare is not None
    handle = kernel.prepare(None, torch.zeros(3, 4, dtype=dtype), None)
    x = torch.zeros(2, 5, 4, dtype=dtype)
    out = kernel.run(handle, x.as_subclass(OnDevice))
    assert tuple(out.shape) == (2, 5, 3)
    assert bool(calls) == fused


@pytest.mark.parametrize("name", ["linear", "linear_gelu"])
@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (2, 0, 24)])
def test_no_rows_and_one_row(name: str, shape: tuple[int, ...]) -> None:
    kernel = gemm.KERNELS[name]
    assert kernel.prepare is not None
    handle = kernel.prepare(None, torch.randn(8, 24), torch.randn(8))
    assert kernel.run(handle, torch.randn(shape)).shape == (*shape[:-1], 8)


def test_shapes_follow_on_meta() -> None:
    kernel = gemm.KERNELS["patch_embed"]
    assert kernel.prepare is not None
    with torch.device("meta"):
        handle = kernel.prepare(None, torch.empty(5120, 16, 1, 2, 2), torch.empty(5120))
        out = kernel.run(handle, torch.empty(1, 16, 9, 48, 80))
    assert tuple(out.shape) == (1, 8640, 5120)
