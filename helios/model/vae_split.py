"""How a video is cut for the VAE: latents a group, and overlapping tiles where even one latent is too much.

Groups are exact. Tiles are not: each is computed as if its border were the border of the video, and neighbours are
blended linearly over their overlap, with the published geometry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

import torch

from helios.errors import InputError
from helios.graph import Graph, Node
from helios.model.config import VaeConfig
from helios.model.vae import decode_graph, encode_graph, frames_of
from helios.op import accumulator

__all__ = ["Half", "Split", "Tile", "choose_group", "choose_split", "live_bytes", "peak_bytes"]

Half = Literal["decode", "encode"]

LARGEST = 2**31 - 1
"""Elements that a tensor may have: convolution libraries index with 32 bits, and beyond fail or fall back."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """Squares of ``size`` pixels every ``stride`` pixels; those at the border are what remains."""

    size: int = 256
    stride: int = 192

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.size:
            raise InputError(f"tiles of {self.size} pixels every {self.stride}: wanted 0 < stride ≤ size")

    def spans(self, length: int, factor: int) -> list[tuple[int, int]]:
        """Start and stop of the tiles along a side of ``length`` pixels, in units of ``factor`` pixels.

        >>> Tile().spans(384, 8)
        [(0, 32), (24, 48)]
        """
        size, stride, length = self.size // factor, self.stride // factor, length // factor
        return [(start, min(start + size, length)) for start in range(0, length, stride)]


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """What one graph computes at a time.

    Attributes:
        group: latents.
        tile: of rows and columns; ``None`` computes whole frames.
    """

    group: int
    tile: Tile | None = None

    def __post_init__(self) -> None:
        if self.group < 1:
            raise InputError(f"groups of {self.group} latents: wanted at least 1")

    def groups(self, latents: int) -> Iterator[tuple[int, int]]:
        """Start and stop of each group.

        >>> list(Split(4).groups(9))
        [(0, 4), (4, 8), (8, 9)]
        """
        return ((start, min(start + self.group, latents)) for start in range(0, latents, self.group))

    def tiled(self, height: int, width: int) -> Tile | None:
        """The tile, if a video of that many pixels needs more than one."""
        return self.tile if self.tile and max(height, width) > self.tile.size else None

    def require(self, config: VaeConfig) -> None:
        """Raise InputError if the tiles do not fall on latent pixels."""
        factor = config.scale_factor_spatial
        if self.tile and (self.tile.size % factor or self.tile.stride % factor):
            raise InputError(f"tile {self.tile.size}, stride {self.tile.stride}: wanted multiples of {factor} pixels")


# Outputs of these share the memory of their input in every torch-like runtime.
_VIEWS = frozenset({"expand", "narrow", "permute", "reshape", "unbind"})


def live_bytes(graph: Graph) -> int:
    """Most bytes of activations that are alive at once when the nodes run in order and each value is freed after its
    last use. Weights are not counted; inputs are, all the time, because the caller holds them.

    Norms and activations in a narrow dtype are charged two temporaries in the accumulator dtype, as their bodies have
    them before the result exists.
    What a library allocates inside one op (a convolution's workspace, a packed copy) is not in it.
    """
    owner, size = _memory(graph)
    dying = _last_uses(graph, owner)
    given = {v.name for v in graph.inputs}
    live = peak = sum(size[name] for name in given)
    for number, node in enumerate(graph.nodes):
        fresh = sum(size[out.name] for out in node.outputs if owner[out.name] == out.name)
        live += fresh
        peak = max(peak, live + (_workspace(node) if fresh else 0))
        live -= sum(size[name] for name in dying.get(number, ()) if name not in given)
    return peak


def _memory(graph: Graph) -> tuple[dict[str, str], dict[str, int]]:
    """For each value the one whose memory it lies in, and its bytes: 0 for weights and what is computed of them, but
    for a weight that is widened for one product."""
    owner = {v.name: v.name for v in graph.inputs}
    size = {v.name: v.type.nbytes if v.rate else 0 for v in graph.inputs}
    for node in graph.nodes:
        base = owner[node.values[0].name] if node.op in _VIEWS else None
        activation = not node.values or any(v.rate for v in node.values) or node.op == "dequantize_rows"
        for out in node.outputs:
            owner[out.name] = base or out.name
            size[out.name] = out.type.nbytes if activation else 0
    return owner, size


def _last_uses(graph: Graph, owner: Mapping[str, str]) -> dict[int, list[str]]:
    """For each node, the values that nobody needs after it."""
    uses = {owner[v.name]: number for number, node in enumerate(graph.nodes) for v in (*node.values, *node.outputs)}
    uses |= {owner[v.name]: len(graph.nodes) for _, v in graph.outputs}
    dying: dict[int, list[str]] = {}
    for name, number in uses.items():
        dying.setdefault(number, []).append(name)
    return dying


def _workspace(node: Node) -> int:
    out = node.outputs[0].type
    wide = accumulator(out.dtype)
    widens = node.op in ("channel_norm", "channel_norm_silu", "silu")
    return 2 * out.numel * wide.itemsize - out.nbytes if widens and wide != out.dtype else 0


def peak_bytes(
    config: VaeConfig,
    *,
    latents: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    batch: int = 1,
    first: bool = True,
    caches: bool = True,
    half: Half = "decode",
) -> int:
    """Predicted peak of the activations of one group, by ``live_bytes`` of its graph.

    Args:
        config: of the network.
        latents: of the group.
        height, width: of the video (or tile) in pixels.
        dtype: of the arithmetic.
        batch: videos that run together.
        first, caches: which graph, as for ``decode_graph``.
        half: of the network.
    """
    return live_bytes(_graph(config, latents, height, width, dtype, batch, first, caches, half))


def _graph(
    config: VaeConfig,
    latents: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    batch: int,
    first: bool,
    caches: bool,
    half: Half,
) -> Graph:
    if half == "decode":
        return decode_graph(
            config, batch=batch, latents=latents, height=height, width=width, dtype=dtype, first=first, caches=caches
        )
    frames = frames_of(config, latents, first=first)
    return encode_graph(
        config, batch=batch, frames=frames, height=height, width=width, dtype=dtype, first=first, caches=caches
    )


def _fits(graph: Graph, room: int) -> bool:
    """Whether a group stays within the budget and within 32-bit indices."""
    largest = max(o.type.numel for node in graph.nodes for o in node.outputs)
    return largest <= LARGEST and live_bytes(graph) <= room


def choose_group(
    config: VaeConfig,
    *,
    latents: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    budget_bytes: int,
    batch: int = 1,
    half: Half = "decode",
) -> int:
    """The largest group whose activations are predicted to fit.

    Args:
        latents: of the whole video, and so the largest group that makes sense.
        budget_bytes: for activations; the weights (254 MB in bfloat16 at the published size) come on top.

    Returns:
        latents a group, 1 … ``latents``; 0 if not even one fits, and the frames must be cut into tiles.
    """
    low, high = 0, latents + 1
    while high - low > 1:
        # One pass first: it needs no caches, so it may fit where a slightly smaller group does not.
        whole = high == latents + 1
        middle = latents if whole else (low + high) // 2
        if _fits(_graph(config, middle, height, width, dtype, batch, whole, not whole, half), budget_bytes):
            low = middle
        else:
            high = middle
    return low


def choose_split(
    config: VaeConfig,
    *,
    latents: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    budget_bytes: int,
    batch: int = 1,
    half: Half = "decode",
    tile: Tile | None = None,
) -> Split:
    """Whole frames in the largest groups that fit; where none fits, tiles.

    Args:
        tile: used where whole frames do not fit; ``None`` for the published size.

    Raises:
        InputError: not even one latent of one tile fits.
    """

    def group(h: int, w: int) -> int:
        return choose_group(
            config,
            latents=latents,
            height=h,
            width=w,
            dtype=dtype,
            budget_bytes=budget_bytes,
            batch=batch,
            half=half,
        )

    if whole := group(height, width):
        return Split(whole)
    tile = tile or Tile()
    Split(1, tile).require(config)
    side = (min(tile.size, height), min(tile.size, width))
    if part := group(*side):
        return Split(part, tile)
    one = _graph(config, 1, *side, dtype, batch, latents == 1, latents > 1, half)
    raise InputError(
        f"the VAE needs {live_bytes(one) / 2**20:.0f} MiB for one latent of a {side[0]}×{side[1]} tile, "
        f"but {budget_bytes / 2**20:.0f} MiB are left",
        fix="use smaller tiles, a smaller batch, or bfloat16",
    )
