"""Weights on their way to the device, over a link whose copies come as late as they may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slow_link import SlowLink
from torch import Tensor

from helios.graph import Builder, Graph, Rate
from helios.lower import lower
from helios.ops.pointwise import silu
from helios_cuda import CudaBackend
from helios_cuda.staging import Staging

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3,), (7, 5), (40, 17), (1, 1), (0, 4), ()])
def test_tensors_arrive_in_their_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    link = SlowLink()
    staging = Staging(link, CPU, nbytes=256)
    source = torch.randn(shape)
    arrived = staging.upload(source, dtype)
    assert arrived.dtype == dtype
    assert arrived.is_contiguous()
    assert torch.equal(arrived, source.to(dtype))
    assert max(c.source.nbytes for c in link.copies) <= 256 if link.copies else source.numel() == 0


def test_strides_of_the_host_do_not_matter() -> None:
    staging = Staging(SlowLink(), CPU, nbytes=64)
    source = torch.randn(9, 8).t()[1:, ::2]
    assert torch.equal(staging.upload(source, torch.float32), source)


def test_a_slice_is_filled_again_when_it_has_been_read() -> None:
    link = SlowLink()
    staging = Staging(link, CPU, nbytes=64)
    sources = [torch.randn(50) for _ in range(4)]
    arrived = [staging.upload(x, torch.float32) for x in sources]
    staging.finish()
    assert all(torch.equal(a, b) for a, b in zip(arrived, sources, strict=True))
    assert len({c.source.data_ptr() for c in link.copies}) == 2
    assert link.waits >= len(link.copies) - 2


def test_copies_wait_for_what_was_in_the_memory() -> None:
    link = SlowLink()
    Staging(link, CPU).upload(torch.randn(3), torch.float32)
    assert link.free == [1]


# In a program.


class Elsewhere(CudaBackend):
    """A device that tensors can be sent to, and nothing more."""

    def __init__(self) -> None:
        super().__init__(graphs="off")

    @property
    def device(self) -> torch.device:
        return torch.device("meta")

    def memory(self) -> None:
        return None

    def reusable(self) -> int:
        return 0

    def link(self) -> None:
        return None


def graph() -> Graph:
    with Builder("main") as build:
        build.output("y", silu(build.input("x", (2,), torch.float32, Rate.STEP)))
    return build.graph()


def test_inputs_of_a_step_are_sent_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    program = lower({"main": graph()}, Elsewhere())
    program.load(None)  # type: ignore[arg-type]
    pinned: list[Tensor] = []
    sent: list[bool] = []
    real = Tensor.to

    def pin(self: Tensor) -> Tensor:
        pinned.append(self)
        return self

    def to(self: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if any(isinstance(x, torch.device) for x in arguments):
            sent.append(named.get("non_blocking", False))
        return real(self, *arguments, **named)

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: False)
    program.run("main", {"x": torch.ones(2, dtype=torch.float64)})
    assert [x.dtype for x in pinned] == [torch.float32]  # what is pinned is the copy, in its dtype
    assert sent == [True]
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: True)
    program.run("main", {"x": torch.ones(2)})
    assert sent == [True, False]
    program.run("main", {"x": torch.ones(2, device="meta")})
    assert len(pinned) == 1
