"""The ONNX model that an engine is built from, and the weights beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir import serde
from torch import Tensor

from helios.errors import InputError
from helios.export.dynamic import unify
from helios.export.model import to_model
from helios.export.weights import arrange, external
from helios.export.weights import write as write_weights
from helios.graph import Value
from helios.program import WeightReader
from helios_trt.dialect import adapt, options_for
from helios_trt.units import Unit

__all__ = ["Written", "digest_of", "written"]

WEIGHTS = "weights.bin"


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """A model in memory, without what is built in.

    Attributes:
        unit: that it is of.
        data: the ONNX protobuf; weights are references to a file beside it.
        outputs: what it calls the outputs, in their order: not always as the graph does.
    """

    unit: Unit
    data: bytes
    outputs: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the model: whatever changes what is computed changes it."""
        return hashlib.sha256(self.data).hexdigest()

    def save(self, folder: Path, weights: WeightReader | None) -> Path:
        """Write the model and its weights to a folder, tensor by tensor; the model's path.

        Raises:
            OSError: the disk.
        """
        places = arrange({v.name: v.type for v in _baked(self.unit).values()})
        if places:
            assert weights is not None
            write_weights(folder / WEIGHTS, places, _OnHost(weights))
        path = folder / "model.onnx"
        with path.open("xb") as file:
            file.write(self.data)
            os.fsync(file.fileno())
        return path


def written(unit: Unit, lacks: Collection[str] = ()) -> Written:
    """The model of a unit: with open sizes where it has several graphs.

    Args:
        lacks: ops of opset 23 that TensorRT's parser does not take.

    Raises:
        UnsupportedNode: an op has no form in ONNX.
    """
    places = arrange({v.name: v.type for v in _baked(unit).values()})
    built_in = {name: external(place, WEIGHTS) for name, place in places.items()}
    source = unify(unit.graphs) if len(unit.graphs) > 1 else unit.graphs[0]
    model = to_model(source, options_for(unit.graphs[0], lacks), initializers=built_in)
    adapt(model, lacks)
    return Written(unit, _serialized(model), tuple(str(value.name) for value in model.graph.outputs))


def _serialized(model: ir.Model) -> bytes:
    return bytes(serde.serialize_model(model).SerializeToString(deterministic=True))


def _baked(unit: Unit) -> Mapping[str, Value]:
    return {v.name: v for v in unit.graphs[0].inputs if v.name in unit.baked}


def digest_of(unit: Unit, weights: WeightReader) -> str:
    """SHA-256 over what is built in, as it is built in. Reads all of it; the host holds one tensor at a time.

    Raises:
        InputError: a weight has another shape than the graphs take.
    """
    sha = hashlib.sha256()
    for name, value in sorted(_baked(unit).items()):
        tensor = _OnHost(weights).read(name)
        if tuple(tensor.shape) != value.shape:
            raise InputError(f"weight {name!r} has shape {list(tensor.shape)}, the graph takes {list(value.shape)}")
        sha.update(name.encode())
        sha.update(_bytes(tensor.to(value.dtype)))
    return sha.hexdigest()


class _OnHost:
    """A reader whose tensors may come from a device, for those who want their bytes."""

    def __init__(self, weights: WeightReader) -> None:
        self._weights = weights

    def read(self, name: str) -> Tensor:
        return self._weights.read(name).cpu()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
