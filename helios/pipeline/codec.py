"""Frames to latents and back on the backend: the VAE's programs, one a direction, made for the size in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helios.backend import Backend
from helios.graph import Graph
from helios.lower import lower
from helios.media import to_frames
from helios.model.config import VaeConfig
from helios.model.vae_precision import VAE_DTYPES, published_vae_precision, vae_name
from helios.model.vae_run import VaeRunner, decode_graphs, encode_graphs
from helios.model.vae_split import Half, Split, Tile, choose_split
from helios.op import accumulator
from helios.ops.conv import sample_posterior
from helios.program import Coverage, Program, WeightReader

__all__ = ["Codec", "free_memory", "host_frames", "to_host"]

SHARE = 0.5
"""Part of the free memory that the VAE's activations may take."""

ASSUMED = 4 << 30
"""Bytes taken for free where neither the device nor the system says."""


@dataclasses.dataclass(slots=True)
class _Slot:
    """The program in use; another size replaces it, so that weights are never held twice."""

    key: Hashable = None
    program: Program | None = None


class Codec:
    """Runs the VAE.

    Args:
        config: of the network.
        weights: its source.
        backend: to run it.
        dtype: in which it decodes unless told otherwise; the publication uses float32.
        fallback: as for ``lower``.

    Attributes:
        encoding: dtype in which it encodes: float32, also where decoding is narrower. What it gives is in the history
            of every chunk, and it is asked for once a run.
    """

    def __init__(
        self, config: VaeConfig, weights: WeightReader, backend: Backend, dtype: torch.dtype, fallback: str = "error"
    ) -> None:
        self.config, self.weights, self.backend = config, weights, backend
        self.dtype, self.encoding, self.fallback = dtype, accumulator(dtype), fallback
        self._splits: dict[tuple[int, int, int, int, Half, torch.dtype], Split] = {}
        self._slots: dict[Half, _Slot] = {"decode": _Slot(), "encode": _Slot()}
        self._coverage: dict[Hashable, Coverage] = {}

    @property
    def coverage(self) -> Sequence[Coverage]:
        """How the ops run of every program that was made so far, also of those that others replaced."""
        return [*self._coverage.values()]

    def choose(
        self,
        batch: int,
        latents: int,
        height: int,
        width: int,
        half: Half = "decode",
        dtype: torch.dtype | None = None,
    ) -> Split:
        """The largest groups of latents that fit into half of what is free when a size is first asked for.

        Part of a run's plan: groups do not change the result in exact arithmetic, but may change last bits in float32.

        Args:
            dtype: as for ``decode``; encoding has its own.
        """
        key = (batch, latents, height, width, half, self.encoding if half == "encode" else dtype or self.dtype)
        if key not in self._splits:
            self._splits[key] = self._choose(*key)
        return self._splits[key]

    def _choose(self, batch: int, latents: int, height: int, width: int, half: Half, dtype: torch.dtype) -> Split:
        return choose_split(
            self.config,
            latents=latents,
            height=height,
            width=width,
            dtype=dtype,
            budget_bytes=int(SHARE * free_memory(self.backend)),
            batch=batch,
            half=half,
        )

    def decode(self, latents: Tensor, split: Split, dtype: torch.dtype | None = None) -> Tensor:
        """Frames of normalised latents ``[b, z, t, h, w]``: ``[b, 3, 4(t − 1) + 1, 8h, 8w]``, −1 … 1, on the device.

        Args:
            dtype: of the arithmetic and the result; ``None`` for the codec's own.
        """
        batch, _, count, h, w = latents.shape
        dtype = dtype or self.dtype
        size = {"height": h * self.config.scale_factor_spatial, "width": w * self.config.scale_factor_spatial}
        graphs = decode_graphs(self.config, batch=batch, latents=count, dtype=dtype, split=split, **size)
        return self._runner("decode", graphs, split, dtype).decode(latents)

    def encode(self, video: Tensor, noise: Tensor, split: Split) -> Tensor:
        """Normalised latents drawn from the posterior of a video; host, accumulator dtype.

        Args:
            video: ``[1, 3, 4m + 1, height, width]``, −1 … 1.
            noise: standard normal ``[b, z, m + 1, height/8, width/8]``: b draws from the one posterior.
        """
        batch, _, frames, height, width = video.shape
        size = {"height": height, "width": width}
        graphs = encode_graphs(self.config, batch=batch, frames=frames, dtype=self.encoding, split=split, **size)
        runner = self._runner("encode", graphs, split, self.encoding)
        moments = self.backend.fetch(runner.moments(video)).to(self.encoding)
        moments = moments.expand(noise.shape[0], *moments.shape[1:])
        return sample_posterior(
            moments, noise.to(self.encoding), mean=self.config.latents_mean, std=self.config.latents_std
        )

    def _runner(self, half: Half, graphs: Mapping[str, Graph], split: Split, dtype: torch.dtype) -> VaeRunner:
        slot = self._slots[half]
        key = (dtype, *sorted(graphs))  # names tell sizes, not dtypes
        if slot.key != key or slot.program is None:
            slot.program = None  # free the old one before the new one is made
            slot.program = lower(graphs, self.backend, fallback=self.fallback)
            slot.program.load(self.weights)
            self._coverage[key] = slot.program.coverage
            slot.key = key
        program = slot.program
        return VaeRunner(self.config, lambda g, inputs: program.run(g.name, inputs), dtype=dtype, split=split)

    def release(self, half: Half) -> None:
        """Free one direction's weights."""
        self._slots[half] = _Slot()


def host_frames(backend: Backend, video: Tensor) -> Tensor:
    """A decoded video as frames on the host: ``[b, 3, f, h, w]`` on the device to uint8 ``[b, f, h, w, 3]``.

    Raises:
        BackendError: see ``Backend.fetch``; here the host first asks what became of all that it had queued.
    """
    with backend.explained("the frames"):
        return backend.fetch(to_frames(backend.fetch(video) if video.is_meta else video))


def to_host(tensor: Tensor) -> Tensor:
    """The tensor in host memory; of the meta device, which holds no numbers, zeros of the same shape."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.cpu()


def free_memory(backend: Backend) -> int:
    """Bytes free on the device, or on the host where the backend does not say; within the process's own limit."""
    told = backend.memory()
    if told is not None:
        return told[0]
    found = [n for n in (_available(), _cgroup_room()) if n is not None]
    return min(found, default=ASSUMED)


def _available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _cgroup_room() -> int | None:
    """What a container's limit leaves, where there is one (control groups, version 2)."""
    root = Path("/sys/fs/cgroup")
    try:
        return int((root / "memory.max").read_text()) - int((root / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def split_of(plan: Mapping[str, Any]) -> Split:
    """The split that ``plan_of`` wrote down."""
    tile = Tile(plan["tile"], plan["stride"]) if plan.get("tile") else None
    return Split(plan["group"], tile)


def decoding_of(plan: Mapping[str, Any], precision: str) -> torch.dtype:
    """The dtype that ``plan_of`` wrote down, of a run in that precision; without one the published."""
    return VAE_DTYPES[plan.get("precision", published_vae_precision(precision))]


def plan_of(split: Split, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """How a chunk is decoded, as JSON values: ``group``, ``precision``, and of tiles ``tile`` and ``stride``."""
    tile = {"tile": split.tile.size, "stride": split.tile.stride} if split.tile else {}
    return {"group": split.group, **tile, "precision": vae_name(dtype)}
