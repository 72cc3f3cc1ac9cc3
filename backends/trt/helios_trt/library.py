"""TensorRT's Python bindings: finding them, saying in one line why they cannot be used, and their log."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from typing import Any

import torch

from helios.errors import BackendError, BackendUnavailable

__all__ = [
    "ATTENTION_FROM",
    "OLDEST",
    "OPSET_23",
    "lacking",
    "logger",
    "require_onnx",
    "started",
    "tensorrt",
    "version",
]

OLDEST = (10, 0)
"""The oldest release that is taken. Later ones say what memory a profile needs; see ``Engine.workspace``."""

ATTENTION_FROM = (10, 14)
"""The first whose parser takes Attention of ONNX opset 23; of each op of that opset the parser itself is asked."""

OPSET_23 = ("Attention", "RMSNormalization", "RotaryEmbedding")
"""Ops that graphs in opset 23 are written in, and graphs in opset 22 are not."""


def tensorrt() -> Any:
    """The module. Raises BackendUnavailable with the one thing that is missing, and how to get it."""
    package = f"tensorrt-cu{_cuda()}"
    name = next((n for n in ("tensorrt", "tensorrt_bindings") if importlib.util.find_spec(n) is not None), None)
    if name is None:
        raise BackendUnavailable("TensorRT is not installed", f"pip install {package}")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise BackendUnavailable(*_not_imported(error, package)) from error
    found = version(module)
    if found < OLDEST:
        why = f"TensorRT {module.__version__} is too old: engines are built for {OLDEST[0]}.{OLDEST[1]} or newer"
        raise BackendUnavailable(why, f"pip install --upgrade {package}")
    return module


def _cuda() -> int:
    """The major version of CUDA that packages of TensorRT are named for."""
    return int((torch.version.cuda or "13").partition(".")[0])


def _not_imported(error: ImportError, package: str) -> tuple[str, str]:
    """What an import of the bindings that failed means."""
    text = " ".join(str(error).split())
    library = re.search(r"(lib[\w+-]+\.so[\w.]*): cannot open shared object file", text)
    if library:
        bindings = _installed("bindings")
        exact = f"=={bindings}" if bindings else ""
        return (
            f"TensorRT's Python bindings are installed, its libraries are not: {library[1]} was not found",
            f"pip install {package}-libs{exact}, or put the folder of {library[1]} on LD_LIBRARY_PATH",
        )
    if "undefined symbol" in text or "version `" in text:
        told = ", ".join(f"{part} {found}" for part in ("bindings", "libs") if (found := _installed(part)))
        came = f" ({told})" if told else ""
        return (
            f"TensorRT's Python bindings and its libraries are of different releases{came}: {text}",
            f"pip install --force-reinstall {package}, and no other TensorRT on LD_LIBRARY_PATH",
        )
    return f"TensorRT fails on import: {type(error).__name__}: {text}", f"pip install --force-reinstall {package}"


def _installed(part: str) -> str:
    """The version of the installed package of the bindings or the libraries; empty where pip knows of none."""
    for cuda in (_cuda(), 13, 12):
        for name in (f"tensorrt-cu{cuda}-{part}", f"tensorrt_cu{cuda}_{part}"):
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    return ""


def version(module: Any) -> tuple[int, int]:
    """Of TensorRT, major and minor."""
    major, minor = (re.findall(r"\d+", module.__version__) + ["0", "0"])[:2]
    return int(major), int(minor)


def lacking(module: Any, log: Any) -> tuple[str, ...]:
    """Which of ``OPSET_23`` this release's parser does not take. It needs a builder, which needs the GPU, for seconds.

    Raises:
        BackendError: TensorRT cannot start.
    """
    if version(module) < ATTENTION_FROM:
        return OPSET_23
    log.clear()
    builder = started(lambda: module.Builder(log), "builder", log)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = started(lambda: module.OnnxParser(network, log), "parser", log)
    return tuple(name for name in OPSET_23 if not parser.supports_operator(name))


def require_onnx() -> None:
    """Raises BackendUnavailable unless graphs can be written as ONNX."""
    for name in ("onnx", "onnx_ir"):
        if importlib.util.find_spec(name) is None:
            raise BackendUnavailable(
                f"{name} is not installed, and TensorRT takes graphs as ONNX", "pip install 'helios-hal[trt]'"
            )


def logger(module: Any) -> Any:
    """A log that keeps what went wrong and prints nothing: the last errors stand in the exceptions that follow.

    The class is made here, since its base is there only once TensorRT is.
    """

    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)  # demanded of derived classes; super() is not enough for these bindings
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(msg.split()))

        def clear(self) -> None:
            """Forget what went wrong, before something else begins: ``last`` and ``memory`` tell of that alone."""
            self.errors.clear()

        def last(self, otherwise: str) -> str:
            """The last thing that went wrong, in one line."""
            return self.errors[-1] if self.errors else otherwise

        @property
        def memory(self) -> bool:
            """Whether memory went short."""
            return any("memory" in error.lower() for error in self.errors)

    return Log()


def started(make: Any, what: str, log: Any) -> Any:
    """The object that ``make`` gives. TensorRT first meets the driver there, and tells failures as a null pointer.

    Raises:
        BackendError: with what TensorRT logged.
    """
    try:
        made = make()
    except (TypeError, RuntimeError) as error:
        raise BackendError(*_not_started(what, log.last(str(error)))) from error
    if made is None:
        raise BackendError(*_not_started(what, log.last("no reason given")))
    return made


def _not_started(what: str, why: str) -> tuple[str, str]:
    text = " ".join(why.split())
    if re.search(r"CUDA (initialization|driver)|insufficient|error: (35|803)", text, re.IGNORECASE):
        return (
            f"TensorRT and the NVIDIA driver do not fit: {text}",
            "update the driver, or install the TensorRT package for its CUDA (tensorrt-cu12, tensorrt-cu13)",
        )
    return f"TensorRT makes no {what}: {text}", "`nvidia-smi` says whether the GPU works and has room"
