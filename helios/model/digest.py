"""A digest of a model folder that is quick: it looks at every tensor, and reads a few hundred bytes of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from helios.errors import CheckpointError
from helios.model.safetensors_io import Entry, read_header

__all__ = ["PIECE", "folder_digest"]

PIECE = 256
"""Bytes read at the beginning, in the middle and at the end of each tensor."""

_COMPONENTS = ("transformer", "vae", "text_encoder")


def folder_digest(path: Path) -> bytes:
    """A digest of what a model folder computes with: 32 bytes, the same wherever the folder lies.

    It covers ``model_index.json``, the JSON files of every component, all files of the tokenizer, the header of every
    safetensors file, and three pieces of every tensor: its first, middle and last 256 bytes, which is all of a small
    one. A tensor that was trained on, rescaled, rounded or replaced differs in them; one whose changes all lie between
    the pieces does not, and is not seen. Nor are files that are neither JSON nor safetensors outside the tokenizer.
    Split into other shards, or with other metadata in a header, the same weights have another digest.

    Raises:
        CheckpointError: a file cannot be read, or is no whole safetensors file.
    """
    sha = hashlib.sha256()
    for file in _files(path):
        sha.update(file.relative_to(path).as_posix().encode() + b"\0")
        try:
            for part in _pieces(file) if file.suffix == ".safetensors" else [file.read_bytes()]:
                sha.update(len(part).to_bytes(8, "little") + part)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}", "check that the file is there") from error
    return sha.digest()


def _files(path: Path) -> Iterator[Path]:
    yield path / "model_index.json"
    patterns = [(name, ending) for name in _COMPONENTS for ending in ("*.json", "*.safetensors")]
    for name, pattern in [("scheduler", "*.json"), *patterns, ("tokenizer", "*")]:
        files = (path / name).glob(pattern)
        yield from sorted(file for file in files if file.is_file() and not file.name.startswith("."))


def _pieces(path: Path) -> Iterator[bytes]:
    """The header, then the pieces of each tensor in the order of the file: the disk reads forwards."""
    entries = sorted(read_header(path).values(), key=lambda entry: entry.start)
    with path.open("rb", buffering=0) as file:
        header = json.loads(file.read(entries[0].start if entries else -1)[8:])
        yield json.dumps(header, sort_keys=True).encode()  # writers put metadata in an order that changes by chance
        for entry in entries:
            for start, count in _spans(entry):
                file.seek(start)
                yield file.read(count)


def _spans(entry: Entry) -> list[tuple[int, int]]:
    """(first byte, bytes) of each piece; a tensor of at most three pieces is one."""
    size = entry.info.nbytes
    if size <= 3 * PIECE:
        return [(entry.start, size)]
    return [(entry.start + offset, PIECE) for offset in (0, (size - PIECE) // 2, size - PIECE)]
