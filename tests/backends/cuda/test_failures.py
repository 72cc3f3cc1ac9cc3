"""A full or a lost GPU, by the errors that torch really raises: what was needed, what was free, what to do next."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helios.errors import BackendError
from helios.graph import Builder, Graph, Rate
from helios.lower import lower
from helios.ops.pointwise import silu
from helios_cuda import CudaBackend, failures, streams

GIB = 1 << 30

FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 1.27 GiB. GPU 0 has a total capacity of 79.18 GiB of which 413.06 MiB is "
    "free. Process 123 has 70.00 GiB memory in use. Of the allocated memory 77.00 GiB is allocated by PyTorch"
)
LOST = [
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported at …",
    "CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure' in …",
    "CUDA error: device-side assert triggered",
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: unknown error",
    "Triton Error [CUDA]: an illegal memory access was encountered",
]


def raised(error: Exception, memory: Callable[[], Any] = lambda: (GIB // 2, 80 * GIB)) -> BackendError:
    with pytest.raises(BackendError) as caught, failures.explained("denoise.2", "cuda:1", memory):
        raise error
    assert caught.value.__cause__ is error
    return caught.value


def test_full() -> None:
    error = raised(FULL)
    assert error.why == "cuda:1 has no room for denoise.2: it needs 1.27 GiB more; 512.0 MiB of 80.0 GiB is free"
    for flag in ("--height", "--width", "--resume", "helios fit", "nvidia-smi"):
        assert flag in error.fix


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be …",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_full_as_libraries_say_it(text: str) -> None:
    assert raised(RuntimeError(text)).why.startswith(
        "cuda:1 has no room for denoise.2: it needs more memory; 512.0 MiB"
    )


def test_taken_by_another_process() -> None:
    text = "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with `TORCH_USE_CUDA_DSA`"
    told = failures.explain(RuntimeError(text), "the weights", "cuda:1", lambda: None)
    assert told is not None
    assert told.why == "cuda:1 is taken: another process has the GPU for itself, in exclusive mode"
    assert "nvidia-smi" in told.fix
    assert "--resume" in told.fix


def test_full_and_unable_to_say_how_full() -> None:
    def memory() -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory")

    assert raised(FULL, memory).why == "cuda:1 has no room for denoise.2: it needs 1.27 GiB more"
    assert raised(FULL, lambda: None).why == "cuda:1 has no room for denoise.2: it needs 1.27 GiB more"


@pytest.mark.parametrize("text", LOST)
@pytest.mark.parametrize("kind", [RuntimeError, getattr(torch, "AcceleratorError", RuntimeError)])
def test_lost(kind: type[RuntimeError], text: str) -> None:
    error = raised(kind(text))
    assert error.why == f"cuda:1 was lost during denoise.2: {text.splitlines()[0]}"
    assert "finished chunks are kept" in error.fix
    assert "--resume" in error.fix


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x")])
def test_a_defect_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error), match=re.escape(str(error))), failures.explained("x", "cuda", lambda: None):
        raise error


def test_room_for_the_weights() -> None:
    failures.require_room(20 * GIB, (19 * GIB, 80 * GIB), GIB, "cuda")
    failures.require_room(20 * GIB, None, 0, "cuda")
    with pytest.raises(BackendError) as caught:
        failures.require_room(27 * GIB, (10 * GIB, 80 * GIB), GIB, "cuda:1")
    assert caught.value.why == "the weights need 27.0 GiB on cuda:1; 11.0 GiB of 80.0 GiB is free, 69.0 GiB is in use"
    assert "nvidia-smi" in caught.value.fix
    with pytest.raises(BackendError) as caught:
        failures.require_room(27 * GIB, (23 * GIB, 24 * GIB), 0, "cuda")
    assert caught.value.why == "the weights need 27.0 GiB on cuda; 23.0 GiB of 24.0 GiB is free"
    assert "--memory low" in caught.value.fix


# In a program.


class OnCpu(CudaBackend):
    """The CUDA backend on the CPU, with one kernel that fails as it is told to."""

    def __init__(self) -> None:
        super().__init__(graphs="off")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def memory(self) -> tuple[int, int] | None:
        return GIB, 2 * GIB

    def synchronize(self) -> None:
        pass

    def reusable(self) -> int:
        return 0

    def link(self) -> None:
        return None


class Weights:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def read(self, name: str) -> torch.Tensor:
        if self.error:
            raise self.error
        return torch.ones(2)


def graph() -> Graph:
    with Builder("main") as build:
        build.output("y", silu(build.input("w", (2,), torch.float32, Rate.WEIGHTS)))
        build.output("z", silu(build.input("x", (2,), torch.float32, Rate.STEP)))
    return build.graph()


def test_programs_explain_what_fails_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = OnCpu()
    program = lower({"main": graph()}, backend)
    with pytest.raises(BackendError, match="no room for the weights"):
        program.load(Weights(FULL))
    program.load(Weights())
    inputs = {"x": torch.ones(2)}
    assert program.run("main", inputs)["z"].shape == (2,)

    def lost(*operands: Any, **attrs: Any) -> Any:
        raise RuntimeError(LOST[0])

    call = program._sequences["main"].calls[0]  # type: ignore[attr-defined]
    monkeypatch.setattr(type(call.kernel), "run", property(lambda self: lost), raising=False)
    with pytest.raises(BackendError, match="cuda was lost during main"):
        program.run("main", inputs)
    with pytest.raises(BackendError, match="cuda was lost during main"):
        program.profile("main", inputs)


def test_a_device_that_is_lost_between_programs_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = OnCpu()
    program = lower({"main": graph()}, backend)
    program.load(Weights())

    def lost(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError(LOST[0])

    with monkeypatch.context() as patch:
        patch.setattr(type(program), "move", lost)
        with pytest.raises(BackendError, match="cuda was lost during main"):
            program.run("main", {"x": torch.ones(2)})
        patch.setattr(type(program), "phase_of", lost)
        with pytest.raises(BackendError, match="cuda was lost during a context"):
            program.bind({})
    monkeypatch.setattr(streams, "beside", lost)
    beside = OnCpu()
    beside.chosen = {**beside.chosen, "overlap": "on"}
    with pytest.raises(BackendError, match="cuda was lost during its work"), beside.beside(torch.ones(2)):
        pass


def test_waiting_for_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(device: object) -> None:
        raise RuntimeError(LOST[0])

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(CudaBackend, "memory", lambda self: None)
    with pytest.raises(BackendError, match="cuda was lost during its work"):
        CudaBackend().synchronize()
