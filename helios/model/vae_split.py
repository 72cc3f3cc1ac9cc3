"""How a video is cut for the VAE: latents a group, and overlapping tiles where even one latent is too much.

Groups are exact. Tiles are not: each is computed as if its border were the border of the video, and neighbours are
blended linearly over their overlap, with the published geometry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch

from helios.errors import InputError
from helios.graph import Graph, Node, Value
from helios.model.config import VaeConfig
from helios.model.vae import decode_graph, encode_graph, frames_of
from helios.op import accumulator, get

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

    Rounding ops in a narrow dtype are charged two temporaries in the accumulator dtype, as the op bodies have them.
    What a library allocates inside one op (a convolution's workspace, a packed copy) is not in it.
    """
    root = _roots(graph)
    last = _last_uses(graph, root)
    held = {v.name: v.type.nbytes for v in graph.inputs if v.rate}
    live = peak = sum(held.values())
    for number, node in enumerate(graph.nodes):
        fresh = 0 if node.op in _VIEWS or not any(v.rate for v in node.values) else sum(o.type.nbytes for o in node.outputs)
        live += fresh
        peak = max(peak, live + (_workspace(node) if fresh else 0))
        for name, size in last.get(number, {}).items():
            live -= 0 if name in held else size
    return peak


def _roots(graph: Graph) -> dict[str, Value]:
    """The value whose memory each value lies in."""
    root: dict[str, Value] = {v.name: v for v in graph.inputs}
    for node in graph.nodes:
        base = root[node.values[0].name] if node.op in _VIEWS else None
        root |= {out.name: base or out for out in node.outputs}
    return root


def _last_uses(graph: Graph, root: dict[str, Value]) -> dict[int, dict[str, int]]:
    """For each node, what dies after it: name and bytes."""
    uses = {root[v.name].name: number for number, node in enumerate(graph.nodes) for v in (*node.values, *node.outputs)}
    for _, value in graph.outputs:
        uses[root[value.name].name] = len(graph.nodes)
    sizes = {v.name: v.type.nbytes if v.rate else 0 for v in root.values()}
    dying: dict[int, dict[str, int]] = {}
    for name, number in uses.items():
        dying.setdefault(number, {})[name] = sizes[name]
    return dying


def _workspace(node: Node) -> int:
    out = node.outputs[0].type
    wide = accumulator(out.dtype)
    exact = get(node.op).kind == "move" or node.op in ("conv3d", "linear", "attention", "add")
    return 0 if exact or wide == out.dtype else 2 * out.numel * wide.itemsize


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


def _fits(
    config: VaeConfig, group: int, latents: int, height: int, width: int, dtype: torch.dtype, batch: int, half: Half, room: int
) -> bool:
    """Whether groups of that many latents stay within the budget and within 32-bit indices."""
    one_pass = group >= latents
    graph = _graph(config, min(group, latents), height, width, dtype, batch, one_pass, not one_pass, half)
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
        middle = latents if high == latents + 1 else (low + high) // 2
        if _fits(config, middle, latents, height, width, dtype, batch, half, budget_bytes):
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
    need = peak_bytes(config, latents=1, height=side[0], width=side[1], dtype=dtype, batch=batch, first=False, half=half)
    raise InputError(
        f"the VAE needs {need / 2**20:.0f} MiB for one latent of a {side[0]}×{side[1]} tile, "
        f"but {budget_bytes / 2**20:.0f} MiB are left",
        fix="use smaller tiles, a smaller batch, or bfloat16",
    )
