"""ONNX Runtime as it is installed: found, whole, new enough; imported when it is first needed."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from typing import Any

from helios.errors import BackendUnavailable

__all__ = ["distributions", "runtime"]

PACKAGE = "onnxruntime"
_NEEDS = ("onnx", "onnx_ir")


@functools.cache
def runtime() -> Any:
    """The module ``onnxruntime``.

    Raises:
        BackendUnavailable: it is missing or broken, several distributions of it lie over one another, it is too old to
            say where nodes run, or what writes ONNX models is missing. One line each, and one fix.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise BackendUnavailable("ONNX Runtime is not installed", "pip install helios-hal[ort]")
    _require_one(distributions())
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailable(
            f"{missing[0]} is not installed, which writes the models", "pip install helios-hal[ort]"
        )
    try:
        module = importlib.import_module(PACKAGE)
    except Exception as error:  # its extension module raises whatever the loader says
        why = f"ONNX Runtime fails on import: {type(error).__name__}: {error}"
        raise BackendUnavailable(" ".join(why.split()), "install it again") from error
    if not hasattr(module.InferenceSession, "get_provider_graph_assignment_info"):
        why = f"ONNX Runtime {module.__version__} cannot say which provider runs a node"
        raise BackendUnavailable(why, "pip install --upgrade onnxruntime (or the distribution of it that you use)")
    return module


def distributions() -> list[str]:
    """Names of the installed distributions that bring the package, sorted; more than one damage each other."""
    return sorted(set(_bringing()))


def _bringing() -> Iterator[str]:
    for found in importlib.metadata.distributions():
        name = found.metadata["Name"] or ""
        if name.lower().startswith(("onnxruntime", "ort")) and _brings(found):
            yield name


def _brings(found: importlib.metadata.Distribution) -> bool:
    return any(str(file).replace("\\", "/") == f"{PACKAGE}/__init__.py" for file in found.files or ())


def _require_one(names: list[str]) -> None:
    if len(names) > 1:
        raise BackendUnavailable(
            f"{' and '.join(names)} are installed over one another: they bring the same files",
            f"pip uninstall -y {' '.join(names)}; then install the one that you want, such as {names[-1]}",
        )
