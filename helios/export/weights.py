"""The weights of an export: one file that all models share, written and read one tensor at a time.

Every weight stands in the file once, whichever models read it, at an offset that a runtime can map into memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from helios.errors import CheckpointError, GraphError
from helios.graph import TensorType, dtype_name
from helios.program import WeightReader

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ALIGNMENT", "Place", "arrange", "external", "require_whole", "total_bytes", "write"]

ALIGNMENT = 4096
"""Bytes; what ONNX recommends for mapping, the size of a page."""

_PIECE = 1 << 24  # bytes that are hashed at a time


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where one weight lies in the file: little-endian elements in row-major order, without gaps."""

    name: str
    type: TensorType
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.type.nbytes


def arrange(weights: Mapping[str, TensorType]) -> dict[str, Place]:
    """Places in the order given, each at the next multiple of ``ALIGNMENT``.

    >>> kind = TensorType((3,), torch.float32)
    >>> [place.offset for place in arrange({"a": kind, "b": kind}).values()]
    [0, 4096]
    """
    places: dict[str, Place] = {}
    end = 0
    for name, kind in weights.items():
        places[name] = Place(name, kind, -(-end // ALIGNMENT) * ALIGNMENT)
        end = places[name].end
    return places


def total_bytes(places: Mapping[str, Place]) -> int:
    """Size of the file; it ends with the last weight."""
    return max((place.end for place in places.values()), default=0)


def write(
    path: Path,
    places: Mapping[str, Place],
    weights: WeightReader,
    progress: Callable[[int], None] = lambda written: None,
) -> dict[str, str]:
    """Write the file and sync it; the host holds one tensor at a time.

    Args:
        path: of the file, which must not exist.
        places: in the order of their offsets.
        weights: where they come from, in any floating dtype; each is converted to the dtype of its place.
        progress: told after each weight how many bytes are written.

    Returns:
        SHA-256 of each weight's bytes, in hexadecimal.

    Raises:
        CheckpointError: a weight has another shape than its place; and whatever the source raises.
        OSError: the disk.
    """
    digests: dict[str, str] = {}
    with path.open("xb", buffering=0) as file:
        for place in places.values():
            _fill(file, bytes(place.offset - file.tell()))
            digests[place.name] = _write_one(file, place, weights.read(place.name))
            progress(place.end)
        os.fsync(file.fileno())
    return digests


def _write_one(file: BinaryIO, place: Place, tensor: Tensor) -> str:
    if tuple(tensor.shape) != place.type.shape:
        raise CheckpointError(
            f"weight {place.name!r} has shape {list(tensor.shape)}, the graphs take {list(place.type.shape)}",
            "use the config.json that belongs to these weights",
        )
    data = tensor.to(place.type.dtype).contiguous().view(-1).view(torch.uint8).numpy().data
    _fill(file, data)
    return hashlib.sha256(data).hexdigest()


def _fill(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of it: the system takes at most 2 GB at once, and less where a disk fills."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def external(place: Place, location: str, folder: Path | str = "") -> ir.ExternalTensor:
    """The weight as an initialiser of a model: a reference, which reads nothing.

    Args:
        location: the file's name, relative to the model's folder.
        folder: of both, for whoever reads values before the model is saved.
    """
    import onnx_ir as ir

    from helios.export.wire import element

    return ir.ExternalTensor(
        location,
        place.offset,
        place.type.nbytes,
        element(place.type.dtype),
        shape=ir.Shape(place.type.shape),
        name=place.name,
        base_dir=folder,
    )


def require_whole(path: Path, places: Sequence[tuple[Place, str]], *, size: int, digests: bool = True) -> None:
    """Compare the file with what was written.

    Args:
        places: with the SHA-256 of each.
        size: of the file in bytes.
        digests: read all of it and compare every weight; otherwise only its size is looked at.

    Raises:
        GraphError: the file is missing, of another size, or a weight in it changed; names file and weight.
    """
    fix = "copy the folder again, or export it anew"
    try:
        came = path.stat().st_size
        if came != size:
            short = [place.name for place, _ in places if place.end > came]
            why = f"{path} has {came} bytes, wanted {size}" + (f": cut off in weight {short[0]!r}" if short else "")
            raise GraphError(why, fix)
        with path.open("rb", buffering=0) as file:
            for place, digest in places if digests else ():
                if _digest(file, place) != digest:
                    kind = f"{dtype_name(place.type.dtype)}{list(place.type.shape)}"
                    why = f"{path}: weight {place.name!r} ({kind} at byte {place.offset}) does not fit its digest"
                    raise GraphError(why, fix)
    except OSError as error:
        raise GraphError(f"cannot read the weights in {path}: {error.strerror}", fix) from error


def _digest(file: BinaryIO, place: Place) -> str:
    sha = hashlib.sha256()
    file.seek(place.offset)
    left = place.type.nbytes
    while left:
        piece = file.read(min(left, _PIECE))
        if not piece:
            break
        sha.update(piece)
        left -= len(piece)
    return sha.hexdigest()
