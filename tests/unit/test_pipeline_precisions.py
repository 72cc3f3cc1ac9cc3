"""Whole runs in quantised precisions: from the command to the video, resumed to the same bits, or refused clearly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generate_runs import Captured, generate, latents, refused, said

import helios
from helios.cli.options import PRECISIONS as NAMED
from helios.errors import InputError
from helios.media import read_video
from helios.pipeline import Pipeline
from helios.precision import PRECISIONS, precision

QUANTISED = ("fp8", "fp8-attention", "fp8-weights")
SIZE: list[str] = ["--size", "tiny", "--height", "64", "--width", "64", "--steps", "1", "--backend", "reference"]
SMALL: dict[str, Any] = {"height": 16, "width": 32, "max_sequence_length": 8, "steps": 1, "seed": 3}


def pipeline(name: str, backend: str = "reference") -> Pipeline:
    return helios.load(size="tiny", variant="base", backend=backend, precision=name)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_run_is_stopped_and_resumed_to_the_same_bits(name: str, tmp_path: Path, capsys: Captured) -> None:
    asked = [*SIZE, "--precision", name, "--seed", "4", "a prompt"]
    whole, resumed = tmp_path / "whole.mp4", tmp_path / "resumed.mp4"
    assert generate(*asked, "--chunks", 2, "--out", whole) == 0
    assert f"in {name}" in said(capsys)
    assert read_video(whole, height=64, width=64).shape[0] == 65
    assert generate(*asked, "--chunks", 1, "--out", resumed) == 0
    error = refused(capsys, "--resume", "--chunks", 2, "--precision", "bf16", "--out", resumed)
    assert "has other settings" in error
    assert "'bf16' is asked for" in error
    assert generate("--resume", "--chunks", 2, "--out", resumed) == 0
    for chunk in range(2):
        assert torch.equal(latents(whole, chunk), latents(resumed, chunk))


def test_each_precision_gives_other_bits_and_much_the_same_video() -> None:
    came = {
        name: pipeline(name).generate("a prompt", chunks=1, **SMALL).latents.double() for name in ("bf16", *QUANTISED)
    }
    usual = came.pop("bf16")
    for name, made in came.items():
        apart = float((made - usual).norm() / usual.norm())
        assert 0 < apart < 0.2, name
    assert not torch.equal(came["fp8"], came["fp8-attention"])
    assert not torch.equal(came["fp8"], came["fp8-weights"])


def test_a_state_is_of_its_precision() -> None:
    state = pipeline("fp8").generate("a prompt", chunks=1, **SMALL).state
    assert state.plan["precision"] == "fp8"
    again = pipeline("fp8").plan(pipeline("fp8").request(state=state), state)
    assert again["graphs"] == state.plan["graphs"]
    other = pipeline("bf16")
    assert other.plan(other.request(state=state), state)["graphs"] != state.plan["graphs"]


@pytest.mark.parametrize("name", QUANTISED)
def test_a_backend_without_it_names_what_it_has(name: str, tmp_path: Path, capsys: Captured) -> None:
    with pytest.raises(InputError, match=f"backend 'cpu' does not compute in {name}, but in ") as told:
        pipeline(name, "cpu")
    for offered in helios.backend.select("cpu").precisions:
        assert offered in told.value.why
    error = refused(capsys, *SIZE[:-1], "cpu", "--precision", name, "--out", tmp_path / "x.mp4", "a prompt")
    assert f"does not compute in {name}" in error
    assert "helios backends" in error
    assert not (tmp_path / "x.mp4").exists()


def test_the_names_in_the_help_are_the_precisions() -> None:
    assert set(NAMED) == set(PRECISIONS) - {"fp64"}
    with pytest.raises(InputError, match="did you mean 'fp8-weights'"):
        precision("fp8-weigths")
