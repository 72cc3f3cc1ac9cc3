"""What TensorRT made of a graph: its layers, what is fused in each, in which types it computes, by which kernel."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from helios.errors import BackendError
from helios_trt import library
from helios_trt.engine import deserialized

__all__ = ["Layer", "by_kind", "information", "layers"]


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an engine: a kernel, or a copy between formats.

    Attributes:
        name: TensorRT's.
        kind: of kernel, such as ``gemm`` or ``kgen``; empty where the engine was built without details.
        types: of its outputs, such as ``BF16``, each once.
        nodes: of the ONNX model that it computes: more than one where they are fused.
        kernel: its name.
    """

    name: str
    kind: str = ""
    types: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    kernel: str = ""


def information(module: Any, path: Path) -> dict[str, Any]:
    """What TensorRT says of an engine on disk, as JSON values. Needs the device that it was built for.

    Raises:
        BackendError: TensorRT does not take the file, or says something that is not JSON.
    """
    log = library.logger(module)
    runtime = library.started(lambda: module.Runtime(log), "runtime", log)
    inspector = deserialized(runtime, path, log).create_engine_inspector()
    text = inspector.get_engine_information(module.LayerInformationFormat.JSON)
    try:
        told = json.loads(text)
    except ValueError as error:
        raise BackendError(f"TensorRT's description of {path.name} is not JSON: {error}") from error
    return dict(told)


def layers(told: Mapping[str, Any]) -> list[Layer]:
    """The layers of ``information``. TensorRT 10 and 11 call some things otherwise; both are read."""
    return [_layer(layer) for layer in told.get("Layers", [])]


def _layer(layer: Any) -> Layer:
    if isinstance(layer, str):  # an engine that was built without details has names alone
        return Layer(layer)
    outputs = layer.get("Outputs", [])
    return Layer(
        str(layer.get("Name", "")),
        str(layer.get("LayerType", "")),
        tuple(dict.fromkeys(map(_type, outputs))),
        tuple(dict.fromkeys(re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", ""))))),
        str(layer.get("TacticName", "")),
    )


_TYPES = ("BF16", "FP16", "FP32", "FP8", "FP4", "INT64", "INT32", "INT8", "BOOL")
_ALIASES = {"HALF": "FP16", "FLOAT": "FP32", "BFLOAT16": "BF16"}


def _type(tensor: Mapping[str, Any]) -> str:
    """Of a tensor: 11 says it by itself, 10 within a sentence about the format."""
    text = str(tensor.get("DataType") or tensor.get("Format/Datatype") or tensor.get("Format") or "").upper()
    if text in _ALIASES:
        return _ALIASES[text]
    found = next((kind for kind in _TYPES if re.search(rf"\b{kind}\b", text)), None)
    return found or next((to for name, to in _ALIASES.items() if re.search(rf"\b{name}\b", text)), text or "?")


def by_kind(found: Iterable[Layer]) -> list[tuple[str, str, int, int]]:
    """Kind, types, layers and the ONNX nodes in them, the most frequent first."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    nodes: collections.Counter[tuple[str, str]] = collections.Counter()
    for layer in found:
        key = (layer.kind or "?", ", ".join(layer.types) or "?")
        counts[key] += 1
        nodes[key] += len(layer.nodes)
    return [(*key, count, nodes[key]) for key, count in counts.most_common()]
