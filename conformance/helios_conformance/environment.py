"""The machine and the software of a run, as far as they can be read. What cannot is None, never a guess."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helios.ops import OPSET, opset_hash
from helios_conformance.suite import suite_hash

__all__ = ["read"]

PACKAGES = ("helios-hal", "torch", "numpy", "safetensors", "transformers", "tokenizers", "triton", "torch-npu")
"""Distributions whose versions decide what is computed; the backend's own comes on top."""

PREFIXES = (
    "ACL_", "ASCEND_", "BLIS_", "CUBLAS_", "CUDA_", "CUDNN_", "GOMP_", "HELIOS_", "HIP_", "KMP_", "MKL_", "NVIDIA_",
    "OMP_", "OPENBLAS_", "ORT_", "PYTORCH_", "ROCR_", "TORCH_", "TRITON_", "XLA_",
)  # fmt: skip
"""Of environment variables that change what a device computes, or how fast."""

_SECRET = ("KEY", "PASSWORD", "SECRET", "TOKEN")

DRIVERS = {
    "nvidia": ("nvidia-smi", "--query-gpu=driver_version,vbios_version", "--format=csv,noheader"),
    "amd": ("rocm-smi", "--showdriverversion", "--csv"),
    "ascend": ("npu-smi", "info", "-t", "board", "-i", "0"),
}
"""Commands that tell a driver's version, by vendor."""


def read(backend: Mapping[str, Any]) -> dict[str, Any]:
    """Read this machine.

    Args:
        backend: what the worker told of the backend; its ``class`` and ``distribution`` are read here. Nothing of the
            backend is imported.
    """
    return {
        "os": _os(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpu": _cpu(),
        "cores": {"logical": os.cpu_count() or 1, "usable": len(os.sched_getaffinity(0))},
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": _packages(backend),
        "git": {"helios": _git("helios"), "backend": _git(str(backend.get("class") or "").partition(":")[0])},
        "variables": _variables(),
        "drivers": {vendor: _told(command) for vendor, command in DRIVERS.items()},
        "opset": {"version": OPSET, "hash": opset_hash()},
        "suite": suite_hash(),
    }


def _os() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _cpu() -> str | None:
    """The model as the kernel names it; ARM kernels give numbers alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    pairs = (line.partition(":") for line in lines)
    named = [value.strip() for key, _, value in pairs if key.strip().lower() in ("model name", "hardware", "cpu part")]
    return named[0] if named else platform.processor() or None


def _packages(backend: Mapping[str, Any]) -> dict[str, str | None]:
    names = [*PACKAGES]
    own = backend.get("distribution")
    if own and own not in names:
        names.append(str(own))
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def _variables() -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(PREFIXES) and not any(word in name for word in _SECRET)
    }


def _git(module: str) -> dict[str, Any] | None:
    """Commit of the working tree that a package was imported from, and whether tracked files differ from it; None
    where it comes from no working tree."""
    package = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(package) if package else None
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    folder = str(Path(spec.origin).parent)
    # A package installed into an environment inside some other repository does not belong to that repository.
    if _told(("git", "-C", folder, "ls-files", "--error-unmatch", spec.origin)) is None:
        return None
    commit = _told(("git", "-C", folder, "rev-parse", "HEAD"))
    changed = _told(("git", "-C", folder, "status", "--porcelain", "--untracked-files=no"), empty=True)
    return None if commit is None else {"commit": commit, "dirty": changed != ""}


def _told(command: Sequence[str], *, empty: bool = False) -> str | None:
    """What a command prints; None where it is absent, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.strip()
    return text[:2000] if done.returncode == 0 and (text or empty) else None
