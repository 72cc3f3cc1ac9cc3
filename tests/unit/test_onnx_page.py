"""What docs/onnx.md tells a reader to type works, in that order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from helios.cli import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "onnx.md").read_text()


def blocks() -> list[tuple[str, str]]:
    """Language and text of each block of code."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def velocity(path: str) -> Any:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = {x.name: random.standard_normal(x.shape).astype(np.float32) for x in session.get_inputs()}
    return session.run(None, feeds)[0]


def test_the_pages_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for language, text in blocks():
        if language == "python":
            exec(text, scope)  # noqa: S102
            continue
        for line in text.splitlines():
            words = shlex.split(line.removeprefix("$ "))
            if "OMP_NUM_THREADS=1" not in words:  # how a figure was measured
                assert words[0] == "helios"
                assert main(words[1:]) == 0
    assert scope["latents"].shape == scope["shape"]
    assert np.isfinite(scope["latents"]).all()
    assert len(scope["done"]) == 27
    assert np.abs(velocity("annotated/own.onnx") - velocity("annotated/denoise.0.onnx")).max() <= 1e-5
    assert "FastGelu" in Path("annotated/own.onnx").read_bytes().decode("latin-1")
