"""Schemas of torch_npu's operators, read from its wheels without importing them: one small file a version.

    python tools/ascend/extract_schemas.py WHEEL [WHEEL ...]

Writes ``tools/ascend/schemas/torch_npu-VERSION.json``: where it came from, the schema of each operator of
``allowed.toml`` that the version has, and which of torch's own operators there the version has kernels for. Schemas
are the strings that the shared library registers; the list of kernels is the package's own table for code generation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = "torch_npu/lib/libtorch_npu.so"
TABLES = tuple(f"torch_npu/csrc/aten/npu_native_functions{suffix}.yaml" for suffix in ("", "_by_codegen"))
ENTRY = re.compile(
    r"^\s*-\s*(?:func:\s*)?(?P<name>\w+(?:\.\w+)?)(?:\(.*)?$|^\s+func:\s*(?P<later>\w+(?:\.\w+)?)(?:\(.*)?$"
)


def main() -> None:
    """Read each wheel and write its file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    allowed = tomllib.loads((HERE / "allowed.toml").read_text())
    for wheel in parser.parse_args().wheels:
        found = extract(wheel, allowed["npu"], [name for group in allowed["aten"] for name in group["ops"]])
        out = HERE / "schemas" / f"torch_npu-{found['version']}.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def extract(wheel: Path, operators: Iterable[str], aten: Iterable[str]) -> dict[str, object]:
    """What one wheel says of these operators."""
    with zipfile.ZipFile(wheel) as archive:
        binary = archive.read(LIBRARY)
        kernels = {name for table in TABLES for name in supported(archive.read(table).decode())}
    schemas = {name: text for name in sorted(operators) if (text := schema(binary, name))}
    version = wheel.name.split("-")[1]
    return {
        "package": "torch_npu",
        "version": version,
        "origin": {
            "wheel": wheel.name,
            "index": "PyPI",
            "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "schemas": LIBRARY,
            "kernels": list(TABLES),
        },
        "npu": schemas,
        "aten": sorted(name for name in set(aten) if name in kernels),
    }


def schema(binary: bytes, name: str) -> str:
    """The string by which the library registers an operator; empty if there is none."""
    start, found = name.encode() + b"(", set()
    at = binary.find(start)
    while at >= 0:
        text = binary[at : binary.index(b"\0", at)]
        if binary[at - 1 : at] in (b"\0", b":") and b") -> " in text:
            found.add(text.decode())
        at = binary.find(start, at + 1)
    if len(found) > 1:
        raise SystemExit(f"{name} is registered with {len(found)} schemas: {sorted(found)}")
    return found.pop() if found else ""


def supported(table: str) -> set[str]:
    """Names of torch's operators for which a table lists a kernel. Read by lines: the files hold nothing else."""
    names, inside = set(), False
    for line in table.splitlines():
        if line and not line[0].isspace() and not line.startswith(("-", "#")):
            inside = line.startswith(("supported:", "autograd:"))
        match = ENTRY.match(line) if inside else None
        if match:
            names.add(match["name"] or match["later"])
    return names


if __name__ == "__main__":
    main()
