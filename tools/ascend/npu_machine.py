"""Say what of an Ascend machine is there, held against the table of versions; exit code 2 where it cannot run.

python tools/ascend/npu_machine.py [--backend ascend:1]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator

from helios import backend as backends
from helios.errors import HeliosError
from helios_ascend import versions

TABLE = """\
torch_npu  torch   CANN at least
2.9        2.9     8.5
2.10       2.10    8.5
2.11       2.11    8.5
2.12       2.12    8.5
2.13       2.13    8.5 (no table names it yet)"""


def main() -> int:
    """Print everything, then what is wrong."""
    parser = argparse.ArgumentParser(description="What of an Ascend machine is there.")
    parser.add_argument("--backend", default="ascend")
    asked = parser.parse_args()
    for name, value in told():
        print(f"{name:10} {value}")
    print(f"\nversions that belong together:\n{TABLE}\n")
    try:
        backend = backends.select(asked.backend)
        for device in backend.devices():
            print(f"device {device.index}: {device.name}, {(device.memory or 0) / 2**30:.0f} GiB")
    except HeliosError as error:
        print(f"error: {error.why}\nfix: {error.fix}")
        return 2
    if backend.emulated:
        print(f"EMULATED: {backend.emulated}; nothing here is a result of a device")
    return 0


def told() -> Iterator[tuple[str, str]]:
    """Names and versions, each found without importing anything of the vendor's."""
    yield "machine", f"{platform.machine()}, {platform.system()} {platform.release()}"
    yield "Python", platform.python_version()
    for package in ("torch", "torch-npu"):
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    folder = versions.toolkit()
    yield "CANN", "not found" if folder is None else f"{versions.cann(folder) or 'version unknown'} in {folder}"
    yield "driver", driver()


def driver() -> str:
    """What npu-smi says in its first line with a version."""
    program = shutil.which("npu-smi")
    if program is None:
        return "npu-smi is not on the path"
    run = subprocess.run([program, "info"], capture_output=True, text=True, check=False, timeout=60)
    return next((line.strip(" |") for line in run.stdout.splitlines() if "Version" in line), "npu-smi says nothing")


if __name__ == "__main__":
    sys.exit(main())
