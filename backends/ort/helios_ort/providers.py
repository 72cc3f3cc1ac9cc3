"""Execution providers: their short names, which are installed, whether one can be used here, and its options."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from helios.backend import DeviceInfo
from helios.errors import BackendUnavailable, unknown_name
from helios_ort.installed import runtime

__all__ = ["CPU", "Provider", "devices", "find", "installed", "require_usable", "short_name"]

SUFFIX = "ExecutionProvider"
CPU = f"CPU{SUFFIX}"

_ON_TORCH = ("cuda", "tensorrt", "nvtensorrtrtx")
"""Providers whose device memory torch can address, where it is built for that device."""

_BY_DEVICE = (*_ON_TORCH, "dml", "migraphx", "rocm")
"""Providers that take a device by its number."""

_OPTIONS: Mapping[str, Mapping[str, str]] = {
    # No TF32 in a run that says fp32, and no algorithm that is chosen by a race: the next run may choose another.
    "cuda": {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
    # Otherwise it computes in 16 bits where the processor can.
    "openvino": {"precision": "ACCURACY"},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider on one device.

    Attributes:
        name: as ONNX Runtime calls it, such as ``CUDAExecutionProvider``.
        index: of its device.
        opset: of ONNX, in which models are written for it.
    """

    name: str
    index: int = 0
    opset: int = 23

    @property
    def short(self) -> str:
        return short_name(self.name)

    @property
    def options(self) -> dict[str, str]:
        """What a session is told of it."""
        device = {"device_id": str(self.index)} if self.short in _BY_DEVICE else {}
        return {**_OPTIONS.get(self.short, {}), **device}

    @property
    def device(self) -> torch.device:
        """Where its inputs and outputs lie; ONNX Runtime copies for providers whose memory torch does not know."""
        shares = self.short in _ON_TORCH and torch.version.cuda is not None and torch.cuda.is_available()
        return torch.device("cuda", self.index) if shares else torch.device("cpu")


def short_name(name: str) -> str:
    """
    >>> short_name("TensorrtExecutionProvider")
    'tensorrt'
    """
    return name.removesuffix(SUFFIX).lower()


def installed() -> list[str]:
    """The providers of the installed ONNX Runtime, its own preference first, whether they can be used here or not."""
    return [str(name) for name in runtime().get_available_providers()]


def find(short: str, index: int = 0) -> Provider:
    """The provider of a short name, in any case; the empty one is the CPU.

    Raises:
        BackendUnavailable: the installed ONNX Runtime has none of that name; says which it has.
    """
    known = {short_name(name): name for name in installed()}
    wanted = short_name(short) if short else "cpu"
    if wanted in known:
        return Provider(known[wanted], index)
    module = runtime()
    if wanted in {short_name(name) for name in module.get_all_providers()}:
        why = f"ONNX Runtime {module.__version__} as it is installed has no provider {wanted!r}; it has {_list(known)}"
        raise BackendUnavailable(why, _fix(wanted))
    why = unknown_name("execution provider", short, known)
    raise BackendUnavailable(why, "HELIOS_BACKEND=ort, or ort:NAME with one of these")


def _list(names: Mapping[str, str]) -> str:
    return ", ".join(sorted(names))


def _fix(short: str) -> str:
    builds = {"cuda": "gpu", "tensorrt": "gpu", "dml": "directml", "openvino": "openvino", "qnn": "qnn"}
    if short in builds:
        return f"pip uninstall -y onnxruntime; pip install onnxruntime-{builds[short]}"
    return "install the build of ONNX Runtime that brings it"


@functools.cache
def require_usable(provider: Provider) -> None:
    """Make a session with it.

    Raises:
        BackendUnavailable: ONNX Runtime refuses it, or would leave it out silently; the reason is its own.
    """
    module = runtime()
    with _stderr() as told:
        try:
            session = module.InferenceSession(
                _nothing(), providers=[(provider.name, provider.options)], enable_fallback=0
            )
            usable = provider.name in session.get_providers()
            why = ""
        except Exception as error:
            usable, why = False, " ".join(str(error).split())
    if not usable:
        raise BackendUnavailable(
            f"the provider {provider.short!r} cannot be used here: {_reason(told) or why or _SILENT}",
            "install what it needs: https://onnxruntime.ai/docs/execution-providers",
        )


def _nothing() -> bytes:
    """The smallest model: ``y = x``."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "nothing", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


@contextmanager
def _stderr() -> Iterator[list[str]]:
    """What native code prints to standard error: the only place where ONNX Runtime says why a provider is left out."""
    told: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            yield told
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            told += file.read().decode(errors="replace").splitlines()


_SILENT = "ONNX Runtime leaves it out and says nothing"
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_LIBRARY = re.compile(r"Failed to load library \S*?([^/\s]+) with error: (.+)")
_ENTRY = re.compile(r"\[[A-Z]:onnxruntime:[^\]]*\] ?(.*)")


def _reason(lines: list[str]) -> str:
    """The one sentence of a log that says what is missing: a library, else the last entry."""
    plain = [_COLOUR.sub("", line).strip() for line in lines]
    for line in plain:
        if found := _LIBRARY.search(line):
            return f"{found[1]}: {found[2]}"
    entries = [found[1] for line in plain if (found := _ENTRY.search(line))]
    return entries[-1] if entries else ""


def devices(provider: Provider) -> list[DeviceInfo]:
    """The devices of a provider, by index: the GPUs that torch sees where it shares their memory, else the one."""
    told = f"ONNX Runtime {runtime().__version__}, {provider.name}"
    if provider.device.type == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return [DeviceInfo(i, f"{told}, {name}") for i, name in enumerate(names)]
    if provider.name != CPU:
        return [DeviceInfo(provider.index, told)]
    threads = torch.get_num_threads()
    return [DeviceInfo(0, f"{told}, {threads} thread{'s' * (threads > 1)}")]
