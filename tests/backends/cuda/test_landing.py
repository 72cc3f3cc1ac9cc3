"""Tensors on their way back to the host, over a link whose copies come as late as they may; and times by events."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slow_link import SlowLink
from torch import Tensor

from helios.errors import BackendError
from helios_cuda import CudaBackend
from helios_cuda.staging import Landing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", [(3,), (7, 5), (40, 17), (1, 1), (0, 4), ()])
def test_tensors_arrive(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    link = SlowLink()
    landing = Landing(link, nbytes=256)
    for scale in (50, 100):  # the slices are used again
        source = (torch.randn(shape) * scale).to(dtype)
        arrived = landing.fetch(source)
        assert arrived.dtype == dtype
        assert torch.equal(arrived, source)
        assert arrived.data_ptr() != source.data_ptr() or not source.numel()
    assert link.taken == 2 * 256  # no more pinned memory than that, however much is fetched
    assert all(copy.target.nbytes <= 256 for copy in link.copies)


def test_strides_do_not_matter() -> None:
    source = torch.randn(9, 8).t()[1:, ::2]
    arrived = Landing(SlowLink(), nbytes=64).fetch(source)
    assert torch.equal(arrived, source)
    assert arrived.is_contiguous()


def test_copies_begin_behind_what_computes_and_two_are_under_way() -> None:
    class Watched(SlowLink):
        def wait(self, mark: Any) -> None:
            under_way.append(sum(not copy.done for copy in self.copies))
            super().wait(mark)

    under_way: list[int] = []
    link = Watched()
    Landing(link, nbytes=64).fetch(torch.randn(64))
    assert under_way == [2, 2, 2, 1]
    assert link.free == [1] * 4


class Far(Tensor):
    """A tensor of the host that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


class Linked(CudaBackend):
    def link(self) -> Any:
        return self.slow

    def memory(self) -> None:
        return None

    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowLink()


def test_the_backend_fetches_over_its_link(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, source = Linked(), torch.randn(5, 3)
    assert backend.fetch(source) is source
    assert backend.slow.copies == []
    monkeypatch.setattr(Landing, "fetch", lambda self, tensor: self._link.taken)
    taken = backend.fetch(source.as_subclass(Far))
    assert taken == backend.fetch(source.as_subclass(Far)) > 0  # one pair of slices for all


def test_what_failed_before_is_explained_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: Landing, tensor: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Landing, "fetch", lost)
    with pytest.raises(BackendError, match="cuda was lost during its work"):
        Linked().fetch(torch.ones(2).as_subclass(Far))


def test_marks_are_events(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    class Event:
        made = 0

        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing
            Event.made += 1
            self.number = Event.made

        def record(self, stream: str) -> None:
            assert stream == "stream of cuda:0"

        def synchronize(self) -> None:
            done.append(self.number)

        def elapsed_time(self, other: Any) -> float:
            assert other.number in done
            return 1500.0 * float(other.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    backend = CudaBackend()
    first, second = backend.mark(), backend.mark()
    assert done == []
    assert backend.seconds_between(first, second) == 1.5
