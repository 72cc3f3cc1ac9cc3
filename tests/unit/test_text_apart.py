"""A device that cannot hold text encoder and transformer at once: one after the other, and the same bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import helios
from helios.backend import ReferenceBackend
from helios.errors import BackendError
from helios.model.room import RESERVE
from helios.model.text import StandInText, Umt5Text, text_bytes
from helios.pipeline import Pipeline
from helios.pipeline import pipeline as pipelines
from helios.pipeline.denoise import Denoiser
from helios.program import Program

SETTINGS: dict[str, Any] = {"height": 64, "width": 64, "steps": 1, "max_sequence_length": 8}


class Small(ReferenceBackend):
    """As much memory as is said when it is first asked; later, when the VAE is cut, enough."""

    def __init__(self, free: int) -> None:
        super().__init__()
        self.free = free

    def memory(self) -> tuple[int, int]:
        free, self.free = self.free, 1 << 40
        return free, 1 << 40


@pytest.fixture(scope="module")
def needed(checkpoint: Path) -> int:
    """Bytes that both networks take together."""
    model = helios.load(checkpoint, backend="reference").model
    transformer = sum(math.prod(info.shape) for info in model.transformer_weights.tensors.values())
    return 4 * transformer + text_bytes(model.text(torch.float32, torch.device("cpu")))


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened, in its order."""
    told: list[str] = []

    class Told(Denoiser):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            told.append("transformer")
            super().__init__(*arguments, **named)

    load, release = Umt5Text._load, Umt5Text.release

    def loaded(self: Umt5Text) -> Any:
        if self._loaded is None:
            told.append("encoder")
        return load(self)

    def released(self: Umt5Text) -> None:
        if self._loaded is not None:
            told.append("released")
        release(self)

    monkeypatch.setattr(pipelines, "Denoiser", Told)
    monkeypatch.setattr(Umt5Text, "_load", loaded)
    monkeypatch.setattr(Umt5Text, "release", released)
    return told


def made(checkpoint: Path, free: int) -> Pipeline:
    return helios.load(checkpoint, backend=Small(free), precision="fp32")


def latents(pipeline: Pipeline, prompt: str | None, chunks: int = 1, **more: Any) -> torch.Tensor:
    return torch.cat([c.latents for c in pipeline.stream(prompt, chunks=chunks, **SETTINGS, **more)], 2)


def test_bytes_of_the_encoder(checkpoint: Path) -> None:
    encoder = Umt5Text(checkpoint, text_dim=32, dtype=torch.float32, device=torch.device("cpu"))
    _, network = encoder._load()
    assert encoder.nbytes == text_bytes(encoder) == sum(p.nbytes for p in network.parameters())
    assert text_bytes(StandInText(16)) == 0


def test_one_after_the_other_and_the_same_bits(checkpoint: Path, needed: int, order: list[str]) -> None:
    room = math.ceil(needed / (1 - RESERVE)) + 1
    large, small = made(checkpoint, 1 << 40), made(checkpoint, room - 2)
    assert not made(checkpoint, room).apart
    assert not large.apart
    assert small.apart
    wanted = latents(large, "a cat")
    assert order == ["transformer", "encoder"]  # there is plenty of room
    order.clear()
    assert torch.equal(latents(made(checkpoint, room), "a cat"), wanted)
    assert order == ["transformer", "encoder", "released"]
    order.clear()
    assert torch.equal(latents(small, "a cat"), wanted)
    assert order == ["encoder", "released", "transformer"]
    order.clear()
    assert torch.equal(latents(small, "a cat"), wanted)
    assert order == []  # all is there
    assert torch.equal(latents(small, "a dog"), latents(large, "a dog"))
    assert order == ["encoder", "released", "transformer"]  # the large one still has its encoder


def test_all_that_a_request_says_is_encoded_at_once(checkpoint: Path, order: list[str]) -> None:
    small = made(checkpoint, 1 << 16)
    small.plan(small.request(prompts=[("a cat", 1), ("a dog", 1)], guidance=2.0, negative_prompt="dark", **SETTINGS))
    assert {text for text, _ in small._encoded} == {"a cat", "a dog", "dark"}
    assert order == ["encoder", "released", "transformer"]


def test_a_run_that_goes_on_has_the_prompts_of_its_state(checkpoint: Path, order: list[str]) -> None:
    large, small = made(checkpoint, 1 << 40), made(checkpoint, 1 << 16)
    first = next(iter(large.stream("a cat", chunks=2, **SETTINGS)))
    order.clear()
    request = small.request("a dog", state=first.state, chunks=2, interpolation_steps=3)
    small.plan(request, first.state)
    assert {text for text, _ in small._encoded} == {"a cat", "a dog"}
    assert order == ["encoder", "released", "transformer"]


def steps_aside(order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def aside(self: Program) -> bool:
        order.append("aside")
        return True

    monkeypatch.setattr(Program, "aside", aside)


def test_a_transformer_that_can_step_aside_is_not_loaded_again(
    checkpoint: Path, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = latents(made(checkpoint, 1 << 40), "a dog")
    steps_aside(order, monkeypatch)
    small = made(checkpoint, 1 << 16)
    latents(small, "a cat")
    order.clear()
    assert torch.equal(latents(small, "a dog"), wanted)
    assert order == ["aside", "encoder", "released"]


def test_it_steps_aside_for_prompts_that_arrive_while_it_runs(
    checkpoint: Path, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(chunk: int) -> str | None:
        return "a dog" if chunk == 1 else None

    wanted = latents(made(checkpoint, 1 << 40), "a cat", 2, prompts=ask)
    steps_aside(order, monkeypatch)
    order.clear()
    assert torch.equal(latents(made(checkpoint, 1 << 16), "a cat", 2, prompts=ask), wanted)
    assert order == ["encoder", "released", "transformer", "aside", "encoder", "released"]


def test_given_embeddings_need_no_encoder(checkpoint: Path, order: list[str]) -> None:
    small = made(checkpoint, 1 << 16)
    small.plan(small.request(prompt_embeds=torch.zeros(1, 8, 32), **{**SETTINGS, "max_sequence_length": None}))
    assert order == ["transformer"]


def test_an_encoder_without_room_is_told(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def explained(self: Small, doing: str) -> Any:
        told.append(doing)
        raise BackendError("no room")

    small = made(checkpoint, 1 << 16)
    monkeypatch.setattr(Small, "explained", explained)
    with pytest.raises(BackendError, match="no room"):
        latents(small, "a cat")
    assert told == ["the text encoder"]
