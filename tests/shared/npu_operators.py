"""Operators of torch_npu as plain torch, for tests of the Ascend kernels' own logic in a process without torch_npu.

Each is a few lines from its documentation, and strict where that is: contiguous operands, dtypes, names of arguments.
What CANN computes is not shown by these.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helios_ascend import operators

__all__ = ["Calls", "installed"]

SIXTEEN = (torch.bfloat16, torch.float16)


class Calls:
    """Stands for ``torch.ops.npu``; notes what was called, with how many positions and which keywords."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int, tuple[str, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        compute = globals()[f"_{name}"]

        def call(*operands: Any, **keywords: Any) -> Any:
            self.made.append((name, len(operands), tuple(keywords)))
            assert all(x.is_contiguous() for x in operands if isinstance(x, Tensor)), name
            return compute(*operands, **keywords)

        return call


def _softmax(q: Tensor, k: Tensor, v: Tensor, scale: float, layout: str) -> Tensor:
    heads = [x.double() if layout == "BNSD" else x.double().transpose(1, 2) for x in (q, k, v)]
    out = (heads[0] @ heads[1].mT * scale).softmax(-1) @ heads[2]
    return (out if layout == "BNSD" else out.transpose(1, 2)).contiguous().to(q.dtype)


def _npu_fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, *, num_heads: int, scale: float, input_layout: str, inner_precise: int
) -> tuple[Tensor, Tensor]:
    assert query.dtype in SIXTEEN
    assert query.shape[-1] % 16 == 0
    assert query.shape[input_layout.index("N")] == num_heads
    assert inner_precise == 0
    return _softmax(query, key, value, scale, input_layout), torch.zeros(1)


def _npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *, scale: float
) -> tuple[Any, ...]:
    assert query.shape[input_layout.index("N")] == head_num
    rest = torch.zeros(1)
    return _softmax(query, key, value, scale, input_layout), rest, rest, rest, 0, 0, 0


def _npu_fusion_attention_v3(*operands: Any, **keywords: Any) -> tuple[Any, ...]:
    return (*_npu_fusion_attention(*operands, **keywords)[:4], torch.zeros(1), torch.zeros(1))


def _npu_rms_norm(x: Tensor, gamma: Tensor, *, epsilon: float) -> tuple[Tensor, Tensor]:
    assert gamma.dtype == x.dtype
    rstd = (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (x.float() * rstd * gamma.float()).to(x.dtype), rstd


def _npu_rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, *, rotary_mode: str) -> Tensor:
    assert rotary_mode == "interleave"
    assert x.dtype == r1.dtype == r2.dtype
    assert r1.shape == r2.shape == (1, x.shape[1], 1, x.shape[3])
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return r1 * x + r2 * turned


def _npu_add_layer_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor, *, epsilon: float, additional_output: bool
) -> tuple[Tensor, ...]:
    assert x1.dtype == x2.dtype
    assert gamma.dtype == beta.dtype == torch.float32
    assert additional_output
    total = x1.float() + x2.float()
    normed = F.layer_norm(total, gamma.shape, gamma, beta, epsilon)
    return normed.to(x1.dtype), torch.zeros(1), torch.zeros(1), total.to(x1.dtype)


def _npu_format_cast(x: Tensor, acl_format: int) -> Tensor:
    assert acl_format == operators.FRACTAL_NZ
    assert x.dtype in SIXTEEN
    return x


def _layer_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """In float32 inside, which torch's own on a host in 16 bits is not quite."""
    assert x.is_contiguous()
    kinds = {row.dtype for row in (gamma, beta) if row is not None}
    assert len(kinds) < 2
    assert kinds <= {x.dtype, torch.float32}
    affine = [None if row is None else row.float() for row in (gamma, beta)]
    return F.layer_norm(x.float(), x.shape[-1:], affine[0], affine[1], eps).to(x.dtype)


@contextlib.contextmanager
def installed(version: tuple[int, int] = (2, 13)) -> Iterator[Calls]:
    """Within, ``helios_ascend.operators`` calls these, on tensors of the host."""
    calls = Calls()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "version", lambda: version)
        patch.setattr(operators, "begin", lambda: None)
        patch.setattr(operators, "layer_norm", _layer_norm)
        patch.setattr(torch.ops, "npu", calls, raising=False)
        patch.setattr(operators, "torch_npu", lambda: types.SimpleNamespace(npu=_Npu()))
        yield calls


class _Npu:
    """``torch.npu`` on the host: nothing waits, and there is one stream."""

    def device(self, _device: Any) -> Any:
        return contextlib.nullcontext()

    def synchronize(self, _device: Any = None) -> None:
        return None

    def mem_get_info(self, _device: Any = None) -> tuple[int, int]:
        return 60 << 30, 64 << 30

    def memory_reserved(self, _device: Any = None) -> int:
        return 0

    memory_allocated = memory_reserved
