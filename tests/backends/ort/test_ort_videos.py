"""Whole videos: near the reference chunk by chunk, resumed to the same bits, and chosen from the command line."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import helios
from helios.cli import main
from helios.errors import BackendError
from helios.pipeline import Chunk
from helios_ort import OrtBackend

SMALL: dict[str, Any] = {"height": 64, "width": 64, "max_sequence_length": 8, "steps": 1, "seed": 3}
BOUND = 2e-5


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def chunks_of(backend: str, size: str, count: int, options: Any = None, **settings: Any) -> list[Chunk]:
    pipeline = helios.load(
        size=size, variant="distilled", backend=backend, precision="fp32", backend_options=options or {}
    )
    return list(pipeline.stream("a red boat", chunks=count, **settings))


PUBLISHED: dict[str, Any] = {name: value for name, value in SMALL.items() if name != "steps"}
"""With as many steps as the variant was published with."""


@functools.cache
def reference() -> list[Chunk]:
    return chunks_of("reference", "tiny", 3, **PUBLISHED)


def near(ours: list[Chunk], theirs: list[Chunk]) -> None:
    assert [chunk.index for chunk in ours] == [chunk.index for chunk in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert 0 < distance(one.latents, other.latents) <= BOUND, one.index
        assert int((one.frames.int() - other.frames.int()).abs().max()) <= 1


@pytest.mark.parametrize("weights", ["shared", "packed"])
def test_three_chunks_of_distilled_text_to_video(weights: str) -> None:
    near(chunks_of("ort", "tiny", 3, {"weights": weights}, **PUBLISHED), reference())


@pytest.mark.slow
def test_three_chunks_of_distilled_text_to_video_at_mini_size() -> None:
    near(chunks_of("ort", "mini", 3, **PUBLISHED), chunks_of("reference", "mini", 3, **PUBLISHED))


@pytest.mark.parametrize("variant", ["base", "mid"])
def test_other_variants_with_an_image_to_begin_with(variant: str) -> None:
    image = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0))
    runs = [
        helios.load(size="tiny", variant=variant, backend=backend, precision="fp32").generate(
            "a red boat", chunks=1, image=image, **(SMALL | {"steps": 2})
        )
        for backend in ("ort", "reference")
    ]
    assert 0 < distance(runs[0].latents, runs[1].latents) <= BOUND


def test_a_run_goes_on_to_the_same_bits_and_with_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = helios.load(size="tiny", variant="distilled", backend="ort")
    whole = list(pipeline.stream("a red boat", chunks=3, **SMALL))
    state = whole[0].state
    rest = list(helios.load(size="tiny", variant="distilled", backend="ort").stream(chunks=3, state=state))
    assert [chunk.index for chunk in rest] == [1, 2]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(rest, whole[1:], strict=True))
    assert state.plan["execution"]["provider"] == "CPUExecutionProvider"
    monkeypatch.setattr(OrtBackend, "execution_plan", lambda self: {**state.plan["execution"], "onnxruntime": "9.9.9"})
    with pytest.raises(BackendError, match=r"and here it would be '9\.9\.9'"):
        list(helios.load(size="tiny", variant="distilled", backend="ort").stream(chunks=3, state=state))


def test_generate_by_the_variable_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HELIOS_BACKEND", "ort:CPU")
    out = tmp_path / "boat.mp4"
    settings = ["--height", "64", "--width", "64", "--steps", "1", "--seed", "3"]
    assert main(["generate", "a red boat", "--size", "tiny", "--chunks", "1", *settings, "--out", str(out)]) == 0
    assert out.stat().st_size > 0
    told = capsys.readouterr().out
    assert "tiny distilled, random weights of seed 0, on ort in fp32" in told
    assert "fallback" not in told
