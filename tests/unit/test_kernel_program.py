"""Weights that a kernel packs: read once, packed once, and made by the backend's own kernels where they are views."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch import Tensor

from helios import op
from helios.backend import Backend, Kernel
from helios.graph import Builder, Graph, Rate
from helios.lower import lower
from helios.ops.layout import narrow
from helios.ops.linear import linear

F32 = torch.float32


class Packing(Backend):
    """Counts what it runs; a linear takes its weight packed."""

    name = "packing"

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()
        self.kernels = {name: Kernel(self.counted(name)) for name in ("narrow", "linear")}
        self.kernels["linear"] = Kernel(self.product, self.pack, ("weight", "bias"))

    def counted(self, name: str) -> Any:
        def run(*operands: Any, **attrs: Any) -> Any:
            self.calls[name] += 1
            return op.get(name).fn(*operands, **attrs)

        return run

    def pack(self, x: None, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.calls["pack"] += 1
        assert x is None
        return weight.T.contiguous()

    def product(self, packed: Tensor, x: Tensor) -> Tensor:
        self.calls["linear"] += 1
        return x @ packed


class Weights:
    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors
        self.reads: list[str] = []

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name]


def halves() -> Graph:
    """Two products, each with half of one weight."""
    with Builder("halves") as build:
        x = build.input("x", (1, 2, 4), F32, Rate.STEP)
        weight = build.input("w", (6, 4), F32, Rate.WEIGHTS)
        for name, start in (("low", 0), ("high", 3)):
            build.output(name, linear(x, narrow(weight, dim=0, start=start, length=3)))
    return build.graph()


def test_a_view_of_a_weight_is_made_by_the_backend_and_packed_once() -> None:
    backend, weights = Packing(), Weights(w=torch.randn(6, 4))
    program = lower({"a": halves(), "b": halves()}, backend)
    program.load(weights)
    assert backend.calls == {"narrow": 2, "pack": 2}
    x = torch.randn(1, 2, 4)
    for entry in ("a", "b"):
        out = program.run(entry, {"x": x})
        assert torch.allclose(torch.cat([out["low"], out["high"]], -1), x @ weights.tensors["w"].T)
    assert backend.calls == {"narrow": 2, "pack": 2, "linear": 4}
    assert (weights.reads, program.weights) == (["w"], {})


def test_a_weight_of_another_shape_is_refused() -> None:
    program = lower({"a": halves()}, Packing())
    with pytest.raises(ValueError, match=r"weight 'w' has shape \[5, 4\], the graph takes \[6, 4\]"):
        program.load(Weights(w=torch.zeros(5, 4)))
