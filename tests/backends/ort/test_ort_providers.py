"""Which provider runs, and one line for each way in which none can: nothing falls back in silence."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch

import helios
from helios.backend import candidates, select
from helios.cli import main
from helios.errors import BackendUnavailable, InputError, UnsupportedNode
from helios.graph import Builder, Graph, Rate
from helios.lower import lower
from helios.op import get
from helios_ort import OrtBackend, installed, probe, providers, sessions
from helios_ort.providers import Provider

# What onnxruntime-gpu 1.31.1 prints where there is no CUDA (seen here; colours and times as they come).
NO_CUDA = (
    "\x1b[0;93m2026-11-23 23:56:08.149273299 [W:onnxruntime:Default, onnxruntime_pybind_state.cc:856 operator()] No "
    "registered plugin EP device found for 'CUDAExecutionProvider' with device_id=0\x1b[m\n"
    "\x1b[1;31m2026-11-23 23:56:08.153242546 [E:onnxruntime:Default, provider_bridge_ort.cc:2458 operator()] "
    "/onnxruntime_src/onnxruntime/core/session/provider_bridge_ort.cc:2043 onnxruntime::Provider& "
    "onnxruntime::ProviderLibrary::Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load library "
    "/x/onnxruntime/capi/libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open shared object "
    "file: No such file or directory\n\x1b[m\n"
    "\x1b[0;93m2026-11-23 23:56:08.153265800 [W:onnxruntime:Default, onnxruntime_pybind_state.cc:1295 "
    "CreateExecutionProviderFactoryInstance] Failed to create CUDAExecutionProvider. Require cuDNN 9.* and CUDA 13.*."
    "\x1b[m\n"
)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What is found once is kept; tests that change what is installed must not be answered from before."""
    yield
    installed.runtime.cache_clear()
    providers.require_usable.cache_clear()


def gated(shape: tuple[int, ...] = (2, 5)) -> Graph:
    with Builder("gated") as build:
        x = build.input("x", shape, torch.float32, Rate.STEP)
        build.output("y", get("add")(get("silu")(x), x))
    return build.graph()


@pytest.mark.parametrize("spec", ["ort", "ort:cpu", "ort:CPU", "ort:CPUExecutionProvider"])
def test_the_cpu_is_the_default_and_names_have_no_case(spec: str) -> None:
    chosen = select(spec)
    assert isinstance(chosen, OrtBackend)
    assert chosen.provider == Provider("CPUExecutionProvider")
    assert (chosen.label, chosen.device.type, chosen.precisions) == ("ort", "cpu", ("fp32",))
    (device,) = chosen.devices()
    assert device.name.startswith(f"ONNX Runtime {onnxruntime.__version__}, CPUExecutionProvider, ")


def test_an_unknown_provider_is_answered_with_those_installed() -> None:
    with pytest.raises(
        BackendUnavailable, match=r"unknown execution provider 'cup': did you mean 'cpu'\? Known: .*cpu"
    ):
        select("ort:cup")


def test_a_provider_of_another_build_is_named_with_the_build_to_install() -> None:
    with pytest.raises(BackendUnavailable, match="has no provider 'cuda'; it has azure, cpu") as caught:
        select("ort:CUDA:1")
    assert caught.value.fix == "pip uninstall -y onnxruntime; pip install onnxruntime-gpu"


def test_a_provider_that_runs_nothing_is_refused_though_onnx_runtime_lists_it() -> None:
    """ONNX Runtime would give every node to the CPU and say nothing."""
    assert "AzureExecutionProvider" in onnxruntime.get_available_providers()
    with pytest.raises(BackendUnavailable, match=r"'azure' runs none of the ops .*gives it to CPUExecutionProvider"):
        select("ort:azure")


def test_a_node_that_would_run_elsewhere_is_an_error_unless_the_fallback_is_allowed() -> None:
    elsewhere = OrtBackend("azure")
    with pytest.raises(UnsupportedNode) as caught:
        lower({"main": gated()}, elsewhere)
    assert "backend 'ort:azure' cannot run: %0: float32[2,5] = silu(%x)" in caught.value.why
    assert (
        "AzureExecutionProvider does not run Sigmoid: ONNX Runtime gives it to CPUExecutionProvider" in caught.value.why
    )
    assert "--fallback reference" in caught.value.fix

    program = lower({"main": gated()}, elsewhere, fallback="reference")
    program.load(SimpleNamespace())  # it has no weights
    x = torch.randn(2, 5)
    assert torch.equal(program.run("main", {"x": x})["y"], torch.nn.functional.silu(x) + x)
    assert program.coverage.fallbacks == 2
    assert [row[:4] for row in program.coverage.rows()] == [("add", 0, 0, 1), ("silu", 0, 0, 1)]


class Usable:
    """A session that got the CPU in place of what was asked for, as ONNX Runtime gives it, and its log."""

    log = NO_CUDA

    def __init__(self, *_: Any, **__: Any) -> None:
        os.write(2, self.log.encode())

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (NO_CUDA, "libonnxruntime_providers_cuda.so: libcublasLt.so.13: cannot open shared object file: No such file"),
        ("2026 [W:onnxruntime:Default, a.cc:1 f] Failed to create X.", "cannot be used here: Failed to create X."),
        ("", "ONNX Runtime leaves it out and says nothing"),
    ],
)
def test_a_provider_that_is_left_out_silently_is_refused_with_what_the_log_says(
    log: str, reason: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Usable, "log", log)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Usable)
    monkeypatch.setattr(Usable, "get_provider_graph_assignment_info", None, raising=False)
    with pytest.raises(BackendUnavailable) as caught:
        providers.require_usable(Provider("CUDAExecutionProvider"))
    assert reason in caught.value.why
    assert "\n" not in caught.value.why
    assert capfd.readouterr().err == ""


def test_a_provider_that_raises_is_refused_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Please install TensorRT libraries\n as mentioned")

    monkeypatch.setattr(onnxruntime, "InferenceSession", SimpleNamespace(get_provider_graph_assignment_info=1))
    monkeypatch.setattr(providers, "runtime", lambda: SimpleNamespace(InferenceSession=fail))
    with pytest.raises(
        BackendUnavailable, match="'tensorrt' cannot be used here: Please install TensorRT libraries as"
    ):
        providers.require_usable(Provider("TensorrtExecutionProvider"))


def brings(name: str) -> Any:
    return SimpleNamespace(metadata={"Name": name}, files=["onnxruntime/__init__.py"])


def test_two_distributions_over_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [brings("onnxruntime-gpu"), brings("onnxruntime"), SimpleNamespace(metadata={"Name": "ortools"}, files=None)]
    installed.runtime.cache_clear()
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: both)
    with pytest.raises(BackendUnavailable, match="onnxruntime and onnxruntime-gpu are installed over one") as caught:
        OrtBackend().devices()
    assert caught.value.fix.startswith("pip uninstall -y onnxruntime onnxruntime-gpu; then install the one")


def test_the_installed_distribution_is_found() -> None:
    assert installed.distributions() == ["onnxruntime"]


@pytest.mark.parametrize(("absent", "why"), [("onnxruntime", "ONNX Runtime is not installed"),
                                             ("onnx_ir", "onnx_ir is not installed, which writes")])  # fmt: skip
def test_what_is_missing_is_named(absent: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    installed.runtime.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else real(name))
    with pytest.raises(BackendUnavailable, match=why) as caught:
        OrtBackend().devices()
    assert caught.value.fix == "pip install helios-hal[ort]"


def test_one_that_cannot_say_where_nodes_run_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    installed.runtime.cache_clear()
    monkeypatch.setattr(onnxruntime, "InferenceSession", object)
    with pytest.raises(BackendUnavailable, match="cannot say which provider runs a node"):
        OrtBackend().devices()


def test_without_onnx_runtime_the_package_imports_and_others_are_not_harmed() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "import helios_ort\n"
        "from helios.backend import probe\n"
        "print(probe('ort').why); print(probe('reference').available)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == ["ONNX Runtime is not installed", "True"]


# --- what a provider takes ---


def test_models_are_written_in_the_opset_of_which_a_provider_runs_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenVINO's provider of 1.24.1 answered: no RMSNormalization and no Attention of opset 23."""
    asked: list[int] = []

    def supports(node: Any, provider: Provider) -> str | None:
        asked.append(provider.opset)
        return "unknown" if provider.opset == 23 and node.op in ("rms_norm", "attention") else None

    probe._refusals.cache_clear()
    probe.written_for.cache_clear()
    monkeypatch.setattr(probe, "supports", supports)
    try:
        assert probe.written_for(Provider("OtherExecutionProvider")).opset == 20
        assert set(asked) == {23, 20, 18}
        assert probe.written_for(Provider("CPUExecutionProvider")).opset == 20
    finally:
        probe._refusals.cache_clear()
        probe.written_for.cache_clear()
    monkeypatch.undo()
    assert OrtBackend().provider.opset == 23


def test_the_opset_reaches_the_model() -> None:
    x = one_norm()
    kinds = [
        sessions._model(x, {}, Provider("CPUExecutionProvider", 0, opset))[0].count(b"RMSNormalization")
        for opset in (23, 20)
    ]
    assert kinds == [1, 0]


def one_norm() -> Graph:
    with Builder("norm") as build:
        build.output("y", get("rms_norm")(build.input("x", (1, 2, 8), torch.float32, Rate.STEP)))
    return build.graph()


def test_a_long_reason_is_cut_in_the_middle() -> None:
    told = sessions.plain("[ONNXRuntimeError] : 1 : FAIL : " + "a" * 900 + " the cause")
    assert told.startswith("FAIL: aaa")
    assert told.endswith("a the cause")
    assert len(told) < 400


# --- precisions ---


def test_a_precision_is_withheld_in_the_providers_own_words() -> None:
    with pytest.raises(InputError) as caught:
        helios.load(size="tiny", backend="ort", precision="bf16")
    assert (
        "backend 'ort' does not compute in bf16, but in fp32; CPUExecutionProvider: NOT_IMPLEMENTED: Could not find an "
        in (caught.value.why)
    )


def test_helios_backends_tells_of_precisions_and_of_a_provider_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HELIOS_BACKEND", "ort:cuda")
    assert main(["backends"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "ort has no bf16: CPUExecutionProvider: NOT_IMPLEMENTED" in told
    assert "HELIOS_BACKEND=ort:cuda is set, and decides, but cannot be used: ONNX Runtime" in told


def test_it_is_a_backend_like_any_other() -> None:
    found = {candidate.name: candidate for candidate in candidates()}
    assert found["ort"].cls is OrtBackend
    assert found["ort"].available
