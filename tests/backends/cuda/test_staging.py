"""Weights on their way to the device, over a link whose copies come as late as they may."""

from __future__ import annotations

import pytest
import torch
from slow_link import SlowLink

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
