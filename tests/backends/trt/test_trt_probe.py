"""What `helios backends` says of a machine that lacks something: one line, and one fix."""

from __future__ import annotations

import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trt_acts
from trt_strict import Strict

from helios.backend import probe, select
from helios.cli import main
from helios.errors import BackendError, BackendUnavailable, InputError
from helios_trt import TrtBackend, library
from helios_trt import probe as trt_probe
from helios_trt.machine import driver_version


@pytest.fixture(autouse=True)
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test puts there is gone after it."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in PACKAGES}
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
    sys.modules.update(before)


PACKAGES = ("tensorrt", "tensorrt_bindings")


def put(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", module)


def test_importing_the_backend_needs_no_tensorrt_and_no_gpu() -> None:
    assert TrtBackend().name == "trt"
    assert "tensorrt" not in sys.modules


def test_absent() -> None:
    with pytest.raises(BackendUnavailable, match="TensorRT is not installed") as caught:
        trt_probe.devices()
    assert caught.value.fix == f"pip install tensorrt-cu{(torch.version.cuda or '13').partition('.')[0]}"


def test_backends_says_it_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends"]) == 0
    assert "trt: TensorRT is not installed\n  fix: pip install tensorrt-cu" in capsys.readouterr().out


def test_absent_backend_that_was_asked_for() -> None:
    with pytest.raises(BackendUnavailable, match="TensorRT is not installed"):
        select("trt")


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_bindings_without_libraries(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real message of the real loader: a module that is linked with a library which is not there."""
    folder = tmp_path / package
    folder.mkdir()
    source = tmp_path / "empty.c"
    source.write_text("void needed(void) {}\nvoid PyInit_core(void) { needed(); }\n")
    lost = tmp_path / "libnvonnxparser.so.11"
    subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{lost.name}", "-o", lost, source], check=True)
    made = ["cc", "-shared", "-fPIC", "-Wl,--no-as-needed", "-o", folder / "core.so", source, lost]
    subprocess.run(made, check=True)
    lost.unlink()
    (folder / "__init__.py").write_text("from .core import *\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BackendUnavailable) as caught:
        trt_probe.devices()
    said = "TensorRT's Python bindings are installed, its libraries are not: libnvonnxparser.so.11 was not found"
    assert caught.value.why == said
    assert "LD_LIBRARY_PATH" in caught.value.fix
    assert "\n" not in caught.value.why + caught.value.fix


def test_bindings_and_libraries_of_two_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt").mkdir()
    text = "tensorrt.so: undefined symbol: getBuilderPluginRegistry"
    (tmp_path / "tensorrt" / "__init__.py").write_text(f"raise ImportError({text!r})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    installed = {"bindings": "10.16.1.11", "libs": "11.4.0.106"}
    monkeypatch.setattr(library, "_installed", installed.get)
    with pytest.raises(BackendUnavailable, match="are of different releases") as caught:
        library.tensorrt()
    assert "(bindings 10.16.1.11, libs 11.4.0.106)" in caught.value.why


@pytest.mark.parametrize("version", ["8.6.1.6", "9.3.0"])
def test_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("tensorrt")
    old.__spec__ = Strict(10, trt_acts.ACTS).module.__spec__
    old.__version__ = version  # type: ignore[attr-defined]
    put(monkeypatch, old)
    with pytest.raises(BackendUnavailable, match=rf"TensorRT {version} is too old") as caught:
        library.tensorrt()
    assert caught.value.fix.startswith("pip install --upgrade")


@pytest.mark.parametrize("lacks", ["", "RMSNormalization", "Attention RotaryEmbedding"])
def test_parser_is_asked_what_it_takes(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trt_acts.LACKS, lacks)
    module = Strict(11, trt_acts.ACTS).module
    assert library.lacking(module, library.logger(module)) == tuple(lacks.split())


def test_version_before_attention_is_not_asked() -> None:
    assert library.lacking(types.SimpleNamespace(__version__="10.13.3"), None) == library.OPSET_23


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, Strict(11, trt_acts.ACTS).module)
    assert "is built without CUDA" in probe("trt").why


def test_no_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, Strict(11, trt_acts.ACTS).module)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None if name == "onnx_ir" else object())
    with pytest.raises(BackendUnavailable, match="onnx_ir is not installed") as caught:
        trt_probe.devices()
    assert caught.value.fix == "pip install 'helios-hal[trt]'"


def test_driver_that_is_too_old_for_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT logs it and gives no object; the bindings tell that as a constructor that returned nothing."""
    strict = Strict(11, trt_acts.ACTS)

    def refuse(self: Any, logger: Any) -> None:
        logger.log(strict.module.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35.\nPlease check")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(strict.module.Runtime, "_start", refuse, raising=False)
    put(monkeypatch, strict.module)
    monkeypatch.setattr(trt_probe, "require_cuda", lambda: None)
    monkeypatch.setattr(trt_probe, "gpus", list)
    with pytest.raises(BackendUnavailable, match="TensorRT and the NVIDIA driver do not fit") as caught:
        trt_probe.devices()
    assert "error: 35. Please check" in caught.value.why
    assert "tensorrt-cu12" in caught.value.fix


def test_builder_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    log = library.logger(Strict(11, trt_acts.ACTS).module)
    with pytest.raises(BackendError, match="TensorRT makes no builder: no reason given"):
        library.started(lambda: None, "builder", log)


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="weights of backend 'trt'"):
        TrtBackend(weights="twice")
    with pytest.raises(InputError, match="no option 'memory'"):
        TrtBackend(memory="low")
    with pytest.raises(InputError, match="no provider 'cuda'"):
        TrtBackend("cuda")
    with pytest.raises(InputError, match="contradict"):
        TrtBackend("inputs", weights="profiles")


def test_way_of_holding_weights_by_name() -> None:
    assert [TrtBackend(*given).label for given in ((), ("inputs",), ("profiles", 1), ("inputs", 1))] == [
        "trt",
        "trt:inputs",
        "trt:1",
        "trt:inputs:1",
    ]
    assert TrtBackend("inputs").chosen["weights"] == TrtBackend(weights="inputs").chosen["weights"] == "inputs"


def test_driver_version_is_that_of_cuda() -> None:
    class Driver:
        def __init__(self, status: int, number: int) -> None:
            self._status, self._number = status, number

        def cuDriverGetVersion(self, place: Any) -> int:
            place._obj.value = self._number
            return self._status

    assert driver_version(Driver(0, 13010)) == "13.1"
    assert driver_version(Driver(999, 0)) == "unknown (999)"
