"""What ``tools/gpu`` makes of decoding beside denoising: turns, clocks, bits, and words."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "tools" / "gpu"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("overlapped")


class Scene:
    """Videos whose chunks take as many seconds as their way and turn say."""

    def __init__(self, seconds: dict[str, list[float]], other: str = "") -> None:
        self.backend = SimpleNamespace(name="cuda", chosen={"overlap": "off", "graphs": "on"}, options={"overlap": ()})
        self.left, self.other, self.now = {way: list(each) for way, each in seconds.items()}, other, 0.0
        self.asked: list[str] = []
        self.pipeline = self

    def ready(self) -> None:
        assert self.asked == []

    def request(self, steps: Any) -> Any:
        return steps

    def run(self, request: Any) -> Iterator[Any]:
        way = self.backend.chosen["overlap"]
        self.asked.append(way)
        seconds = self.left[way].pop(0)
        for i in range(100):
            self.now += 50.0 if i < 2 else seconds  # what comes first is not steady
            numbers = torch.full((2,), float(way == self.other and i == 3))
            yield SimpleNamespace(frames=numbers, latents=torch.ones(2))


def taken(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, scene: Scene) -> dict[str, Any]:
    monkeypatch.setattr(tool.time, "perf_counter", lambda: scene.now)
    made: dict[str, Any] = tool.in_turns(scene, (1, 1, 1), 6)
    assert scene.asked == ["off", "on"] * 3
    assert scene.backend.chosen == {"overlap": "off", "graphs": "on"}
    return {**made, "row": "14b"}


def test_ways_take_turns_and_the_first_of_each_does_not_count(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = taken(tool, monkeypatch, Scene({"off": [9.0, 1.10, 1.12], "on": [9.0, 1.00, 1.02]}))
    assert record["chunk_s"] == {"off": pytest.approx([1.10, 1.12]), "on": pytest.approx([1.00, 1.02])}
    assert record["gain"] == pytest.approx(1.11 / 1.01 - 1)
    assert (record["faster"], record["correct"]) == ("on", True)
    (line,) = tool.lines(record)
    assert line == (
        "14b [1, 1, 1]: decoded beside the next chunk 32.67 FPS, after one another 29.73: +9.9 %, overlap=on is faster"
    )


@pytest.mark.parametrize(("off", "on", "faster"), [(1.0, 1.2, "off"), (1.1, 1.1, "neither"), (1.0, 1.05, "neither")])
def test_what_differs_no_more_than_turns_do_is_no_gain(
    off: float, on: float, faster: str, tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene({"off": [9.0, off, off + 0.1], "on": [9.0, on, on + 0.1]})
    assert taken(tool, monkeypatch, scene)["faster"] == faster


@pytest.mark.parametrize("other", ["off", "on"])
def test_other_bits_are_wrong(other: str, tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    record = taken(tool, monkeypatch, Scene({"off": [1.0] * 3, "on": [1.0] * 3}, other))
    assert not record["correct"]
    assert record["why"] == "other bits beside than after one another"


def test_a_backend_without_the_option_has_nothing_to_compare(tool: ModuleType) -> None:
    scene = Scene({})
    scene.backend.options = {}
    with pytest.raises(importlib.import_module("results").NotThereError, match="no option overlap"):
        tool.in_turns(scene, (1, 1, 1), 3)
