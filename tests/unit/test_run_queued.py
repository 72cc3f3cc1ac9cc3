"""A run on a device that works by itself: the host asks rarely, times are the device's, failures are explained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helios.backend import ReferenceBackend
from helios.errors import BackendError
from helios.pipeline import Pipeline
from helios.pipeline import codec as codecs
from helios.pipeline.model import sized_model
from helios.pipeline.store import Saved, decode_again

SETTINGS: dict[str, Any] = {"height": 16, "width": 32, "steps": 1, "chunks": 1, "seed": 3}


class Queued(ReferenceBackend):
    """Keeps its own time, of which every mark takes one second more than the one before it; and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[int] = []
        self.fetched: list[torch.dtype] = []
        self.fails = ""

    def synchronize(self) -> None:
        raise AssertionError("the host waited for all of the device")

    def mark(self) -> int:
        self.marks.append(len(self.marks))
        return self.marks[-1] * (self.marks[-1] + 1) // 2

    def fetch(self, tensor: Tensor) -> Tensor:
        self.fetched.append(tensor.dtype)
        with self.explained("its work"):
            if self.fails == "fetch":
                raise RuntimeError("lost")
            return super().fetch(tensor)

    @contextlib.contextmanager
    def explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise BackendError(f"the device failed during {doing}") from error


def pipeline(backend: ReferenceBackend) -> Pipeline:
    return Pipeline(sized_model("tiny", "base"), backend, "fp32")


def test_a_chunk_asks_the_device_for_its_results_alone() -> None:
    backend = Queued()
    result = pipeline(backend).generate("a cat", **SETTINGS)
    wanted = pipeline(ReferenceBackend()).generate("a cat", **SETTINGS)
    assert torch.equal(result.frames, wanted.frames)
    assert torch.equal(result.latents, wanted.latents)
    assert backend.fetched == [torch.uint8, torch.float32]
    assert dict(result.timings[0]) == {"text": 1, "history": 2, "denoise": 3, "decode": 4, "total": 10}


@pytest.mark.parametrize("fails", ["fetch", "frames", "text"])
def test_what_fails_late_is_explained(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("lost")

    backend = Queued()
    made = pipeline(backend)
    backend.fails = fails
    if fails == "frames":
        monkeypatch.setattr(codecs, "to_frames", lost)
    if fails == "text":
        monkeypatch.setattr(made.text, "encode", lost)
    doing = {"fetch": "its work", "frames": "the frames", "text": "the text encoder"}[fails]
    with pytest.raises(BackendError, match=f"failed during {doing}"):
        made.generate("a cat", **SETTINGS)


def test_frames_that_are_decoded_again_are_fetched_as_well() -> None:
    backend = Queued()
    made = pipeline(backend)
    (chunk,) = made.stream("a cat", **SETTINGS)
    backend.fetched.clear()
    assert torch.equal(decode_again(made.codec, Saved(chunk.state, chunk.latents, "")), chunk.frames)
    assert backend.fetched == [torch.uint8]


def test_a_device_without_a_clock_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    backend = ReferenceBackend()
    monkeypatch.setattr(backend, "synchronize", lambda: waits.append(1))
    first, second = backend.mark(), backend.mark()
    assert len(waits) == 2
    assert 0 <= backend.seconds_between(first, second) < 60


def test_numbers_that_nobody_has_are_zeros() -> None:
    fetched = ReferenceBackend("meta").fetch(torch.empty(2, 3, dtype=torch.bfloat16, device="meta"))
    assert torch.equal(fetched, torch.zeros(2, 3, dtype=torch.bfloat16))
