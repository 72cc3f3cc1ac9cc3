"""What a run's bits and speed depend on besides the graphs: versions of libraries, the device, how steps are run."""

from __future__ import annotations

import copy
import importlib.metadata
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from helios_cuda.backend import CudaBackend

__all__ = ["cublas", "execution_plan"]

_CUBLAS = ("nvidia-cublas", "nvidia-cublas-cu13", "nvidia-cublas-cu12")
"""Names under which cuBLAS has been packaged."""


def execution_plan(backend: CudaBackend) -> dict[str, Any]:
    """As JSON values.

    Keys: ``device`` and ``capability``; ``cuda`` that torch is built with, ``cudnn``, ``cublas`` and ``triton``, each a
    version or None where it cannot be told; ``graphs``, true or why not; ``memory``, full or low; ``attention``, the
    library of each form so far, which ``backend.attention.use`` takes back; ``convolution`` and ``scaled``, the way of
    each form of convolutions and of products of e4m3 numbers so far, which ``CHOICES.replay`` of each takes back.
    """
    from helios_cuda import convolution, scaled  # which import Triton

    on_gpu = backend.device.type == "cuda"
    capability = ".".join(map(str, torch.cuda.get_device_capability(backend.device))) if on_gpu else None
    return {
        "device": torch.cuda.get_device_name(backend.device) if on_gpu else backend.emulated or "cpu",
        "capability": capability,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "cublas": cublas(),
        "triton": _version("triton"),
        "graphs": backend.eager or True,
        "memory": "low" if backend.low else "full",
        "attention": backend.attention.plan,
        "convolution": copy.deepcopy(convolution.CHOICES.record),
        "scaled": copy.deepcopy(scaled.CHOICES.record),
    }


def cublas() -> str | None:
    """The version of cuBLAS, or None where it was not installed by itself."""
    return next((v for v in map(_version, _CUBLAS) if v), None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
