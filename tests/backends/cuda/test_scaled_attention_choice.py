"""Attention of quantised operands in the execution plan: recorded, unmeasured, never in another one's place."""

from __future__ import annotations

import json

import pytest
import torch

from helios.errors import BackendError
from helios.graph import Builder, Graph, Rate
from helios.lower import lower, plan_for
from helios.ops.attention import attention
from helios.ops.quantize import quantize_rows, quantized_attention, scaled_attention
from helios_cuda import CudaBackend
from helios_cuda.attention import Chooser, forms
from helios_cuda.attention_libraries import LIBRARIES, QUANTISED, TRITON, Device, Form

HOPPER, AMPERE = Device("Test GPU", (9, 0)), Device("Test GPU", (8, 0))
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
NARROW = Form(1, 24, 24, 2, 16, E4M3)
KEY = "e4m3 b=1 s=24 t=24 h=2 d=16"


def step() -> Graph:
    builder = Builder("step")
    with builder:
        q, k, v = (builder.input(name, (1, 24, 2, 16), BF16, Rate.STEP) for name in "qkv")
        x = scaled_attention(*quantize_rows(q), *quantize_rows(k), *quantize_rows(v), dtype=BF16)
        builder.output("y", attention(x, k, v))
    return builder.graph()


def chooser(device: Device = HOPPER) -> Chooser:
    return Chooser(torch.device("cpu"), [TRITON], clock=lambda call: 1.0, described=device)


@pytest.mark.parametrize("fused", [True, False])
def test_a_quantised_attention_is_a_form_of_its_own(fused: bool) -> None:
    backend = CudaBackend("interpret")
    if not fused:
        backend.fusions = ()  # type: ignore[assignment]
    plan = plan_for({"step": step()}, backend)
    ops = {node.op for graph in plan.graphs.values() for node in graph.nodes}
    assert ("quantized_attention" in ops, "scaled_attention" in ops) == (fused, not fused)
    assert forms(plan) == [NARROW, Form(1, 24, 24, 2, 16, BF16)]


@pytest.mark.parametrize("named", ["measure", "triton"])
def test_it_is_recorded_beside_others_whatever_was_asked_for(named: str) -> None:
    one = chooser()
    one.use(named)
    one.settle([NARROW, Form(1, 24, 24, 2, 16, BF16)])
    chosen = {key: entry["library"] for key, entry in one.plan.items()}
    assert chosen == {KEY: "triton e4m3", "bf16 b=1 s=24 t=24 h=2 d=16": "triton"}
    assert one.plan[KEY]["version"].startswith("triton ")
    again = chooser()
    again.use(json.loads(json.dumps(one.plan)))
    again.settle([NARROW])
    assert again.plan == one.plan


def test_no_other_attention_ever_takes_it() -> None:
    assert QUANTISED not in LIBRARIES
    for dtype in (BF16, torch.float16, torch.float32):
        assert QUANTISED.there(Form(1, 24, 24, 2, 16, dtype), HOPPER) is not None
    one = chooser()
    form = Form(1, 24, 24, 2, 16, BF16)
    one.settle([form, NARROW])
    one.use({str(form): one.plan[KEY]})  # a plan that somebody edited
    with pytest.raises(BackendError, match="rounds to e4m3, and bf16 is asked for"):
        one.settle([form])


def test_the_others_refuse_what_is_quantised_and_it_refuses_old_gpus() -> None:
    assert [library.name for library in LIBRARIES if library.there(NARROW, HOPPER) is None] == []
    assert QUANTISED.there(NARROW, HOPPER) is None
    with pytest.raises(BackendError, match="only GPUs from sm_89 on multiply e4m3 numbers, this is Test GPU, sm_80"):
        chooser(AMPERE).settle([NARROW])


def test_its_adapter_runs_the_kernel() -> None:
    q, k, v = (torch.randn(1, 5, 2, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    backend = CudaBackend("interpret")
    assert torch.equal(QUANTISED.run(q, k, v, 0.25), backend.kernels["quantized_attention"].run(q, k, v, scale=None))


def test_a_program_runs_it_fused() -> None:
    backend = CudaBackend("interpret")
    program = lower({"step": step()}, backend)
    program.load({})  # type: ignore[arg-type]
    q, k, v = (torch.randn(1, 24, 2, 16, generator=torch.Generator().manual_seed(n)).to(BF16) for n in range(3))
    (came,) = program.run("step", {"q": q, "k": k, "v": v}).values()
    wanted = attention(quantized_attention(q, k, v), k, v)
    assert isinstance(wanted, torch.Tensor)
    torch.testing.assert_close(came, wanted, atol=0.02, rtol=0.02)
