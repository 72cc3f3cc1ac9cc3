"""What ``tools/on_gpu.sh kernels`` notes of the libraries that the backend chose, with a clock that tests set."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from helios_cuda import convolution
from helios_cuda.attention import Chooser
from helios_cuda.attention_libraries import TRITON, Device, Form, Library
from helios_cuda.choice import Choices, Variant

FOLDER = Path(__file__).parents[3] / "tools" / "gpu"
CPU = torch.device("cpu")
HERE = Device("Test GPU", (9, 0))


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("speeds")


class Rig:
    def need_cuda(self, what: str) -> None:
        """It is there."""


class Backend:
    device = CPU

    def __init__(self, attention: Chooser | None = None) -> None:
        self.attention = attention

    def use_execution_plan(self, plan: dict[str, Any]) -> None:
        assert self.attention is not None
        self.attention.use(plan["attention"])


def chooser(*ms: float) -> Chooser:
    absent = Library("absent", lambda form, device: "not installed", TRITON.run, lambda: "1")
    times = iter(ms)

    def clock(call: Callable[[], object]) -> float:
        call()
        return next(times)

    fast = Library("fast", lambda form, device: None, TRITON.run, lambda: "2")
    return Chooser(CPU, [TRITON, fast, absent], clock, HERE)


def test_the_choice_of_attention_is_noted_and_taken_back(speeds: ModuleType) -> None:
    form = Form(1, 16, 16, 1, 16, torch.float32)
    first = chooser(400.0, 300.0)
    record = speeds._choose(Rig(), Backend(first), "attention", form)
    assert record["chosen"] == "fast"
    assert record["ms"] == {TRITON.name: 400.0, "fast": 300.0}
    assert record["why_not"] == {"absent": "not installed"}
    again = chooser()  # whose clock cannot be asked
    logged = {"id": "choice/attention/x", "row": str(form), "column": "attention", "status": "measured", **record}
    speeds.recall(Backend(again), {"choice/attention/x": logged})
    assert again.plan == first.plan
    assert speeds._choose(Rig(), Backend(again), "attention", form)["chosen"] == "fast"
    (_, line) = speeds.report([logged])
    assert line == f"{form}: fast (fast 300.000, {TRITON.name} 400.000)"


def test_the_choice_of_a_convolution_is_noted_in_milliseconds(
    speeds: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = next(variant for variant in convolution.VARIANTS if variant.name == "cudnn")  # on a CPU it is torch's own
    there = Variant("ours", ours.run)
    absent = Variant("absent", ours.run, lambda *_: "no device")
    monkeypatch.setattr(convolution, "CHOICES", Choices([there, absent]))

    def settle(forms: list[convolution.Form], device: torch.device, described: str) -> None:
        (form,) = forms
        drawn = functools.partial(form.drawn, device)
        convolution.CHOICES.choose(str(form), drawn, lambda call: 0.002, convolution.alike, described)

    monkeypatch.setattr(convolution, "settle", settle)
    monkeypatch.setattr(speeds, "describe", lambda _: HERE)
    form = convolution.Form((1, 2, 3, 4, 4), (2, 2, 1, 1, 1), torch.float32, True, (1, 1, 1), (0, 0, 0))
    record = speeds._choose(Rig(), Backend(), "convolution", form)
    assert record["chosen"] == "ours"
    assert record["ms"] == {"ours": 2.0}
    assert record["why_not"] == {"absent": "no device"}
