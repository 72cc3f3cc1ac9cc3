"""Every kernel of the CPU backend against its op's body in float64.

A kernel may err 1.5 times as much as the body in the same dtype does, in norm over the output; and never less than a
floor is asked of it, because another order of a sum is not an error: u in bfloat16 and float32 and 8u in float64, where
the body is the oracle itself, and u√K for products of inner size K in float32 and float64, where libraries differ by
how they cut the sum.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from helios import op as ops
from helios.backend import ReferenceBackend
from helios.errors import InputError
from helios.graph import Builder, Rate
from helios.lower import lower
from helios.op import Arg, Sample
from helios.ops import quantize
from helios_cpu import CpuBackend

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
PRODUCTS = ("linear", "linear_gelu", "patch_embed", "qkv_linear")
FLOOR = {F64: 8 * 2**-53, F32: 2**-24, BF16: 2**-8}


def row(d: int) -> Arg:
    return Arg((2, 2, d), scale=0.3, dtype=F32)


def long_samples() -> dict[str, list[Sample]]:
    """What the samples are too small for: more rows than a block has, and attention that is worth packing."""
    x, tail, weight = Arg((2, 60, 5120)), Arg((2, 41, 5120)), Arg((5120,), offset=1.0, scale=0.1)
    table = Arg((60, 64, 2), "table", dtype=F32)
    heads = Arg((2, 60, 40, 128))

    def attention(name: str, s: int, t: int, scale: float = 1.0) -> Sample:
        keys = Arg((2, t, 2, 64), scale=scale)
        return Sample(name, (Arg((2, s, 2, 64), scale=scale), keys, Arg((2, t, 2, 64))))

    return {
        "adaln": [Sample("blocks", (x, row(5120), row(5120)), {"split": 33})],
        "attention": [attention("packed", 300, 257), attention("odd", 513, 130), attention("sharp", 256, 256, 3.0)],
        "gated_add": [
            Sample("blocks", (x, x, row(5120)), {"gate_split": 33}),
            Sample("blocks_tail", (x, tail, None), {"gate_split": 0}),
            Sample("blocks_gated_tail", (x, tail, row(5120)), {"gate_split": 14}),
        ],
        "gated_add_adaln": [Sample("blocks", (x, tail, None, row(5120), row(5120)), {"split": 19, "gate_split": 0})],
        "qk_norm_rope": [Sample("blocks", (tail, x, weight, weight, table), {"heads": 40, "eps": 1e-6})],
        "qkv_linear": [
            Sample("some_biases", (Arg((2, 5, 24)), *(Arg((n, 24)) for n in (8, 12, 16)), None, Arg((12,)), None))
        ],
        "rope": [Sample("blocks", (heads, table))],
    }


LONG = long_samples()
SAMPLES = {
    name: [s for s in ops.get(name).samples() if not s.big] + LONG.get(name, [])
    for name in ops.names()
    if name in CpuBackend().kernels and ops.get(name).operands
}
CASES = [(name, sample.name) for name, samples in SAMPLES.items() for sample in samples]
TUNED = [(name, case) for name, case in CASES if CpuBackend().kernels[name].run is not ops.get(name).fn]
BATCHED = [
    (name, case)
    for name, case in TUNED
    if (dims := ops.get(name).operands[0].dims) and dims[0] == "b" and case not in {s.name for s in LONG.get(name, [])}
]


def test_tuned_kernels_are_a_part() -> None:
    assert {"attention", "linear", "rope", "patch_embed", *CpuBackend.fusions} <= {name for name, _ in TUNED}
    assert {"linear_gelu"} & {name for name, _ in BATCHED} == set()  # its first operand may have any shape
    assert {"adaln", "rope", "qk_norm_rope"} <= {name for name, _ in BATCHED}


@functools.cache
def sample_of(name: str, case: str) -> Sample:
    return {s.name: s for s in SAMPLES[name]}[case]


def each(x: Any, f: Any) -> Any:
    if x is None:
        return None
    return [f(t) for t in x] if isinstance(x, list) else f(x)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def native(name: str, inputs: list[Any], attrs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The backend's kernel, its weights prepared first; attributes complete, as a node has them."""
    kernel = CpuBackend().kernels[name]
    given = dict(ops.get(name).attrs) | attrs
    if kernel.prepare is None:
        return outputs(kernel.run(*inputs, **given))
    operands = [o.name for o in ops.get(name).operands]
    packed = [x if n in kernel.weights else None for n, x in zip(operands, inputs, strict=True)]
    rest = [x for n, x in zip(operands, inputs, strict=True) if n not in kernel.weights]
    return outputs(kernel.run(kernel.prepare(*packed, **given), *rest, **given))


def error(came: Tensor, exact: Tensor) -> float:
    size = exact.double().norm()
    return float((came.double() - exact.double()).norm() / (size if size > 0 else 1.0))


def floor(name: str, inputs: list[Any], dtype: torch.dtype) -> float:
    if dtype == BF16 or name not in {"attention", *PRODUCTS}:
        return FLOOR[dtype]
    # Of the weight, whose first dimension are the outputs; of attention's second product, which sums over the keys.
    inner = inputs[1].shape[1] if name == "attention" else inputs[1][0].numel()
    return float(FLOOR[dtype] * inner**0.5)


def check(name: str, inputs: list[Any], attrs: dict[str, Any], dtype: torch.dtype) -> None:
    """The kernel's outputs have the body's types, its inputs stay as they were, and it errs no more than allowed."""
    wide = {key: F64 if isinstance(value, torch.dtype) else value for key, value in attrs.items()}
    body = ops.get(name).fn
    exact = outputs(body(*(each(x, lambda t: t.double()) for x in inputs), **wide))
    before = [each(x, lambda t: t.clone(memory_format=torch.contiguous_format)) for x in inputs]
    reference = outputs(body(*before, **attrs))  # the budget belongs to the values, whatever their strides
    for came, ref, wanted in zip(native(name, inputs, attrs), reference, exact, strict=True):
        assert (came.shape, came.dtype) == (ref.shape, ref.dtype)
        allowed = max(1.5 * error(ref, wanted), floor(name, inputs, max(dtype, ref.dtype, key=FLOOR.__getitem__)))
        assert error(came, wanted) <= allowed
    for was, now in zip(before, inputs, strict=True):
        for a, b in zip(was if isinstance(was, list) else [was], now if isinstance(now, list) else [now], strict=True):
            assert a is b is None or torch.equal(a, b)


def strided(t: Tensor) -> Tensor:
    """The same values with gaps between them; what lies in the gaps is NaN."""
    room = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype)
    room[..., 0] = t
    return room[..., 0]


def turned(t: Tensor) -> Tensor:
    """The same values with the dimensions in reverse order in memory."""
    order = list(reversed(range(t.ndim)))
    return t.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_kernels_err_no_more_than_bodies(name: str, case: str, dtype: torch.dtype) -> None:
    sample = sample_of(name, case)
    check(name, sample.make(dtype), dict(sample.attrs), dtype)


@pytest.mark.parametrize("layout", [strided, turned])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("name", "case"), TUNED)
def test_of_any_strides(name: str, case: str, dtype: torch.dtype, layout: Any) -> None:
    sample = sample_of(name, case)
    inputs = [each(x, layout) for x in sample.make(dtype)]
    assert any(not t.is_contiguous() for x in inputs if isinstance(x, Tensor) for t in [x])
    check(name, inputs, dict(sample.attrs), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "case"), BATCHED)
def test_each_of_a_batch_is_what_it_is_alone(name: str, case: str, dtype: torch.dtype) -> None:
    """Three different ones side by side; elementwise kernels give the very bits, products may sum in another order."""
    sample = sample_of(name, case)
    batched = [(o.dims or ("",))[0] == "b" for o in ops.get(name).operands]
    alone = [sample.make(dtype, seed=seed) for seed in (1, 2, 3)]
    alone = [
        [each(x, lambda t: t[:1]) if b else alone[0][i] for i, (x, b) in enumerate(zip(one, batched, strict=True))]
        for one in alone
    ]
    together = [
        (torch.cat([one[i] for one in alone]) if b and alone[0][i] is not None else alone[0][i])
        for i, b in enumerate(batched)
    ]
    check(name, together, dict(sample.attrs), dtype)
    whole = native(name, together, dict(sample.attrs))
    for at, one in enumerate(alone):
        for all_, own in zip(whole, native(name, one, dict(sample.attrs)), strict=True):
            assert torch.equal(all_[at : at + 1], own) or error(all_[at : at + 1], own) <= FLOOR[dtype]


def test_a_wrong_kernel_is_seen() -> None:
    """The budget refuses a missing epsilon, a swapped pair and products of rounded sums."""
    x, weight = Arg((1, 9, 33), "tiny").make(F32, torch.Generator().manual_seed(0)), torch.ones(33)
    exact = ops.get("rms_norm").fn(x.double(), weight.double())
    reference = error(ops.get("rms_norm").fn(x, weight), exact)
    bound = max(1.5 * reference, FLOOR[F32])
    assert error(ops.get("rms_norm").fn(x, weight, eps=0.0), exact) > bound
    low = x.to(BF16).float()
    assert error(ops.get("rms_norm").fn(low, weight), exact) > bound


def test_all_core_ops_and_the_listed_fusions_have_kernels() -> None:
    backend = CpuBackend()
    core = {name for name in ops.names() if ops.get(name).kind != "fused" and name not in quantize.__all__}
    assert set(backend.kernels) == core | set(backend.fusions)
    assert set(backend.precisions) == {"fp32", "bf16", "fp64"}


def test_what_it_says_of_itself() -> None:
    backend = CpuBackend()
    (device,) = backend.devices()
    assert device.index == 0
    assert device.name.endswith(", 1 thread"), "tests have one"
    assert device.memory is not None
    assert device.memory > 2**28
    assert backend.label == "cpu"
    assert backend.device == torch.device("cpu")
    with pytest.raises(InputError, match="has no providers"):
        CpuBackend("fast")


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_kernels_run_through_a_program(dtype: torch.dtype) -> None:
    """Weights packed at load, operands of a step unpacked: the same as on the reference, within one rounding."""
    with Builder("g") as build:
        x = build.input("x", (2, 5, 24), dtype, Rate.STEP)
        w = build.input("w", (48, 24), dtype, Rate.WEIGHTS)
        h = ops.get("gelu")(ops.get("linear")(x, w, build.input("b", (48,), dtype, Rate.WEIGHTS)))
        build.output("y", ops.get("linear")(h, build.input("v", (7, 48), dtype, Rate.STEP)))

    class Weights:
        def read(self, name: str) -> Tensor:
            shape = {"w": (48, 24), "b": (48,)}[name]
            return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    generator = torch.Generator().manual_seed(2)
    inputs = {"x": torch.randn((2, 5, 24), generator=generator), "v": torch.randn((7, 48), generator=generator)}
    results = []
    for backend in (CpuBackend(), ReferenceBackend()):
        program = lower({"g": build.graph()}, backend)
        program.load(Weights())
        results.append(program.run("g", inputs)["y"])
        assert program.coverage.fallbacks == 0
        assert ("linear_gelu" in program.coverage.counts) == (backend.name == "cpu")
    assert error(*results) <= 4 * FLOOR[dtype]
