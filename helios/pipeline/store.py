"""A run on disk: a folder that keeps each finished chunk, so that whatever stops a run, it goes on from there.

::

    video.helios/
        run.json                 what was asked for, once
        segment-00000.mp4        the frames of a chunk, encoded once and never touched again
        chunk-00000.safetensors  its latents, the state after it, and the plan of its execution

Every file appears whole or not at all. The segment comes first: a chunk is finished when its second file is there. Both
are checked by digest when they are read, since a disk may damage what it has kept for weeks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helios.errors import InputError, StateError
from helios.media import SegmentWriter
from helios.media.storage import atomic, writing
from helios.pipeline.codec import Codec, decoding_of, host_frames, split_of
from helios.pipeline.request import FPS
from helios.pipeline.run import Chunk
from helios.pipeline.state import RunState

__all__ = ["Finished", "RunFolder", "Saved", "chunk_bytes", "decode_again", "lock"]

FORMAT = 1
STATE_NAME = "chunk-{:05d}.safetensors"
SEGMENT_NAME = "segment-{:05d}.mp4"
_OURS = re.compile(r"\.?((chunk|segment)-\d{5,}\.(safetensors|mp4)|run\.json)(\.part)?|\.lock")

BYTES_A_PIXEL = 1.0
"""Room kept for an encoded pixel. The noise that ``tiny`` makes at 64×64 took 0.65, at 128×192 0.57."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """A finished chunk read back: ``latents`` as in ``Chunk``, the state after it, the digest of its segment."""

    state: RunState
    latents: Tensor
    segment: str


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """What of a run is whole: ``count`` chunks from the first, the prompts of each, and what is wrong with the next."""

    count: int
    prompts: tuple[tuple[str, ...], ...]
    problem: str = ""


class RunFolder:
    """The folder of one run; see :meth:`create` and :meth:`open`.

    Attributes:
        path: of the folder.
        about: what ``run.json`` says: ``size`` (height, width), ``metadata`` of the video, and whatever else the maker
            of the run wants to know when it goes on.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, about
        height, width = about["size"]
        self._writer = SegmentWriter(path, size=(height, width), fps=FPS, metadata=about["metadata"])

    @staticmethod
    def beside(out: str | os.PathLike[str]) -> Path:
        """Where the run of a video is kept: ``video.helios`` for ``video.mp4``."""
        return Path(out).with_suffix(".helios")

    @classmethod
    def create(cls, path: Path, about: Mapping[str, Any], origin: tuple[RunFolder, int] | None = None) -> RunFolder:
        """Begin a run, with the first chunks of another one where it branches off.

        Args:
            path: of a folder that is not there, or holds an old run, which is replaced.
            about: JSON values; see ``about``.
            origin: the other run and how many of its chunks are copied.

        Raises:
            StateError: the folder holds other things than a run. StorageError: it cannot be written.
        """
        _require_ours(path)
        made = cls(path, {"format": FORMAT, **about})
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            for name in sorted(
                set(_names(path)) - {".lock"}, key=lambda name: name != "run.json"
            ):  # a half deleted run is none
                (path / name).unlink()
        if origin is not None:
            made._copy(*origin)
        made.note({})
        return made

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The run that a folder holds.

        Raises:
            StateError: there is none, or its ``run.json`` is damaged or of another format.
        """
        file = path / "run.json"
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise StateError(f"{file} is of format {about['format']}, this Helios reads format {FORMAT}")
            return cls(path, about)
        except FileNotFoundError as error:
            raise StateError(f"{path} holds no run: run.json is missing", "check --out, or start a new run") from error
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, StateError | InputError):
                raise
            raise StateError(f"{file} is damaged: {error!r}", "start a new run under another --out") from error

    def note(self, more: Mapping[str, Any]) -> None:
        """Write ``run.json`` with more, or newer, words in it."""
        self.about = {**self.about, **more}
        with atomic(self.path / "run.json") as part:
            part.write_text(json.dumps(self.about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _copy(self, source: RunFolder, count: int) -> None:
        for chunk in range(count):
            for name in (SEGMENT_NAME.format(chunk), STATE_NAME.format(chunk)):
                with atomic(self.path / name) as part:
                    shutil.copyfile(source.path / name, part)

    def save(self, chunk: Chunk, frames: Tensor) -> None:
        """Keep a finished chunk, replacing an older one; on disk for good when this returns.

        Args:
            chunk: of one video.
            frames: uint8 ``[33, h, w, 3]`` as they are to be seen.

        Raises:
            StorageError: the disk is full or cannot be written; what was finished before is untouched.
        """
        segment = _sha(self._writer.write(chunk.index, frames))
        self._write(chunk.index, Saved(chunk.state, chunk.latents, segment))

    def _write(self, chunk: int, saved: Saved) -> None:
        from safetensors.torch import save

        tensors, metadata = saved.state.to_tensors()
        tensors["latents"] = saved.latents.contiguous()
        metadata["segment"] = saved.segment
        metadata["digest"] = _digest(tensors, metadata)
        with atomic(self.path / STATE_NAME.format(chunk)) as part:
            part.write_bytes(save(tensors, metadata))

    def read(self, chunk: int) -> Saved:
        """A finished chunk. Raises StateError where it is missing or damaged, and says how."""
        from safetensors import SafetensorError, safe_open

        path = self.path / STATE_NAME.format(chunk)
        try:
            with safe_open(str(path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
                metadata = file.metadata() or {}
            digest, segment = metadata.pop("digest"), metadata["segment"]
        except FileNotFoundError as error:
            raise StateError(f"{path} is missing") from error
        except (SafetensorError, KeyError, OSError) as error:
            raise StateError(f"{path} is damaged: {error}") from error
        if digest != _digest(tensors, metadata):
            raise StateError(f"{path} is damaged: its content does not have the digest that was saved with it")
        latents = tensors.pop("latents")
        return Saved(RunState.from_tensors(tensors, metadata), latents, segment)

    def finished(self) -> Finished:
        """The chunks from the first up to one that is missing or damaged; reads all of them, one at a time."""
        prompts: list[tuple[str, ...]] = []
        while True:
            try:
                prompts.append(self.read(len(prompts)).state.prompt.current)
            except StateError as error:
                count = len(prompts)
                later = any(int(name[6:-12]) >= count for name in _names(self.path) if name.startswith("chunk-"))
                return Finished(count, tuple(prompts), error.why if later else "")

    def segment(self, chunk: int) -> Path:
        """Where the frames of a chunk are."""
        return self.path / SEGMENT_NAME.format(chunk)

    def segment_is_whole(self, chunk: int) -> bool:
        """Whether the frames of a finished chunk are there, with the bytes that were written."""
        path = self.segment(chunk)
        return path.is_file() and _sha(path) == self.read(chunk).segment

    def rewrite_segment(self, chunk: int, frames: Tensor) -> None:
        """Encode the frames of a finished chunk again, where its segment was lost."""
        segment, saved = _sha(self._writer.write(chunk, frames)), self.read(chunk)
        if segment != saved.segment:  # written by another encoder; the chunk is as good as before
            self._write(chunk, dataclasses.replace(saved, segment=segment))


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, which is made, for as long as the context is open.

    Raises:
        StateError: another process is in it. StorageError: the folder cannot be made.
    """
    _require_ours(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        handle = (path / ".lock").open("w")
    with handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # a system without such locks
            pass
        except BlockingIOError:
            fix = "wait for it, or stop it, or give another --out"
            raise StateError(f"another process is writing the run in {path}", fix) from None
        yield


def decode_again(codec: Codec, saved: Saved) -> Tensor:
    """The frames of a finished chunk, ``[b, 33, h, w, 3]`` uint8 on the host, decoded in the way that its plan says."""
    plan = saved.state.plan
    dtype = decoding_of(plan["vae"], plan["precision"])
    video = codec.decode(saved.latents.to(codec.backend.device), split_of(plan["vae"]), dtype)
    return host_frames(codec.backend, video)


def chunk_bytes(height: int, width: int, latents: int, history: int) -> int:
    """Room that a chunk takes at most: its file, its segment, and its share of the joined video.

    Args:
        height, width: of a frame, in pixels.
        latents: bytes of its latents.
        history: bytes of the state's window of past latents.
    """
    return latents + history + latents // 9 + 4096 + int(2 * 33 * height * width * BYTES_A_PIXEL)


def _names(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if _OURS.fullmatch(entry.name)] if path.is_dir() else []


def _require_ours(path: Path) -> None:
    """Raise unless everything in the folder was written by a run: nothing else may be deleted."""
    if path.exists() and not path.is_dir():
        raise StateError(f"{path} is a file; the run would be kept in a folder of that name", "give another --out")
    strange = sorted({entry.name for entry in path.iterdir()} - set(_names(path))) if path.is_dir() else []
    if strange:
        raise StateError(f"{path} holds {strange[0]!r}, which no run wrote", "give another --out")


def _sha(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
