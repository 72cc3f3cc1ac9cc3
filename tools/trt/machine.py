"""What this machine has for TensorRT: versions, the GPU, room on the disk; 2 and one fix where something is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys

from environment import commit

__all__ = ["main"]

PACKAGES = ("torch", "onnx", "onnx-ir", "onnxruntime", "tensorrt", "tensorrt-cu13", "tensorrt-cu13-libs", "numpy")


def main() -> int:
    """Print it."""
    from helios.backend import load
    from helios.errors import HeliosError
    from helios_trt import library
    from helios_trt.dialect import opset_for
    from helios_trt.store import cache_folder

    print(f"{'commit':12} {commit()}")
    print(f"{'python':12} {platform.python_version()}, {platform.platform()}")
    for name in PACKAGES:
        try:
            print(f"{name:12} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        module = library.tensorrt()
        print(f"{'TensorRT':12} {module.__version__}")
        backend = load("trt")()
        for device in backend.devices():
            print(f"{'device':12} {device.index}: {device.name}, {(device.memory or 0) / 1e9:.1f} GB")
        lacks = library.lacking(module, library.logger(module))
        print(f"{'parser':12} ONNX opset {opset_for(lacks)}; lacks {', '.join(lacks) or 'none of its ops'}")
    except HeliosError as error:
        print(f"error: {error.why}\nfix: {error.fix}", file=sys.stderr)
        return 2
    told = backend.emulated
    if told:
        print(f"EMULATED     {told}: nothing below was run on a device")
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{'engines':12} {folder}, {shutil.disk_usage(folder).free / 1e9:.0f} GB free")
    return 0


if __name__ == "__main__":
    sys.exit(main())
