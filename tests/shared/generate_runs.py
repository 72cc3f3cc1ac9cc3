"""``helios generate`` as the tests call it, at the smallest size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helios.cli import main
from helios.pipeline.store import RunFolder

SMALL = ["--height", "64", "--width", "64", "--steps", "1"]
SIZE = ["--size", "tiny", "--backend", "cpu", "--precision", "fp32", *SMALL]
Captured = pytest.CaptureFixture[str]


def said(capsys: Captured) -> str:
    """Standard output as one line, however the terminal broke it."""
    return " ".join(capsys.readouterr().out.split())


def generate(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def latents(out: Path, chunk: int) -> torch.Tensor:
    return RunFolder.open(RunFolder.beside(out)).read(chunk).latents


def refused(capsys: Captured, *arguments: object) -> str:
    """What a mistake prints; it ends with 2, without a traceback, and with something to do next."""
    capsys.readouterr()
    assert generate(*arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("error: ") == 1
    return error
