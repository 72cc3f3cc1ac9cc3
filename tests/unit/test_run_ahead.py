"""A run on a device with a queue beside: which chunk is begun when, with the same bits, errors and states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helios.backend import ReferenceBackend
from helios.errors import BackendError
from helios.pipeline import Chunk, Pipeline, Progress
from helios.pipeline.model import sized_model

SETTINGS: dict[str, Any] = {"height": 16, "width": 32, "steps": 1, "max_sequence_length": 8, "seed": 3}


class Beside(ReferenceBackend):
    """Notes what is asked of which queue: ``<`` and ``>`` around what is beside; marks and fetches by their letter."""

    overlaps = True

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.read: list[Tensor] = []

    @contextlib.contextmanager
    def beside(self, *tensors: Tensor) -> Iterator[None]:
        self.read += tensors
        self.log.append("<" + "w" * bool(tensors))
        yield
        self.log.append(">")

    def mark(self) -> Any:
        self.log.append("m")
        return super().mark()

    def fetch(self, tensor: Tensor) -> Tensor:
        self.log.append("f" if tensor.dtype == torch.uint8 else "l")
        return super().fetch(tensor)

    def told(self) -> str:
        """Since it was asked last."""
        told = "".join(self.log)
        self.log.clear()
        return told


def pipeline(backend: ReferenceBackend | None = None) -> Pipeline:
    return Pipeline(sized_model("tiny", "base"), backend or Beside(), "fp32")


def same(one: list[Chunk], other: list[Chunk]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.frames, b.frames) and torch.equal(a.latents, b.latents) for a, b in pairs)


BEGUN, DECODED, LATENTS, HANDED = "mmmm", "<w>", "l", "<fm>"


def test_a_chunk_is_begun_before_the_one_before_it_is_handed_out_but_for_the_first() -> None:
    backend = Beside()
    told: list[str] = []
    chunks = []
    for chunk in pipeline(backend).stream("a cat", chunks=4, **SETTINGS):
        chunks.append(chunk)
        told.append(backend.told())
    assert told == [
        BEGUN + DECODED + "<flm>",
        BEGUN + DECODED + LATENTS + BEGUN + HANDED,
        DECODED + LATENTS + BEGUN + HANDED,
        DECODED + LATENTS + HANDED,
    ]
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    assert same(chunks, list(pipeline(ReferenceBackend()).stream("a cat", chunks=4, **SETTINGS)))
    assert all(torch.equal(x.float(), chunk.latents) for x, chunk in zip(backend.read, chunks, strict=True))
    for chunk in chunks:
        parts = {name: seconds for name, seconds in chunk.timings.items() if name != "total"}
        assert [*parts] == ["text", "history", "denoise", "decode"]
        assert min(parts.values()) >= 0
        assert chunk.timings["total"] == pytest.approx(sum(parts.values()))


def test_states_are_those_of_their_chunks() -> None:
    whole = list(pipeline().stream("a cat", chunks=4, **SETTINGS))
    for chunk in whole:
        assert chunk.state.chunk == chunk.index + 1
        rest = list(pipeline(ReferenceBackend()).stream(state=chunk.state, chunks=4))
        assert same(rest, whole[chunk.index + 1 :])
    assert same(list(pipeline().stream(state=whole[1].state, chunks=4)), whole[2:])


def test_the_generator_may_be_left_at_any_chunk() -> None:
    made = pipeline()
    whole = list(made.stream("a cat", chunks=4, **SETTINGS))
    for count in (1, 2, 3):
        stream = made.stream("a cat", chunks=4, **SETTINGS)
        begun = [next(stream) for _ in range(count)]
        stream.close()  # type: ignore[attr-defined]
        assert same(begun, whole[:count])


def test_nothing_is_begun_where_prompts_arrive_meanwhile() -> None:
    backend, asked, told = Beside(), [], []

    def ask(chunk: int) -> str:
        asked.append(chunk)
        return f"a cat {chunk}"

    for _ in pipeline(backend).stream("a cat", prompts=ask, chunks=3, **SETTINGS):
        told.append((backend.told(), list(asked)))
    assert told == [(BEGUN + DECODED + "<flm>", list(range(n))) for n in (1, 2, 3)]


def test_a_schedule_is_known_before() -> None:
    told: list[Progress] = []
    stream = pipeline().stream(prompts=[("a cat", 1), ("a dog", 2)], progress=told.append, **SETTINGS)
    begun = [told[-1].chunk for _ in stream]
    assert begun == [0, 2, 2]


@pytest.mark.parametrize("ends", [BackendError("the device was lost"), KeyboardInterrupt("the device was lost")])
def test_what_becomes_of_a_chunk_does_not_touch_the_one_before_it(ends: BaseException) -> None:
    def tell(progress: Progress) -> None:
        if progress.chunk == 2:
            raise ends

    stream = pipeline().stream("a cat", chunks=4, progress=tell, **SETTINGS)
    assert [next(stream).index, next(stream).index] == [0, 1]
    with pytest.raises(type(ends), match="the device was lost"):
        next(stream)


def test_warnings_stay_with_their_chunk() -> None:
    schedule = [("a cat", 2), (" ".join(["far"] * 20), 2)]
    chunks = pipeline().stream(prompts=schedule, interpolation_steps=0, **SETTINGS)
    assert [len(chunk.warnings) for chunk in chunks] == [0, 0, 1, 0]
