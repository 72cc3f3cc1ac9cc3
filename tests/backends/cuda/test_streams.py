"""Which stream does what, with streams that only note what they are asked; and captures that break off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from helios_cuda import CudaBackend, streams
from helios_cuda.graphs import CudaRecorder, NotCaptured, capture
from helios_cuda.staging import CudaLink

GPU = torch.device("cuda", 0)


class Stream:
    """A stand-in for ``torch.cuda.Stream``; ``log`` has what all of them were asked."""

    log: ClassVar[list[str]] = []
    current: ClassVar[list[Any]] = []

    def __init__(self, device: torch.device, priority: int = 0, name: str = "") -> None:
        self.device, self.priority = device, priority
        self.name = name or f"s{len({line.split()[0] for line in Stream.log})}"
        Stream.log.append(f"{self.name} made {priority}")

    def wait_stream(self, other: Stream) -> None:
        Stream.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        Stream.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        return f"event of {self.name}"


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    streams.of_device.cache_clear()
    Stream.log, Stream.current = [], []
    Stream.current.append(Stream(GPU, name="usual"))
    Stream.log.clear()

    @contextlib.contextmanager
    def within(stream: Stream) -> Iterator[None]:
        Stream.current.append(stream)
        yield
        Stream.current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream.current[-1])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    yield Stream.log
    streams.of_device.cache_clear()


def test_each_purpose_has_its_own_for_good(fakes: list[str]) -> None:
    made = {streams.of_device(GPU, p) for p in (streams.CAPTURES, streams.SENDS, streams.LANDINGS, streams.BESIDE)}
    assert len(made) == 4
    for _ in range(40):  # torch would have given some of its 32 a second time
        CudaRecorder(GPU)
        CudaLink(GPU).send(torch.ones(1), torch.ones(1))
    assert len(fakes) == 4
    assert streams.of_device(GPU, streams.BESIDE).priority < streams.of_device(GPU, streams.CAPTURES).priority


def test_copies_each_way_do_not_wait_for_each_other(fakes: list[str]) -> None:
    link = CudaLink(GPU)
    there, back = torch.empty(1, device="meta"), torch.ones(1)
    one = link.send(there, torch.ones(1, device="meta"), "a")
    assert link.send(back, torch.ones(1), "b") != one
    waits = [line for line in fakes if "waits" in line]
    assert [line.split()[-1] for line in waits] == ["a", "b"]
    assert waits[0].split()[0] != waits[1].split()[0]


class Noted(Tensor):
    def record_stream(self, stream: Any) -> None:
        Stream.log.append(f"kept for {stream.name}")


def test_what_is_beside_waits_for_what_it_reads_and_for_nothing_else(fakes: list[str]) -> None:
    backend = CudaBackend(overlap="on")
    assert backend.overlaps
    with backend.beside(torch.ones(2).as_subclass(Noted)):
        name = Stream.current[-1].name
    assert vars(streams.of_device(GPU, streams.BESIDE))["name"] == name
    assert fakes == [f"{name} made -1", f"{name} waits for usual", f"kept for {name}"]
    fakes.clear()
    with backend.beside():
        pass
    assert fakes == []


@pytest.mark.parametrize("backend", [CudaBackend(), CudaBackend("interpret", overlap="on")])
def test_nothing_is_beside_unless_asked_for_and_where_there_is_a_gpu(backend: CudaBackend, fakes: list[str]) -> None:
    assert not backend.overlaps
    with backend.beside(torch.ones(2)):
        assert len(Stream.current) == 1
    assert fakes == []


class Graph:
    """A stand-in for ``torch.cuda.graph``, whose end fails after anything failed within, as that of CUDA does."""

    def __init__(self, graph: Any, pool: Any, stream: Stream, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.stream = stream

    def __enter__(self) -> None:
        Stream.current.append(self.stream)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        Stream.current.pop()


def test_a_capture_that_breaks_off_says_why_and_leaves_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    from helios.graph import Builder, Rate
    from helios.ops.pointwise import silu

    class Whole:
        def replay(self) -> None:
            pass

    def refused(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def back(stream: Stream) -> None:
        Stream.current[-1] = stream

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Whole)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "set_stream", back)
    monkeypatch.setattr(CudaRecorder, "warm_up", lambda self, run: None)
    with Builder("step") as build:
        build.output("y", silu(build.input("x", (2,), torch.float32, Rate.STEP)))
    usual = Stream.current[-1]
    with pytest.raises(NotCaptured, match="step: CUDA error: operation not permitted when stream is capturing"):
        capture(CudaRecorder(GPU), {"step": build.graph()}, lambda name: ["x"], {}, refused, torch.device("cpu"))
    assert Stream.current[-1] is usual
