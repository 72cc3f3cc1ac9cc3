"""Where weights come from: a folder of safetensors, or seeded random numbers; and the check that they fit a network.

A :class:`WeightSource` gives one fresh host tensor at a time, so that a loader can convert and move each one and let go
of it: the peak of host memory is what is kept, plus one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from helios.errors import CheckpointError
from helios.model.fields import load_json
from helios.model.safetensors_io import Entry, TensorInfo, read_header, read_tensor

__all__ = ["Renamed", "SafetensorsFolder", "TensorInfo", "WeightSource", "check", "current_names"]

_BASES = ("diffusion_pytorch_model", "model")  # file names of diffusers and of transformers
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHOWN = 10  # names in one message


class WeightSource(Protocol):
    """Named tensors that can be read one at a time."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor, without reading one."""

    @property
    def origin(self) -> str:
        """Where the weights come from, in words that a report can print."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor: fresh host memory, contiguous, in the stored dtype, checked finite."""

    def where(self, name: str) -> str:
        """Where this tensor lies, for a message."""


class SafetensorsFolder:
    """The weights of one component of a published folder, in one file or in shards with an index.

    Args:
        path: the component's folder, such as ``…/transformer``.

    Raises:
        CheckpointError: no safetensors, only pickled weights (refused), a missing or damaged shard, or an index at odds
            with its shards; the message names file and tensor.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._entries = _entries(self.path)
        self.tensors: Mapping[str, TensorInfo] = {name: entry.info for name, entry in self._entries.items()}
        self.origin = str(self.path)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor; peak memory is the tensor.

        Raises:
            CheckpointError: the file cannot be read, or the tensor holds NaN or infinity.
        """
        tensor = read_tensor(self._entries[name])
        _require_finite(tensor, name, self._entries[name].path)
        return tensor

    def where(self, name: str) -> str:
        """The file that holds this tensor."""
        return str(self._entries[name].path) if name in self._entries else str(self.path)


class Renamed:
    """A source whose tensors have other names.

    Args:
        source: the source to read from.
        names: new name -> name in the source.
    """

    def __init__(self, source: WeightSource, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names
        self.tensors: Mapping[str, TensorInfo] = {new: source.tensors[old] for new, old in names.items()}
        self.origin = source.origin

    def read(self, name: str) -> torch.Tensor:
        """Read the tensor that this name stands for."""
        return self._source.read(self._names[name])

    def where(self, name: str) -> str:
        """The place of the tensor that this name stands for."""
        return self._source.where(self._names.get(name, name))


def current_names(source: WeightSource) -> WeightSource:
    """The transformer's weights under today's names; early checkpoints had two names otherwise.

    ``scale_shift_table`` at the top is today's ``norm_out.scale_shift_table``, and ``multi_term_memory_patch.patch_*``
    today's ``patch_*``.

    Raises:
        CheckpointError: an old and a new name stand for the same tensor.
    """
    names: dict[str, str] = {}
    for old in source.tensors:
        new = "norm_out.scale_shift_table" if old == "scale_shift_table" else old
        new = new.removeprefix("multi_term_memory_patch.")
        if new in names:
            raise CheckpointError(
                f"{source.where(old)}: {names[new]!r} and {old!r} are the old and the new name of one tensor",
                "remove one of them",
            )
        names[new] = old
    return source if all(new == old for new, old in names.items()) else Renamed(source, names)


def check(source: WeightSource, expected: Mapping[str, tuple[int, ...]], *, ignore: Sequence[str] = ()) -> None:
    """Raise unless the source holds exactly the expected tensors, in floating point.

    Args:
        source: the weights.
        expected: name -> shape of every tensor that the network needs.
        ignore: parts of names; an unexpected tensor whose name holds one of them is left alone.

    Raises:
        CheckpointError: names what is missing, unexpected, wrong in shape or in dtype: ten of each kind, and how many.
    """
    came = source.tensors
    extra = [name for name in came if name not in expected and not any(part in name for part in ignore)]
    common = [name for name in expected if name in came]
    shapes = [name for name in common if came[name].shape != tuple(expected[name])]
    dtypes = [name for name in common if not came[name].dtype.is_floating_point]
    parts = [
        _part("missing", [name for name in expected if name not in came]),
        _part("unexpected", [f"{name} in {Path(source.where(name)).name}" for name in extra]),
        _part("wrong shape", [_versus(source, name, list(came[name].shape), list(expected[name])) for name in shapes]),
        _part("wrong dtype", [_versus(source, n, str(came[n].dtype)[6:], "floating point") for n in dtypes]),
    ]
    if any(parts):
        raise CheckpointError(
            f"{source.origin} does not fit its config: " + "; ".join(filter(None, parts)),
            "use the config.json that belongs to these weights, or download both again",
        )


def _part(kind: str, names: Sequence[str]) -> str:
    more = f", … {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}" if names else ""


def _versus(source: WeightSource, name: str, came: object, wanted: object) -> str:
    return f"{name} in {Path(source.where(name)).name} is {came}, wanted {wanted}"


def _require_finite(tensor: torch.Tensor, name: str, path: Path) -> None:
    """One pass without temporaries the size of the tensor: NaN and infinity both show in the extremes."""
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return
    if tensor.dtype.itemsize == 1:  # no arithmetic on fp8: widened in pieces
        extremes = [bound for piece in torch.split(tensor.reshape(-1), 1 << 20) for bound in piece.float().aminmax()]
    else:
        extremes = list(tensor.aminmax())
    if not all(bool(torch.isfinite(bound)) for bound in extremes):
        raise CheckpointError(
            f"{path}: tensor {name!r} holds NaN or infinity", "the checkpoint is damaged: download it again"
        )


def _entries(folder: Path) -> dict[str, Entry]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", "give the folder that holds the model")
    for base in _BASES:
        index, single = folder / f"{base}.safetensors.index.json", folder / f"{base}.safetensors"
        if index.exists():
            return _sharded(index)
        if single.exists():
            return read_header(single)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which are refused: "
            "to open a pickle is to run whatever program its author put in",
            'convert where you trust the file: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{pickles[0]}', weights_only=True), '{_BASES[0]}.safetensors')\"",
        )
    raise CheckpointError(f"{folder} holds no {_BASES[0]}.safetensors and no index of one", "download the folder again")


def _sharded(index: Path) -> dict[str, Entry]:
    shards: dict[str, dict[str, Entry]] = {}
    found: dict[str, Entry] = {}
    for name, shard in _weight_map(index).items():
        if shard not in shards:
            shards[shard] = read_header(_shard_path(index, shard))
        if name not in shards[shard]:
            raise CheckpointError(f"{index} places tensor {name!r} in {shard}, which lacks it", "download both again")
        found[name] = shards[shard][name]
    _refuse_strays(index, shards, found)
    return found


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to files", "download the index again")
    return weight_map


def _shard_path(index: Path, shard: str) -> Path:
    """The shard's path; its name must be a plain file name, though a link is fine: the hub's cache is made of them."""
    plain = shard not in ("", ".", "..") and not set(shard) & set("/\\\0:")
    if not plain:
        raise CheckpointError(
            f"{index} names {json.dumps(shard)}, a path outside its folder, as a shard", "do not use this checkpoint"
        )
    path = index.parent / shard
    if not path.is_file():
        raise CheckpointError(f"{index} names the shard {shard}, which is missing", "finish the download of the folder")
    return path


def _refuse_strays(index: Path, shards: Mapping[str, Mapping[str, Entry]], found: Mapping[str, Entry]) -> None:
    """A tensor that a shard has and the index does not place there: a second copy, or a part of another model."""
    for shard, entries in shards.items():
        for name, entry in entries.items():
            if name not in found or found[name].path != entry.path:
                raise CheckpointError(
                    f"{index.parent / shard} holds tensor {name!r}, which {index.name} "
                    + ("places elsewhere" if name in found else "does not know"),
                    "download index and shards again, from one revision",
                )
