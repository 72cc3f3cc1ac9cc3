"""Read exported cases and write results: numpy alone.

    from helios_results import run
    run(".", compute)

``compute(case, inputs)`` is yours: it takes case.json as a dict and the inputs by name as numpy arrays, and returns the
outputs by name. bfloat16 has no numpy dtype: such inputs come as float32 (exactly), and outputs that must be bfloat16
may be given in float32, which rounds them to nearest even here. Give uint16 for bits that your device has rounded
itself.
"""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Path = str | pathlib.Path

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def read(path: Path) -> dict[str, Array]:
    """Tensors of a safetensors file by name; bfloat16 as float32."""
    data = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    found: dict[str, Array] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            flat: Array = np.frombuffer(data[8 + length + start : 8 + length + end], _DTYPES[entry["dtype"]])
            array = flat.reshape(entry["shape"])
            found[name] = widen(array) if entry["dtype"] == "BF16" else array
    return found


def widen(bits: Array) -> Array:
    """bfloat16 bits (uint16) as float32, exactly."""
    wide: Array = bits.astype(np.uint32) << 16
    return wide.view(np.float32)


def narrow(array: Array) -> Array:
    """float32 to bfloat16 bits (uint16), to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def write(path: Path, arrays: Mapping[str, Array], dtypes: Mapping[str, str]) -> None:
    """Write arrays by name as a safetensors file; ``dtypes`` as in case.json."""
    header: dict[str, Any] = {}
    chunks, at = [], 0
    for name, given in arrays.items():
        kind = _NAMES[dtypes[name]]
        array = narrow(given) if kind == "BF16" and given.dtype != np.uint16 else given
        data = np.ascontiguousarray(array, _DTYPES[kind]).tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + len(data)]}
        chunks.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


Compute = Callable[[dict[str, Any], dict[str, Array]], "dict[str, Array] | None"]


def run(folder: Path, compute: Compute, about: Mapping[str, str] | None = None) -> int:
    """Compute every case that ``compute`` does not answer with None, and write the results; how many there were."""
    root, done = pathlib.Path(folder), 0
    for entry in json.loads((root / "index.json").read_text())["cases"]:
        place = root / "cases" / entry["folder"]
        case = json.loads((place / "case.json").read_text())
        outputs = compute(case, read(place / "inputs.safetensors"))
        if outputs is not None:
            dtypes = {name: told[0] for name, told in case["outputs"].items()}
            write(root / "results" / (entry["folder"] + ".safetensors"), outputs, dtypes)
            done += 1
    if about is not None:
        (root / "results" / "about.json").write_text(json.dumps(about))
    return done
