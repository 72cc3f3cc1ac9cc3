"""Videos over streams that keep vector clocks: who reads what another stream writes, and has waited for it?

All is computed on the CPU, at once. What is noted is the order that a GPU would be bound to: an operation on a tensor
of the device belongs to the current stream, an event to a point in a stream, and nothing else orders two streams. So an
order that is right by luck on a GPU is a race here. Memory that is given back and taken again is not looked at.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helios import op
from helios.backend import Kernel
from helios.pipeline import Chunk, Pipeline
from helios.pipeline.model import sized_model
from helios_cuda import CudaBackend, offload, streams
from helios_cuda.program import CudaProgram
from helios_cuda.staging import CudaLink, Landing

CPU = torch.device("cpu")
Clock = collections.Counter


class Actor:
    """A stream, or the host; ``seen`` has how much of each actor's work is done before its next."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: Clock[str] = Clock()

    def wait(self, seen: Clock[str]) -> None:
        self.seen |= seen

    # As ``torch.cuda.Stream``.

    def wait_stream(self, other: Actor) -> None:
        self.wait(other.seen)

    def wait_event(self, event: Event) -> None:
        self.wait(event.seen)

    def record_event(self) -> Event:
        return Event(self.seen.copy())


class Event:
    """As ``torch.cuda.Event``."""

    host: Actor

    def __init__(self, seen: Clock[str]) -> None:
        self.seen = seen

    def synchronize(self) -> None:
        Event.host.wait(self.seen)


class Races(TorchDispatchMode):
    """Notes who wrote and read each piece of memory, and what of it was in no order.

    Attributes:
        found: races, in words.
        current: streams, the last of which is the current one.
        busy: how many operations each actor did.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self.current = [Actor("usual")]
        self.host = Event.host = Actor("host")
        self.busy: Clock[str] = Clock()
        self.on_device: set[int] = set()
        self.written: dict[int, tuple[str, int]] = {}
        self.read: dict[int, dict[str, int]] = collections.defaultdict(dict)
        self.kept: list[Any] = []  # so that no address is used twice: not all tensors are made by operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = _memories((args, kwargs)), _memories(result)
        fresh, changed = outputs - inputs, _changed(func, args, kwargs)
        self.kept.append([x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor)])
        if not fresh and not changed and outputs:  # a view
            return result
        device = bool(inputs & self.on_device)
        actor = self.current[-1] if device else self.host
        if device:
            actor.wait(self.host.seen)  # the host queues what it knows to be done before
            self.on_device |= fresh
        actor.seen[actor.name] += 1
        self.busy[actor.name] += 1
        for memory in inputs:
            self.require(actor, memory, str(func), write=memory in changed)
        for memory in fresh | changed:
            self.written[memory], self.read[memory] = (actor.name, actor.seen[actor.name]), {}
        for memory in inputs - changed:
            self.read[memory][actor.name] = actor.seen[actor.name]
        to_host = func is torch.ops.aten.copy_.default and device and not changed & self.on_device
        if func is torch.ops.aten._local_scalar_dense.default or (to_host and not _later(args, kwargs)):
            self.host.wait(actor.seen)
        return result

    def require(self, actor: Actor, memory: int, what: str, write: bool) -> None:
        """Whoever wrote is done; before a write also whoever read."""
        before = dict([self.written[memory]] if memory in self.written else [])
        before |= self.read[memory] if write else {}
        for name, time in before.items():
            if actor.seen[name] < time:
                self.found.append(f"{what} on {actor.name} does not wait for {name}")

    def placed(self, tensor: Tensor) -> Tensor:
        """The tensor on the device: a copy on the current stream, unless it is there."""
        if _memory(tensor) in self.on_device:
            return tensor
        memory = torch.empty_like(tensor)
        self.kept.append(memory.untyped_storage())
        self.on_device.add(_memory(memory))
        return memory.copy_(tensor)

    def slot(self, memory: Tensor, free: Any) -> Any:
        """Memory of the device for weights that are fetched."""
        self.kept.append(memory.untyped_storage())
        self.on_device.add(_memory(memory))
        return SLOT(memory, free)


SLOT = offload._Slot


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _memories(tree: Any) -> set[int]:
    return {_memory(x) for x in tree_leaves(tree) if isinstance(x, Tensor)}


def _later(args: Any, kwargs: Any) -> bool:
    """Whether a copy is not waited for."""
    return bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))


def _changed(func: Any, args: Any, kwargs: Any) -> set[int]:
    """What an operation writes to, of its operands."""
    named = zip(func._schema.arguments, args, strict=False)
    given = [
        *((argument, x) for argument, x in named),
        *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs),
    ]
    return _memories([x for a, x in given if a.alias_info is not None and a.alias_info.is_write])


class Link(CudaLink):
    def pinned(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)


class OnCpu(CudaBackend):
    """The CUDA backend with the ops' own bodies, over the streams of ``Races``."""

    fusions = ()  # type: ignore[assignment]

    def __init__(self, overlap: str, memory: str) -> None:
        super().__init__(graphs="off", overlap=overlap, memory=memory)
        kernels = {name: Kernel(op.get(name).fn) for name in op.names()}
        product = Kernel(lambda w, x: op.get("linear").fn(x, *w), lambda x, *w: w, ("weight", "bias"))
        self.__dict__["kernels"] = {**kernels, "linear": product}
        self.landing = Landing(Link(CPU))

    @property
    def device(self) -> torch.device:
        return CPU

    def memory(self) -> tuple[int, int] | None:
        return (offload.RESERVE, 1 << 40) if self.low else None

    def reusable(self) -> int:
        return 0

    def link(self) -> Link | None:
        return Link(CPU) if self.low else None

    def synchronize(self) -> None:
        raise AssertionError("the host waits for all of the device")

    def fetch(self, tensor: Tensor) -> Tensor:
        return self.landing.fetch(tensor)

    def execution_plan(self) -> dict[str, Any]:
        return {}

    def mark(self) -> Any:
        return torch.cuda.current_stream(CPU).record_event()

    def seconds_between(self, first: Any, second: Any) -> float:
        second.synchronize()
        return 1.0


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> Iterator[Races]:
    made = Races()

    @contextlib.contextmanager
    def within(stream: Any) -> Iterator[None]:
        made.current.append(stream)
        yield
        made.current.pop()

    streams.of_device.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: Actor(f"stream {len(made.busy)} {priority}"))
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: made.current[-1])
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(offload, "ARENA", 1 << 20)
    monkeypatch.setattr(offload, "_Slot", made.slot)
    monkeypatch.setattr(CudaProgram, "move", lambda self, tensor, dtype: made.placed(tensor.to(dtype)))
    yield made
    streams.of_device.cache_clear()


def video(races: Races, chunks: int, overlap: str = "off", memory: str = "full") -> list[Chunk]:
    pipeline = Pipeline(sized_model("tiny", "base"), OnCpu(overlap, memory), "fp32")
    with races:
        settings: dict[str, Any] = {"height": 16, "width": 32, "steps": 2, "max_sequence_length": 8, "seed": 3}
        return list(pipeline.stream("a cat", chunks=chunks, **settings))


def test_nothing_races_while_chunks_are_decoded_beside(races: Races) -> None:
    wanted = video(races, 3)
    assert races.found == []
    assert len(races.busy) == 3  # the host, the usual stream, and that for landings
    chunks = video(races, 3, overlap="on")
    assert races.found == []
    beside = streams.of_device(CPU, streams.BESIDE)
    assert races.busy[vars(beside)["name"]] > 100
    for one, other in zip(chunks, wanted, strict=True):
        assert torch.equal(one.frames, other.frames)
        assert torch.equal(one.latents, other.latents)


def test_decoding_that_does_not_wait_for_its_latents_races(races: Races, monkeypatch: pytest.MonkeyPatch) -> None:
    real = streams.beside
    monkeypatch.setattr(streams, "beside", lambda device, read: real(device, ()))
    video(races, 2, overlap="on")
    assert any("does not wait for usual" in race for race in races.found)


def test_frames_that_are_read_elsewhere_race(races: Races, monkeypatch: pytest.MonkeyPatch) -> None:
    real = OnCpu.beside

    def beside(self: OnCpu, *tensors: Tensor) -> Any:
        return real(self, *tensors) if tensors else contextlib.nullcontext()

    monkeypatch.setattr(OnCpu, "beside", beside)
    video(races, 2, overlap="on")
    assert any("on usual does not wait for stream" in race for race in races.found)


def test_a_landing_that_is_read_too_soon_races(races: Races, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Link, "wait", lambda self, mark: None)
    video(races, 1)
    assert any("on host does not wait for stream" in race for race in races.found)


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_weights_that_are_fetched_race_with_nothing(overlap: str, races: Races) -> None:
    video(races, 2, overlap, "low")
    assert races.found == []
    sends = vars(streams.of_device(CPU, streams.LANDINGS))["name"]  # from here to here is the other way for a link
    assert races.busy[sends] > 100


@pytest.mark.parametrize("forgotten", ["hold", "mark"])
def test_weights_that_nobody_waits_for_race(forgotten: str, races: Races, monkeypatch: pytest.MonkeyPatch) -> None:
    early = Event(Clock())
    monkeypatch.setattr(Link, forgotten, lambda self, *mark: early)
    video(races, 1, memory="low")
    wanted = "on usual does not wait for stream" if forgotten == "hold" else "does not wait for usual"
    assert any(wanted in race for race in races.found)
