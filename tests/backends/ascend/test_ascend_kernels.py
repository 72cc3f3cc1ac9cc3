"""The Ascend kernels' own logic, on the host, over operators written from their documentation: no NPU, no CANN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from npu_operators import Calls, installed
from torch import Tensor

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios.op import Sample
from helios_ascend import AscendBackend, operators
from helios_conformance.budget import allowed, exact, exceeded, measure

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CONSTANT = ("full", "rope_table")


@pytest.fixture
def calls() -> Iterator[Calls]:
    with installed() as made:
        yield made


def samples() -> Iterator[tuple[str, Sample]]:
    for name in sorted(AscendBackend().kernels):
        if name in CONSTANT:
            continue
        for sample in op.get(name).samples():
            if not sample.big and not sample.name.endswith("long"):
                yield name, sample


def computed(name: str, inputs: list[Any], attrs: dict[str, Any]) -> tuple[Tensor, ...]:
    """By the backend's kernel, prepared where it prepares."""
    kernel = AscendBackend().kernels[name]
    record = op.get(name)
    attrs = {**record.attrs, **attrs}
    names = [operand.name for operand in record.operands]
    if kernel.prepare is None:
        result = kernel.run(*inputs, **attrs)
    else:
        packed = [x if n in kernel.weights else None for n, x in zip(names, inputs, strict=True)]
        rest = [x for n, x in zip(names, inputs, strict=True) if n not in kernel.weights]
        result = kernel.run(kernel.prepare(*packed, **attrs), *rest, **attrs)
    return result if isinstance(result, tuple) else (result,)


def wide(x: Any) -> Any:
    return [wide(one) for one in x] if isinstance(x, list) else None if x is None else x.double()


def body(name: str, inputs: list[Any], attrs: dict[str, Any]) -> tuple[Tensor, ...]:
    result = op.get(name).fn(*inputs, **{**op.get(name).attrs, **attrs})
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("name", "sample"), [pytest.param(n, s, id=f"{n}.{s.name}") for n, s in samples()])
@pytest.mark.usefixtures("calls")
def test_each_kernel_keeps_the_suites_budget(name: str, sample: Sample, precision: str) -> None:
    inputs, attrs = sample.make(DTYPES[precision], seed=3), dict(sample.attrs)
    results, references = computed(name, inputs, attrs), body(name, inputs, attrs)
    oracle = body(name, wide(inputs), {k: v for k, v in attrs.items() if k != "dtype"} | _wide_dtype(attrs))
    for result, reference, right in zip(results, references, oracle, strict=True):
        assert result.shape == reference.shape
        assert result.dtype == reference.dtype
        if op.get(name).kind == "move":
            assert exact(result.contiguous(), reference.contiguous())
            continue
        bound = allowed(op.get(name).kind, result.dtype, 4096, right, measure(reference, right))
        assert exceeded(measure(result, right), bound) == []


def _wide_dtype(attrs: dict[str, Any]) -> dict[str, Any]:
    return {"dtype": torch.float64} if "dtype" in attrs else {}


@pytest.mark.parametrize("precision", DTYPES)
def test_permuted_operands_give_the_same(calls: Calls, precision: str) -> None:
    """Kernels get operands of any strides; the operators get none that is not dense."""
    for name, sample in samples():
        inputs = sample.make(DTYPES[precision], seed=5)
        strange = [_scattered(x) for x in inputs]
        for one, other in zip(
            computed(name, inputs, dict(sample.attrs)), computed(name, strange, dict(sample.attrs)), strict=True
        ):
            assert exact(one.contiguous(), other.contiguous()), f"{name}.{sample.name}"
    assert calls.made


def _scattered(x: Any) -> Any:
    if isinstance(x, list):
        return [_scattered(one) for one in x]
    return None if x is None else torch.stack((x, torch.full_like(x, 7.0)), dim=-1)[..., 0]


def test_every_core_op_has_a_kernel() -> None:
    core = {name for name in op.names() if op.get(name).kind != "fused"}
    eight_bits = {"dequantize_rows", "quantize_rows", "scaled_attention", "scaled_linear"}
    assert core - eight_bits <= set(AscendBackend().kernels)
    assert set(AscendBackend.fusions) <= set(AscendBackend().kernels)


def test_each_call_passes_what_the_table_says(calls: Calls) -> None:
    for precision in DTYPES.values():
        for name, sample in samples():
            computed(name, sample.make(precision), dict(sample.attrs))
    used = {name: (positions, keywords) for name, positions, keywords in calls.made}
    with installed((2, 9)) as older:
        sample = op.get("attention").samples()[0]
        computed("attention", sample.make(torch.float32), {})
    used |= {name: (positions, keywords) for name, positions, keywords in older.made}
    assert used == {name: (entry.positional, entry.keywords) for name, entry in operators.TABLE.items()}


def test_a_table_is_laid_out_once_while_weights_are_loaded() -> None:
    from helios_ascend import rope

    table = torch.rand(5, 4, 2)
    with rope.sharing():
        first, second = rope._turns_of_weight(table), rope._turns_of_weight(table)
    assert first is second
    assert rope._turns_of_weight(table) is not first


@pytest.mark.usefixtures("calls")
def test_a_whole_turn_more_changes_no_sinusoid() -> None:
    """Angles up to 1000 are reduced before sine and cosine see them."""
    from helios_ascend.sampler import _reduced

    angle = torch.linspace(0.0, 1000.0, 4001)
    reduced = _reduced(angle)
    assert float(reduced.abs().max()) <= 3.1416 + 1e-3
    assert torch.allclose(reduced.double().cos(), angle.double().cos(), atol=2e-7)
    assert torch.allclose(reduced.double().sin(), angle.double().sin(), atol=2e-7)


def test_the_sinusoid_is_nearer_than_float32_angles_allow() -> None:
    from helios_ascend.sampler import _timestep_embedding

    t = torch.rand(500, generator=torch.Generator().manual_seed(1)) * 999.0
    oracle = op.get("timestep_embedding").fn(t.double(), dim=256)
    ours, plain = _timestep_embedding(t, dim=256, period=1e4), op.get("timestep_embedding").fn(t, dim=256)
    assert float((ours.double() - oracle).abs().max()) < 1e-6
    assert float((plain.double() - oracle).abs().max()) > 1e-5
