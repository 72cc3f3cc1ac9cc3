"""What a run depends on, as it is written down with it."""

from __future__ import annotations

import json

import pytest
import torch

from helios.backend import select
from helios_cuda import CudaBackend, convolution, scaled


def test_a_gpu_and_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91400)
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"triton": "3.6.0", "nvidia-cublas": "13.1"}[name])
    monkeypatch.setattr(convolution.CHOICES, "record", {})
    monkeypatch.setattr(scaled.CHOICES, "record", {})
    wanted = {
        "device": "NVIDIA H200",
        "capability": "9.0",
        "cuda": "13.0",
        "cudnn": 91400,
        "cublas": "13.1",
        "triton": "3.6.0",
        "graphs": True,
        "memory": "full",
        "attention": {},
        "convolution": {},
        "scaled": {},
    }
    assert CudaBackend().execution_plan() == wanted
    changed = CudaBackend(graphs="off", memory="low").execution_plan()
    assert changed == {**wanted, "graphs": "asked for", "memory": "low"}
    assert json.loads(json.dumps(changed)) == changed


def test_the_interpreter_says_what_it_is() -> None:
    backend = select("cuda:interpret")
    assert isinstance(backend, CudaBackend)
    told = backend.execution_plan()
    assert told["device"] == backend.emulated
    assert told["graphs"] == "the interpreter has no graphs"
    assert told["capability"] is None
    assert told["cudnn"] is None
