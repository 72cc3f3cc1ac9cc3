"""The check that runs on a GPU, tried on the CPU: that it passes what is right, and that each part of it can fail."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from helios.backend import Backend, ReferenceBackend, select

ROOT = Path(__file__).parents[3]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_execution", ROOT / "tools/gpu/check_execution.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load()


def make(**options: Any) -> Backend:
    return select("reference")


def test_what_is_right_passes(tool: ModuleType) -> None:
    found = list(tool.checks(make, "tiny", 64, 64))
    assert len(found) == 16
    assert [wrong for _, wrong in found if wrong] == []


def test_other_bits_fail(tool: ModuleType) -> None:
    x = {"denoise.0, turn 0": torch.ones(2), "denoise.1, turn 0": torch.zeros(3)}
    assert tool._differences(x, x) == ""
    y = {**x, "denoise.0, turn 0": torch.tensor([1.0, 1.5])}
    assert tool._differences(y, x) == "1 of 2 differ, by 0.5 at most: denoise.0, turn 0"
    assert tool._distinct(x) == ""
    assert tool._distinct({**x, "again": torch.ones(2)}) == "some are equal"
    assert tool._distinct({"x": torch.tensor([torch.nan])}) == "some are not finite"


def test_results_that_come_early_and_clocks_that_run_wrong_fail(tool: ModuleType) -> None:
    class Hasty(ReferenceBackend):
        def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
            return super().fetch(tensor)[: 4 << 20]

        def seconds_between(self, first: Any, second: Any) -> float:
            return 2 * super().seconds_between(first, second)

    assert tool._fetched(Hasty()) == "not with 4194305 bytes"
    assert " s of 0." in tool._timed(Hasty())


def test_other_chunks_fail(tool: ModuleType) -> None:
    def chunk(frame: float) -> SimpleNamespace:
        return SimpleNamespace(index=1, latents=torch.ones(2), frames=torch.full((2,), frame))

    assert tool._unlike([chunk(1.0)], [chunk(1.0)]) == ""
    assert tool._unlike([chunk(1.0)], [chunk(2.0)]) == "not the frames of chunk 1"


def test_waiting_while_a_chunk_is_queued_fails(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    strict: list[bool] = [False]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: strict.append(mode == "error"))

    def decode(run: Any, begun: Any) -> str:
        if strict[-1]:
            raise RuntimeError("called a synchronizing CUDA operation\nsecond line")
        return "decoded"

    monkeypatch.setattr(tool.Run, "_begin", lambda run, state: "begun")
    monkeypatch.setattr(tool.Run, "_decode", decode)
    waits: list[str] = []
    backend = SimpleNamespace(device=torch.device("cuda"))
    with tool._watched(backend, waits):
        done = [(tool.Run._begin(None, None), tool.Run._decode(None, None)) for _ in range(3)]
    assert done == [("begun", "decoded")] * 3
    assert waits == ["decode: called a synchronizing CUDA operation"]
    assert strict == [False, True, False, True, False]


def test_backends_choose_as_the_first_did(tool: ModuleType) -> None:
    class Chooses(ReferenceBackend):
        plan: Any = None

        def execution_plan(self) -> Any:
            return {"way": "one"}

        def use_execution_plan(self, plan: Any) -> None:
            self.plan = plan

    alike = tool.Alike(Chooses)
    assert alike().plan is None
    assert alike().plan == {"way": "one"}


def test_waiting_fails(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    class Waits:
        names = ("denoise.0",)

        class backend:
            device = torch.device("cuda")

            @staticmethod
            def synchronize() -> None:
                pass

        def context(self, seed: int) -> None:
            pass

        def velocity(self, *arguments: Any) -> None:
            raise RuntimeError("called a synchronizing CUDA operation\nsecond line")

    assert tool._waits(Waits()) == "called a synchronizing CUDA operation"
    assert modes == ["error", "default"]
