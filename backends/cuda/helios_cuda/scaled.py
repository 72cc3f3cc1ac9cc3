"""Products with e4m3 weights, by whichever right way is faster: torch's cuBLASLt and CUTLASS, or a kernel of ours.

``scaled_linear``, ``quantized_linear``, ``quantized_qkv_linear``. A weight is quantised where it lies on the device,
row by row, when it is loaded; what stays is one byte an element and four a row, half of the 28.6 GB of 14B in bf16.

**The library** is ``torch._scaled_mm`` with a scale for each row of both sides: on sm_90 by cuBLASLt (from its 12.9
on), on sm_89, 100 and 120 by CUTLASS. It takes ``[m, k]`` row by row and the weight ``[n, k]`` as its transpose, both
dense and aligned to 16 bytes (on sm_89 strides are not looked at), k and n in multiples of 16, contiguous float32
scales ``[m, 1]`` and ``[1, n]``, and a bias only in the result's 16-bit dtype. Scales and bias come in the epilogue,
before the one rounding. What it does not take, or gets wrong, our kernel does: not every version of torch has a kernel
for each of these GPUs and dtypes.

**How it adds.** Hopper's and Ada's tensor cores keep some 14 bits of a sum of e4m3 products. With ``use_fast_accum``
the whole sum stays there; without it, as here, partial sums are promoted: cuBLASLt does so "periodically" (its
``CUBLASLT_MATMUL_DESC_FAST_ACCUM``), CUTLASS every 128 of the inner dimension, into float32 registers. On newer GPUs
the switch does nothing. ``BOUND`` refuses sums that were not promoted. In a model of those tensor cores (13 bits behind
the largest of 32 products and the sum, the rest cut off; ``test_scaled_linear`` has it) bfloat16 results of an inner
dimension of 512, 5120, 13824 are away from the exact ones, rounded, by 6e-4, 8e-4, 6e-4 of their norm with promotion
and 1.3e-3, 2.5e-3, 3.7e-3 without; 6 to 7 % of the elements, and 9, 31, 48 %, are rounded otherwise than exact ones.

::

    settle(forms(plan), device, described)    # at compile time: measures every form that is new
    CHOICES.record                            # {"bf16 11040 by 5120x5120 + bias": {"variant": "torch", …}, …}
    CHOICES.replay(record, described)         # the same bits again, or a BackendError that says what is different

At the published sizes (384 × 640; 2940, 4560 and 11040 tokens) FLOP are those of ``gemm``, bytes half of it but for the
result; the table of each product is in ``kernels.scaled_linear``. One weight matrix for q, k and v, as there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import torch
import triton
from torch import Tensor

from helios.backend import Kernel
from helios.graph import Node, Value
from helios.passes import Plan
from helios_cuda import record
from helios_cuda.choice import Choices, Clock, Variant, device_clock
from helios_cuda.held import Quantised
from helios_cuda.kernels.quantize import quantize_rows
from helios_cuda.kernels.scaled_linear import scaled_linear
from helios_cuda.launch import name_of

__all__ = ["CHOICES", "KERNELS", "OPS", "VARIANTS", "Form", "forms", "quantised", "settle"]

CAPABILITY = (8, 9)
"""The first with tensor cores for e4m3 numbers."""
MULTIPLE = 16
"""Of the inner dimension and of the outputs that the library takes."""
LARGEST = 2**31
"""Elements of an operand or result that 32 bits do not count."""


def _triton(x: Tensor, x_scale: Tensor, w: Quantised) -> Tensor:
    return scaled_linear(x, x_scale.view(-1), w.weight, w.scale.view(-1), w.bias, w.dtype)


def _library_there(x: Tensor, _x_scale: Tensor, w: Quantised) -> str:
    if not x.is_cuda:
        return "no CUDA device"
    if not hasattr(torch, "_scaled_mm"):
        return "torch has no scaled product"
    if torch.cuda.get_device_capability(x.device) < CAPABILITY:
        return "the device multiplies no e4m3 numbers"
    return _library_takes(x, w)


def _library_takes(x: Tensor, w: Quantised) -> str:
    outputs, inner = w.weight.shape
    if inner % MULTIPLE or outputs % MULTIPLE:
        return f"sizes that are no multiples of {MULTIPLE}"
    if w.bias is not None and (w.bias.dtype != w.dtype or w.dtype == torch.float32):
        return f"a bias in {name_of(w.bias.dtype)} for a result in {name_of(w.dtype)}"
    if max(x.shape[0] * max(inner, outputs), outputs * inner) >= LARGEST:
        return "more elements than 32 bits count"
    return ""


def _library(x: Tensor, x_scale: Tensor, w: Quantised) -> Tensor:
    return torch._scaled_mm(
        x,
        w.weight.t(),
        scale_a=x_scale,
        scale_b=w.scale.t(),
        bias=w.bias,
        out_dtype=w.dtype,
        use_fast_accum=False,
    )


VARIANTS = (
    Variant("triton", _triton, version=lambda: f"triton {triton.__version__}"),
    Variant("torch", _library, _library_there, lambda: f"torch {torch.__version__}, cuBLAS {record.cublas()}"),
)
"""The first is ours, serves everywhere, and is what the other must agree with."""

CHOICES = Choices(VARIANTS)
"""Of this process: plans record and replay them."""

BOUND = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-10, torch.float32: 2.0**-11}
"""How far rows of the library's result may be from ours, relative, in the Euclidean norm: twice what promoted sums may
differ by, and less than those of the published sizes do that were not promoted."""
BLOCK = 1024
"""Rows that are compared at a time, so that a wrong part does not hide."""

OPS = ("quantized_linear", "quantized_qkv_linear", "scaled_linear")


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """All that a choice depends on: sizes, the result's dtype, whether there is a bias."""

    rows: int
    inner: int
    outputs: int
    dtype: torch.dtype
    bias: bool

    @classmethod
    def of(cls, node: Node) -> Form:
        """That of a node of ``OPS``."""
        x, results = node.values[0], node.outputs
        weights, others = (1, 1) if node.op == "scaled_linear" else (len(results), 0)
        biases = node.inputs[2 + weights + others :]
        bias = any(isinstance(b, Value) for b in biases)
        outputs = sum(y.shape[-1] for y in results)
        return cls(_count(x.shape[:-1]), x.shape[-1], outputs, results[0].dtype, bias)

    def __str__(self) -> str:
        sizes = f"{self.rows} by {self.outputs}x{self.inner}"
        return f"{name_of(self.dtype)} {sizes}{' + bias' * self.bias}"

    def drawn(self, device: torch.device) -> tuple[Tensor, Tensor, Quantised]:
        """Operands with normal numbers; the bias is small, since what it adds hides errors of the sum."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=self.dtype)

        bias = normal(self.outputs) * 0.1 if self.bias else None
        weight = quantize_rows(normal(self.outputs, self.inner) * self.inner**-0.5)
        return *quantize_rows(normal(self.rows, self.inner)), Quantised(*weight, bias, self.dtype)


def _count(shape: Iterable[int]) -> int:
    return functools.reduce(int.__mul__, shape, 1)


def forms(plan: Plan) -> list[Form]:
    """The different products of a plan."""
    nodes = (node for graph in plan.graphs.values() for node in graph.nodes if node.op in OPS)
    return list(dict.fromkeys(map(Form.of, nodes)))


def settle(wanted: Iterable[Form], device: torch.device, described: str, clock: Clock = device_clock) -> None:
    """Measure each form that nobody chose for, on a device that is a GPU; on any other nothing is measured.

    Args:
        device: where it will run.
        described: the device as plans name it.
        clock: see ``Clock``.
    """
    new = [form for form in wanted if str(form) not in CHOICES.record and form.rows]
    if device.type != "cuda" or not new:
        return
    with torch.no_grad(), torch.cuda.device(device):
        for form in new:
            CHOICES.choose(str(form), functools.partial(form.drawn, device), clock, alike, described)
        torch.cuda.empty_cache()  # weights come next, and want all of it


def alike(result: Tensor, wanted: Tensor) -> str:
    """How two results differ by more than roundings and the order of sums: some rows at a time."""
    for first in range(0, wanted.shape[0], BLOCK):
        one, other = result[first : first + BLOCK].float(), wanted[first : first + BLOCK].float()
        far = float((one - other).norm() / other.norm())
        if not far <= BOUND[wanted.dtype]:
            return f"rows from {first} on are wrong by {far:.2g} of their norm"
    return ""


def _product(w: Quantised, x: Tensor, x_scale: Tensor) -> Tensor:
    """``[..., o]`` of ``x`` ``[..., i]`` and its scales ``[..., 1]``."""
    rows = _dense(x.reshape(-1, x.shape[-1]))
    scales = x_scale.reshape(-1, 1).to(torch.float32).contiguous()
    form = Form(rows.shape[0], rows.shape[1], w.weight.shape[0], w.dtype, w.bias is not None)
    if form.rows:
        out: Tensor = CHOICES.run(str(form), rows, scales, w)
    else:
        out = torch.empty(0, form.outputs, dtype=w.dtype, device=x.device)
    return out.view(*x.shape[:-1], form.outputs)


def _dense(x: Tensor) -> Tensor:
    """A matrix as the library wants it, copied if it lies otherwise."""
    fits = x.is_contiguous() and (x.is_meta or x.data_ptr() % 16 == 0)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _scaled_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    scale = weight_scale.to(torch.float32).contiguous()
    held = None if bias is None else bias.contiguous()
    return _product(Quantised(_dense(weight), scale, held, dtype or x_scale.dtype), x, x_scale)


def quantised(weight: Tensor, bias: Tensor | None) -> Quantised:
    """The handle of a weight ``[o, i]`` in the working dtype."""
    return Quantised(*quantize_rows(weight), None if bias is None else bias.contiguous(), weight.dtype)


def _prepare_linear(_x: None, _x_scale: None, weight: Tensor, bias: Tensor | None) -> Quantised:
    return quantised(weight, bias)


def _prepare_qkv(_x: None, _x_scale: None, wq: Tensor, wk: Tensor, wv: Tensor, *biases: Tensor | None) -> Quantised:
    """One matrix, made where the weights are: on the device."""
    weights = (wq, wk, wv)
    numbers, scales = zip(*map(quantize_rows, weights), strict=True)
    filled = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    bias = None if all(b is None for b in biases) else torch.cat(filled)
    joined = torch.cat([x.view(torch.uint8) for x in numbers]).view(torch.float8_e4m3fn)
    return Quantised(joined, torch.cat(scales), bias, wq.dtype, tuple(w.shape[0] for w in weights))


def _qkv_linear(w: Quantised, x: Tensor, x_scale: Tensor) -> tuple[Tensor, ...]:
    """Views of one buffer ``[..., q + k + v]``."""
    return tuple(_product(w, x, x_scale).split(w.parts, dim=-1))


KERNELS: dict[str, Kernel] = {
    "scaled_linear": Kernel(_scaled_linear),
    "quantized_linear": Kernel(_product, _prepare_linear, ("weight", "bias")),
    "quantized_qkv_linear": Kernel(_qkv_linear, _prepare_qkv, ("wq", "wk", "wv", "bq", "bk", "bv")),
}
