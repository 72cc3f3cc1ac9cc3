"""The interface of TensorRT's Python bindings, as data: out of the real wheels, without the libraries that they need.

    python tools/trt_api/extract.py 10.16.1.11 11.4.0.106 --out tests/backends/trt/api

The bindings are wheels of 1.3 MB on PyPI; the libraries are not there. Importing the bindings needs libraries that
have a handful of symbols, and calls none of them. So: the wheel is downloaded, minimal stand-in libraries with exactly
the symbols that it lacks are compiled, and a process of its own imports the bindings with them and writes down what
classes, methods, arguments and members there are (``dump.py``). Nothing of TensorRT is run, and nothing can be.

Needs pip, cc and nm. The Python that runs it must be one that the wheels are made for.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "tensorrt-cu13-bindings"
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")


def main() -> None:
    """Extract the versions that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", help="of the wheel, such as 11.4.0.106")
    parser.add_argument("--out", type=Path, required=True, help="folder; one file tensorrt_MAJOR.json a version")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for version in given.versions:
        with tempfile.TemporaryDirectory() as scratch:
            path = given.out / f"tensorrt_{version.partition('.')[0]}.json"
            path.write_text(_written(extracted(version, Path(scratch))), encoding="utf-8")
            print(f"wrote {path}, {path.stat().st_size} bytes")


def extracted(version: str, scratch: Path) -> dict[str, Any]:
    """What ``dump.py`` writes down of one version, with its origin."""
    wheel = downloaded(version, scratch)
    unpacked = scratch / "package"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    libraries = stand_ins(unpacked / "tensorrt_bindings" / "tensorrt.so", scratch / "libraries", version)
    dump = [sys.executable, "-W", "error", str(Path(__file__).with_name("dump.py"))]
    paths = {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(unpacked)}
    told = subprocess.run(dump, env={**os.environ, **paths}, check=True, stdout=subprocess.PIPE, text=True).stdout
    origin = {
        "wheel": wheel.name,
        "version": version,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "command": f"python tools/trt_api/extract.py {version} --out tests/backends/trt/api",
        "note": "names and signatures as the bindings themselves report them, imported with stand-in libraries",
    }
    return {"origin": origin, **json.loads(told)}


def downloaded(version: str, folder: Path) -> Path:
    """The wheel of the bindings for the running Python."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    subprocess.run([*pip, f"{PACKAGE}=={version}"], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def stand_ins(module: Path, folder: Path, version: str, does: str = "abort();") -> Path:
    """Libraries of the names that the module asks for, with the symbols that nothing else has.

    Args:
        does: what calling one does. By default it ends the process: whatever were returned would be made up, and the
            caller would not notice.
    """
    folder.mkdir(parents=True)
    source = folder / "symbols.c"
    bodies = "".join(f"void *{name}(void) {{ {does} return 0; }}\n" for name in lacking(module))
    source.write_text(f"#include <stdlib.h>\n{bodies}")
    for library in LIBRARIES:
        name = f"{library}.so.{version.partition('.')[0]}"
        build = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run(build, check=True)
    return folder


def lacking(module: Path) -> list[str]:
    """Undefined symbols of a module that neither this Python nor the C library has."""
    table = subprocess.run(["nm", "-D", "--undefined-only", str(module)], check=True, capture_output=True, text=True)
    process = ctypes.CDLL(None)
    undefined = re.findall(r"^\s+U (\w+)$", table.stdout, re.MULTILINE)
    return [name for name in undefined if not name.startswith("_Py") and not hasattr(process, name)]


def _written(data: dict[str, Any]) -> str:
    """JSON with one method, property or enumeration a line: a change of one signature is a change of one line."""
    return _lines(data, 4) + "\n"


def _lines(data: Any, depth: int, indent: str = "") -> str:
    if not isinstance(data, dict) or not data or depth == 0:
        return json.dumps(data)
    rows = (f"{indent} {json.dumps(key)}: {_lines(value, depth - 1, indent + ' ')}" for key, value in data.items())
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}"


if __name__ == "__main__":
    main()
