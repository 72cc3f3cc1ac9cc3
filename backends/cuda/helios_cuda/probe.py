"""What of an NVIDIA machine is there, in the order in which things go wrong; each with one reason and one fix."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch

from helios.backend import DeviceInfo
from helios.errors import BackendUnavailable

__all__ = ["OLDEST", "devices", "require_triton"]

OLDEST = (8, 0)
"""The oldest compute capability that the kernels are compiled for: bfloat16 in the tensor cores begins there."""
TRITON = (3, 2)
"""The oldest Triton that the kernels are expected to compile with."""


def devices() -> list[DeviceInfo]:
    """The GPUs of this machine. Raises BackendUnavailable with the first thing that is missing."""
    if torch.version.cuda is None:
        why = f"this torch ({torch.__version__}) is built without CUDA"
        raise BackendUnavailable(why, "install the CUDA build of torch: https://pytorch.org/get-started")
    if not torch.cuda.is_available():
        raise BackendUnavailable(*_no_driver())
    require_triton()
    found = [_device(i) for i in range(torch.cuda.device_count())]
    usable = [device for device in found if device is not None]
    if not usable:
        major, minor = torch.cuda.get_device_capability(0)
        why = f"{torch.cuda.get_device_name(0)} has compute capability {major}.{minor}"
        raise BackendUnavailable(why, f"use a GPU of {OLDEST[0]}.{OLDEST[1]} or newer (A100, RTX 30 and later)")
    return usable


def _device(index: int) -> DeviceInfo | None:
    if torch.cuda.get_device_capability(index) < OLDEST:
        return None
    return DeviceInfo(index, torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index).total_memory)


def _no_driver() -> tuple[str, str]:
    """Why torch sees no GPU although it is built for them, and what to do."""
    try:
        torch.cuda.init()
    except Exception as error:
        text = str(error).strip().splitlines()[0]
        if "too old" in text:
            return text, f"update the NVIDIA driver to one for CUDA {torch.version.cuda}, or install an older torch"
        if "no NVIDIA driver" in text:
            return "there is no NVIDIA driver on this machine", "install the driver; `nvidia-smi` then lists the GPU"
        return f"torch cannot start CUDA: {text}", "`nvidia-smi` says whether the driver sees the GPU"
    return "the driver shows no GPU", "check `nvidia-smi` and CUDA_VISIBLE_DEVICES"


def require_triton() -> None:
    """Raises BackendUnavailable if Triton is absent or too old."""
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("Triton is not installed", "pip install triton (torch's CUDA build brings it)")
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < TRITON:
        wanted = ".".join(map(str, TRITON))
        raise BackendUnavailable(f"Triton {version} is older than {wanted}", f"pip install 'triton>={wanted}'")
