"""What this machine is: versions, driver, clocks, free memory. As a script it prints them and says what is missing.

    python tools/gpu/environment.py [--device cuda|cpu]

Nothing here changes a setting of the device: ``nvidia-smi`` is only asked.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["commit", "header", "main", "smi"]

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = {
    "av": "videos are not written",
    "ftfy": "prompts are not cleaned",
    "jsonschema": "bundles are not checked against their schema",
    "triton": "none of the Triton kernels run",
    "diffusers": "no comparison with diffusers",
}
"""Modules that a part may want, and what is lost without each."""
PACKAGES = (
    "torch",
    "triton",
    "nvidia-cublas",
    "nvidia-cudnn-cu13",
    "nvidia-cuda-runtime",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "transformers",
    "numpy",
)


def smi(*fields: str) -> dict[str, str]:
    """What ``nvidia-smi`` says of the first device, by field; empty where it is not there or refuses."""
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in run.stdout.splitlines()[0].split(",")] if run.stdout.strip() else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def commit() -> str:
    """The tree's commit: ``HELIOS_COMMIT``, else git, else the file ``.helios-commit``, else ``unknown``."""
    named = os.environ.get("HELIOS_COMMIT", "").strip()
    if named:
        return named
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        file = ROOT / ".helios-commit"
        return file.read_text(encoding="utf-8").strip() if file.is_file() else "unknown"


def header(part: str, device: str, tiny: bool) -> dict[str, Any]:
    """What results are measured on: exact versions, the device, the commit."""
    import torch

    cuda = device == "cuda"
    versions = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    return {
        "part": part,
        "tiny": tiny,
        "commit": commit(),
        "device": torch.cuda.get_device_name(0) if cuda else f"cpu, {platform.machine()}",
        "driver": smi("driver_version").get("driver_version", "unknown") if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": versions.get("triton"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "packages": versions,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv: list[str] | None = None) -> int:
    """Print the machine; 2, with one error and one fix, where nothing can be measured on it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args, _ = parser.parse_known_args(argv)
    try:
        import torch
    except ImportError as error:
        return _refuse(
            f"torch cannot be imported: {error}", "run it with a Python that has torch: PYTHON=/path/to/python3"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        why = f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no NVIDIA GPU"
        return _refuse(why, "check the driver with nvidia-smi, or pass --device cpu --tiny to test the plumbing")
    for name, value in header("environment", args.device, False).items():
        if name not in ("part", "tiny"):
            print(f"{name:8} {value}")
    if args.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        print(f"{'memory':8} {free / 2**30:.1f} GiB free of {total / 2**30:.1f}")
        print(f"{'smi':8} {smi('name', 'clocks.sm', 'clocks.mem', 'power.limit', 'temperature.gpu', 'pstate')}")
    for name, loss in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name:8} not there: {loss}")
    return 0


def _refuse(why: str, fix: str) -> int:
    print(f"error: {why}\nfix: {fix}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
