"""What of an NVIDIA machine is there, in the order in which things go wrong; each with one reason and one fix."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import warnings

import torch

from helios.backend import DeviceInfo
from helios.errors import BackendUnavailable

__all__ = ["OLDEST", "devices", "gpus", "require_cuda", "require_triton"]

OLDEST = (8, 0)
"""The oldest compute capability that the kernels are compiled for: bfloat16 in the tensor cores begins there."""
TRITON = "3.2"
"""The oldest Triton that the kernels are expected to compile with, for a torch that asks for none in particular."""


def devices() -> list[DeviceInfo]:
    """The GPUs of this machine. Raises BackendUnavailable with the first thing that is missing."""
    require_cuda()
    require_triton()
    return gpus()


def require_cuda() -> None:
    """Raises BackendUnavailable if torch is not built for NVIDIA GPUs, or sees none."""
    if torch.version.cuda is None:
        why = f"this torch ({torch.__version__}) is built without CUDA"
        raise BackendUnavailable(why, "install the CUDA build of torch: https://pytorch.org/get-started")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an old driver torch warns, and then it says there is no GPU
        present = torch.cuda.is_available()
    if not present:
        raise BackendUnavailable(*_no_driver())


def gpus() -> list[DeviceInfo]:
    """Those that are new enough. Raises BackendUnavailable if none is."""
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
        text = " ".join(str(error).split())
        if "too old" in text:
            found = re.search(r"found version (\d+)", text)
            knows = f": it is for CUDA {int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else ""
            why = f"the NVIDIA driver is too old{knows}, this torch for CUDA {torch.version.cuda}"
            return (
                why,
                f"update the NVIDIA driver to one for CUDA {torch.version.cuda}, or install a torch for an older one",
            )
        if "no NVIDIA driver" in text:
            return "there is no NVIDIA driver on this machine", "install the driver; `nvidia-smi` then lists the GPU"
        numbered = re.search(r"Error \d+: .*", text)
        said = numbered[0] if numbered else text[:100] or type(error).__name__
        return f"torch cannot start CUDA: {said}", "`nvidia-smi` says whether the driver sees the GPU"
    return "the driver shows no GPU", "check `nvidia-smi` and CUDA_VISIBLE_DEVICES"


def require_triton() -> None:
    """Raises BackendUnavailable if Triton is absent, too old, or not the one that this torch is made with."""
    pin = _pin()
    if importlib.util.find_spec("triton") is None:
        made = f", the version that torch {_torch()} is made with" if pin else ""
        raise BackendUnavailable("Triton is not installed", f"pip install {_quoted(pin)}{made}")
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path
        return
    if not _within(version, pin):
        why = f"Triton {version} does not match torch {_torch()}, which is made with {pin.removeprefix('==')}"
        raise BackendUnavailable(why, f"pip install {_quoted(pin)}")
    if not _within(version.partition("rc")[0], f">={TRITON}"):
        raise BackendUnavailable(f"Triton {version} is older than {TRITON}", f"pip install 'triton>={TRITON}'")


def _quoted(pin: str) -> str:
    return f"'triton{pin}'" if pin else "triton"


def _within(version: str, wanted: str) -> bool:
    """Whether a version is one of those wanted; where nothing can tell, it is."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # a bare machine, with the tree on its path and nothing installed
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


def _pin() -> str:
    """Which versions of Triton the installed torch asks for, such as ``==3.6.0``; empty where it asks for none."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        return ""
    for line in importlib.metadata.requires("torch") or ():
        try:
            asked = Requirement(line)
        except InvalidRequirement:
            continue
        if asked.name == "triton" and (asked.marker is None or asked.marker.evaluate({"extra": ""})):
            return str(asked.specifier)
    return ""


def _torch() -> str:
    return importlib.metadata.version("torch")
