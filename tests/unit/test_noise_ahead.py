"""Noise that is drawn before its chunk begins: the bits of noise that is not, and no draw twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import helios
from helios.pipeline.run import Run
from helios.sampler import AheadNoise, CounterNoise

SHAPES = [(0, (2, 4, 9, 4, 6)), (1, (2, 4, 9, 1, 2, 4)), (2, (2, 4, 9, 2, 3, 4))]


def drawn(noise: CounterNoise, chunk: int) -> list[torch.Tensor]:
    return [noise.block(chunk, stage, shape) if stage else noise.latents(chunk, shape) for stage, shape in SHAPES]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was really drawn."""
    calls: list[tuple[Any, ...]] = []
    real = CounterNoise._normal

    def normal(self: CounterNoise, *key: Any) -> torch.Tensor:
        calls.append(key)
        return real(self, *key)

    monkeypatch.setattr(CounterNoise, "_normal", normal)
    return calls


def test_what_the_last_chunk_asked_for_is_ready_for_the_next(counted: list[Any]) -> None:
    plain, noise = CounterNoise(7), AheadNoise(7)
    wanted = [drawn(plain, chunk) for chunk in range(3)]
    assert same(drawn(noise, 0), wanted[0])
    for chunk in (1, 2):
        noise.draw(chunk)
        counted.clear()
        assert same(drawn(noise, chunk), wanted[chunk])
        assert counted == []


def test_another_chunk_is_drawn_when_it_is_asked_for(counted: list[Any]) -> None:
    noise = AheadNoise(7)
    drawn(noise, 0)
    noise.draw(1)
    assert same(drawn(noise, 5), drawn(CounterNoise(7), 5))
    counted.clear()
    wanted = drawn(CounterNoise(7), 1)
    assert same(drawn(noise, 1), wanted)  # still there
    assert len(counted) == len(SHAPES)
    assert same(drawn(noise, 1), wanted)  # and handed out once
    assert len(counted) == 2 * len(SHAPES)


def film() -> list[torch.Tensor]:
    pipeline = helios.load(size="tiny", variant="base", backend="reference", precision="fp32")
    return [chunk.latents for chunk in pipeline.stream("a cat", height=16, width=32, steps=1, chunks=3, seed=3)]


def test_a_run_that_draws_ahead_has_the_same_bits(monkeypatch: pytest.MonkeyPatch, counted: list[Any]) -> None:
    wanted = film()
    draws = len(counted)

    def ahead(self: Run, chunk: int) -> None:
        assert self._noise is not None
        self._noise.draw(chunk)

    monkeypatch.setattr(Run, "_draw_ahead", ahead)
    counted.clear()
    assert same(film(), wanted)
    assert len(counted) == draws + draws // 3  # this one also draws for a chunk behind the last


def test_a_device_is_used_and_the_last_chunk_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[int] = []
    monkeypatch.setattr(AheadNoise, "draw", lambda self, chunk: chunks.append(chunk))
    settings: dict[str, Any] = {"height": 16, "width": 32, "steps": 1, "chunks": 3}
    helios.load(size="tiny", variant="base", backend="reference:meta").generate("a cat", **settings)
    assert chunks == [1, 2]
    helios.load(size="tiny", variant="base", backend="reference:meta").generate("a cat", rng="diffusers", **settings)
    helios.load(size="tiny", variant="base", backend="reference", precision="fp32").generate(
        "a cat", **settings | {"chunks": 2}
    )
    assert chunks == [1, 2]
