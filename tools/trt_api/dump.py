"""Runs in a process of its own, started by ``extract.py``: imports the bindings and prints their interface as JSON.

Of each class: its bases, the signatures of its constructor and methods, and its properties; of each enumeration its
members. Signatures are read from docstrings, where pybind11 puts them.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import re
from typing import Any

import tensorrt_bindings as bindings  # type: ignore[import-not-found, unused-ignore]

WANTED = [
    "Builder",
    "BuilderFlag",
    "DataType",
    "Dims",
    "EngineInspector",
    "EngineStat",
    "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IOutputAllocator",
    "IProgressMonitor",
    "IRuntimeConfig",
    "ISerializationConfig",
    "IStreamReaderV2",
    "IStreamWriter",
    "ITensor",
    "ITimingCache",
    "LayerInformationFormat",
    "Logger",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "OnnxParserFlag",
    "OnnxParserRefitter",
    "ParserError",
    "PreviewFeature",
    "ProfilingVerbosity",
    "QuantizationFlag",
    "Refitter",
    "Runtime",
    "RuntimePlatform",
    "SerializationFlag",
    "TacticSource",
    "TempfileControlFlag",
    "TensorIOMode",
    "TensorLocation",
    "TilingOptimizationLevel",
    "Weights",
]
"""What an engine needs from its building to its running, and what stands beside that. A name of one version only is
left out of the other."""

NUMBERED = re.compile(r"^\s*\d+\. (\w+\(.*)$", re.MULTILINE)
PREFIX = re.compile(
    r"\b(tensorrt_bindings\.tensorrt\.|nvinfer1::v_1_0::|nvinfer1::|nvonnxparser::|typing_extensions\.)"
)


def main() -> None:
    """Print it."""
    there = {name: getattr(bindings, name) for name in WANTED if hasattr(bindings, name)}
    enums = {name: _members(kind) for name, kind in there.items() if hasattr(kind, "__members__")}
    classes = {name: _class(kind) for name, kind in there.items() if name not in enums}
    data = {"classes": classes, "enums": enums, "names": sorted(n for n in dir(bindings) if not n.startswith("_"))}
    print(json.dumps(data))


def _members(kind: Any) -> dict[str, int]:
    return {name: int(value) for name, value in kind.__members__.items()}


def _class(kind: Any) -> dict[str, Any]:
    bases = [base.__name__ for base in kind.__mro__[1:] if hasattr(bindings, base.__name__)]
    made: dict[str, Any] = {
        "bases": bases,
        "init": _signatures(kind.__init__),
        "methods": {},
        "properties": {},
        "nested": {},
    }
    for name, thing in sorted(vars(kind).items()):
        if name.startswith("_") and name not in ("__buffer__", "__len__", "__getitem__"):
            continue
        if isinstance(thing, property):
            made["properties"][name] = [_returned(thing), "rw" if thing.fset else "r"]
        elif hasattr(thing, "__members__") and isinstance(thing, type):
            made["nested"][name] = _members(thing)
        elif callable(getattr(kind, name)):
            made["methods"][name] = _signatures(getattr(kind, name))
    made["buffer"] = _has_buffer(kind)
    made["deprecated"] = sorted(n for n in made["methods"] if "[DEPRECATED]" in (getattr(kind, n).__doc__ or ""))
    return made


def _has_buffer(kind: Any) -> bool:
    """Whether ``memoryview`` takes its objects: before Python 3.12 only the type's own table tells (tp_as_buffer)."""
    table = ctypes.cast(id(kind) + 160, ctypes.POINTER(ctypes.c_void_p))[0]
    return table is not None and ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))[0] is not None


def _returned(thing: property) -> str:
    lines = (getattr(thing.fget, "__doc__", None) or "").strip().splitlines()
    return _plain(lines[0].rpartition(" -> ")[2]) if lines else ""


def _signatures(function: Any) -> list[Any]:
    """Every overload: its arguments without self, each ``[name, type, default or null]``, and what it returns."""
    text = inspect.getdoc(function) or ""
    lines = NUMBERED.findall(text) if "Overloaded function." in text else text.strip().splitlines()[:1]
    return [_signature(line) for line in lines if re.match(r"\w+\(.*\)", line)]


def _signature(line: str) -> dict[str, Any]:
    inside, _, returned = line.partition("(")[2].rpartition(") -> ")
    arguments = [_argument(part) for part in _split(inside)]
    return {"args": [a for a in arguments if a[0] != "self"], "returns": _plain(returned)}


def _argument(text: str) -> list[str | None]:
    declared, equals, default = text.partition(" = ")
    name, _, kind = declared.partition(": ")
    return [name, _plain(kind), default if equals else None]


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([<{") - (letter in ")]>}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _plain(kind: str) -> str:
    kind = PREFIX.sub("", kind.strip()).replace("collections.abc.", "")
    return kind.replace("typing.SupportsInt", "int").replace("typing.SupportsFloat", "float")


if __name__ == "__main__":
    main()
