"""The safetensors format, read by position: the header is checked to the byte, a tensor is read into fresh memory.

A file is 8 bytes of header length (little-endian), a JSON header of names to dtype, shape and byte range, then the
data. A mapped file would count twice once its tensors are copied; a positioned read counts once.
Source of the format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from helios.errors import CheckpointError

__all__ = ["Entry", "TensorInfo", "read_header", "read_tensor"]

MAX_HEADER = 100_000_000  # bytes; the format's own limit, which keeps a damaged length from asking for terabytes

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

_AGAIN = "the file is damaged: download it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: the file, and its first byte counted from the start of the file."""

    path: Path
    start: int
    info: TensorInfo


def read_header(path: Path) -> dict[str, Entry]:
    """All tensors of a file, by name.

    Raises:
        CheckpointError: not a whole, well-formed safetensors file; the message names the file and the tensor.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = _header_length(path, file.read(8), size)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "check that the file is there") from error
    header = _parse(path, raw)
    header.pop("__metadata__", None)  # free text of whoever wrote the file
    ranges = {name: _check_entry(path, name, fields) for name, fields in header.items()}
    _check_ranges(path, ranges, size - 8 - length)
    return {name: Entry(path, 8 + length + begin, info) for name, (begin, _, info) in ranges.items()}


def read_tensor(entry: Entry) -> torch.Tensor:
    """Read one tensor into fresh host memory, in the dtype of the file.

    The peak is the tensor itself: no mapping, no staging buffer. Safe to call from several threads.

    Raises:
        CheckpointError: the file ended early, or cannot be read.
    """
    tensor = torch.empty(entry.info.shape, dtype=entry.info.dtype, device="cpu")
    buffer = tensor.reshape(-1).view(torch.uint8).numpy().data
    try:
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            while len(buffer):  # one read returns at most 2 GiB on Linux
                count = file.readinto(buffer)
                if not count:
                    raise CheckpointError(f"{entry.path} became shorter while it was read", _AGAIN)
                buffer = buffer[count:]
    except OSError as error:
        raise CheckpointError(f"{entry.path} cannot be read: {error.strerror}", "check the disk") from error
    return tensor


def _header_length(path: Path, raw: bytes, size: int) -> int:
    if len(raw) < 8:
        raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file", _AGAIN)
    length = int.from_bytes(raw, "little")
    if length > MAX_HEADER:
        raise CheckpointError(f"{path} states a header of {length} bytes: this is not a safetensors file", _AGAIN)
    if length > size - 8:
        raise CheckpointError(f"{path} is truncated: its header needs {length + 8} bytes, it has {size}", _AGAIN)
    return length


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """JSON lets a name come twice, and the last one would win in silence."""
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: tensor {twice!r} stands twice in the header", _AGAIN)
        return result

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not JSON: {error}", _AGAIN) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is no JSON object", _AGAIN)
    return header


def _check_entry(path: Path, name: str, fields: Any) -> tuple[int, int, TensorInfo]:
    """(first byte, byte after the last, info) of one header entry, both counted from the start of the data."""
    if not isinstance(fields, Mapping) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: tensor {name!r} lacks one of dtype, shape, data_offsets", _AGAIN)
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in _DTYPES:
        known = ", ".join(sorted(_DTYPES))
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {fields['dtype']!r}, which is unknown here. Known: {known}",
            "convert the tensor to one of these",
        )
    if not _are_sizes(fields["shape"]) or not _are_sizes(fields["data_offsets"]) or len(fields["data_offsets"]) != 2:
        raise CheckpointError(f"{path}: tensor {name!r} has a shape or data_offsets that are no sizes", _AGAIN)
    info = TensorInfo(tuple(fields["shape"]), _DTYPES[fields["dtype"]])
    begin, end = fields["data_offsets"]
    if end - begin != info.nbytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {list(info.shape)} and dtype {fields['dtype']} needs {info.nbytes} "
            f"bytes, its data_offsets give {end - begin}",
            _AGAIN,
        )
    return begin, end, info


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def _check_ranges(path: Path, ranges: Mapping[str, tuple[int, int, TensorInfo]], data: int) -> None:
    """The tensors must cover the data without overlap, hole or rest: anything else hides or loses bytes."""
    position = 0
    for name, (begin, end, _) in sorted(ranges.items(), key=lambda item: item[1][:2]):
        if begin != position:
            kind = "overlaps another tensor" if begin < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {name!r} {kind} (begins at {begin}, expected {position})", _AGAIN)
        position = end
        if end > data:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends at byte {end} of the data, the file has {data}", _AGAIN
            )
    if position != data:
        raise CheckpointError(f"{path} has {data - position} bytes after its last tensor", _AGAIN)
