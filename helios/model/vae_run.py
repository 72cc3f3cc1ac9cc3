"""Running the VAE over whole videos: group after group, tile after tile, on any executor of graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from helios.errors import BackendError, InputError
from helios.graph import Graph
from helios.model.config import VaeConfig
from helios.model.vae import CACHE, decode_graph, encode_graph, frames_of, latents_of
from helios.model.vae_split import Split
from helios.op import accumulator
from helios.ops.conv import sample_posterior

__all__ = ["Run", "VaeRunner", "decode_graphs", "encode_graphs"]

Run: TypeAlias = Callable[[Graph, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Runs a graph on its step-rate inputs and gives its outputs; the weights are the executor's affair.

With a program over a plan: ``lambda graph, inputs: program.run(graph.name, context, inputs)``.
"""


def decode_graphs(
    config: VaeConfig, *, batch: int, latents: int, height: int, width: int, dtype: torch.dtype, split: Split
) -> dict[str, Graph]:
    """Every graph, by name, that a ``VaeRunner`` needs to decode videos of that size: input for a plan.

    Args:
        latents: of the whole video.
        height, width: in pixels.
    """
    sizes = _tile_sizes(config, height, width, split)
    clip = split.tiled(height, width) is None
    graphs = [
        decode_graph(
            config, batch=batch, latents=n, height=h, width=w, dtype=dtype, first=first, caches=caches, clip=clip
        )
        for h, w in sizes
        for n, first, caches in _group_kinds(latents, split)
    ]
    return {graph.name: graph for graph in graphs}


def encode_graphs(
    config: VaeConfig, *, batch: int, frames: int, height: int, width: int, dtype: torch.dtype, split: Split
) -> dict[str, Graph]:
    """Every graph, by name, that a ``VaeRunner`` needs to encode videos of that size.

    Raises:
        InputError: the frames do not fill their last latent.
    """
    sizes = _tile_sizes(config, height, width, split)
    graphs = [
        encode_graph(
            config,
            batch=batch,
            frames=frames_of(config, n, first=first),
            height=h,
            width=w,
            dtype=dtype,
            first=first,
            caches=caches,
        )
        for h, w in sizes
        for n, first, caches in _group_kinds(latents_of(config, frames), split)
    ]
    return {graph.name: graph for graph in graphs}


def _group_kinds(latents: int, split: Split) -> list[tuple[int, bool, bool]]:
    """Latents, first, caches of each group. One pass needs no caches; a last group of full size keeps them all the
    same, so that it is the graph of the groups before it."""
    kinds = []
    for start, stop in split.groups(latents):
        short = stop - start < split.group
        kinds.append((stop - start, start == 0, stop < latents or (start > 0 and not short)))
    return kinds


def _tile_sizes(config: VaeConfig, height: int, width: int, split: Split) -> list[tuple[int, int]]:
    split.require(config)
    tile = split.tiled(height, width)
    if tile is None:
        return [(height, width)]
    rows, columns = ([stop - start for start, stop in tile.spans(side, 1)] for side in (height, width))
    return list(dict.fromkeys((h, w) for h in rows for w in columns))


class VaeRunner:
    """Decodes and encodes videos of any length with graphs of fixed size.

    Args:
        config: of the network.
        run: the executor.
        dtype: of the graphs.
        split: latents a group, and tiles.
    """

    def __init__(self, config: VaeConfig, run: Run, *, dtype: torch.dtype, split: Split) -> None:
        split.require(config)
        self.config, self.run, self.dtype, self.split = config, run, dtype, split

    def decode(self, latents: Tensor) -> Tensor:
        """Frames of normalised latents.

        Args:
            latents: ``[b, z, t, h, w]`` as the transformer makes them.

        Returns:
            ``[b, 3, 4(t − 1) + 1, 8h, 8w]`` in the runner's dtype, within −1 … 1, where the executor left it.

        Raises:
            InputError: another number of dimensions or channels.
        """
        self._require("latents", latents, self.config.z_dim)
        factor = self.config.scale_factor_spatial
        height, width = (side * factor for side in latents.shape[3:])
        frames = frames_of(self.config, latents.shape[2])
        tile = self.split.tiled(height, width)
        if tile is None:
            return _join(self.decode_groups(latents), frames)

        def part(top: int, bottom: int, left: int, right: int) -> Tensor:
            return _join(self.decode_groups(latents[..., top:bottom, left:right], clip=False), frames)

        spans = [tile.spans(side, factor) for side in (height, width)]
        return _blend(part, spans, tile.size, tile.stride, (height, width)).clamp_(-1.0, 1.0)

    def decode_groups(self, latents: Tensor, *, clip: bool = True) -> Iterator[Tensor]:
        """Frames ``[b, 3, frames of the group, 8h, 8w]`` group after group, as soon as each is there; never tiled."""
        b, _, total, h, w = latents.shape
        factor = self.config.scale_factor_spatial
        caches: dict[str, Tensor] = {}
        edges = self.split.groups(total)
        for (start, stop), (n, first, keep) in zip(edges, _group_kinds(total, self.split), strict=True):
            graph = decode_graph(
                self.config,
                batch=b,
                latents=n,
                height=h * factor,
                width=w * factor,
                dtype=self.dtype,
                first=first,
                caches=keep,
                clip=clip,
            )
            piece = latents[:, :, start:stop].to(accumulator(self.dtype))
            out = self.run(graph, {"latents": piece, **caches})
            caches = _caches(out)
            yield out["video"]

    def encode(self, video: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised latents of a video: a draw from the posterior, or its mode.

        Args:
            video: ``[b, 3, 4m + 1, height, width]``, −1 … 1.
            noise: standard normal ``[b, z, m + 1, height/8, width/8]``; without it the mode.
                The published pipelines draw.

        Returns:
            ``[b, z, m + 1, height/8, width/8]`` in ``accumulator(dtype)``.

        Raises:
            InputError: another number of channels or frames, or a size that is not a multiple of 8.
        """
        wide = self.moments(video).to(accumulator(self.dtype))
        at = noise if noise is None else noise.to(device=wide.device)
        return sample_posterior(wide, at, mean=self.config.latents_mean, std=self.config.latents_std)

    def moments(self, video: Tensor) -> Tensor:
        """Means and log-variances ``[b, 2z, m + 1, height/8, width/8]`` of a video, not normalised."""
        self._require("video", video, self.config.in_channels)
        latents = latents_of(self.config, video.shape[2])
        height, width = video.shape[3:]
        factor = self.config.scale_factor_spatial
        tile = self.split.tiled(height, width)
        if tile is None:
            return _join(self._encode_groups(video), latents)

        def part(top: int, bottom: int, left: int, right: int) -> Tensor:
            rows, columns = slice(top * factor, bottom * factor), slice(left * factor, right * factor)
            return _join(self._encode_groups(video[..., rows, columns]), latents)

        spans = [tile.spans(side, factor) for side in (height, width)]
        return _blend(part, spans, tile.size // factor, tile.stride // factor, (height // factor, width // factor))

    def _encode_groups(self, video: Tensor) -> Iterator[Tensor]:
        b, _, frames, height, width = video.shape
        caches: dict[str, Tensor] = {}
        start = 0
        for n, first, keep in _group_kinds(latents_of(self.config, frames), self.split):
            count = frames_of(self.config, n, first=first)
            graph = encode_graph(
                self.config,
                batch=b,
                frames=count,
                height=height,
                width=width,
                dtype=self.dtype,
                first=first,
                caches=keep,
            )
            piece = video[:, :, start : start + count].to(self.dtype)
            out = self.run(graph, {"video": piece, **caches})
            caches = _caches(out)
            start += count
            yield out["moments"]

    def _require(self, what: str, x: Tensor, channels: int) -> None:
        if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
            raise InputError(f"{what} {list(x.shape)}: wanted [batch, {channels}, time, height, width], none of them 0")


def _caches(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in outputs.items() if name.startswith(CACHE)}


def _join(pieces: Iterator[Tensor], length: int) -> Tensor:
    """Pieces along time, written one by one into their place, so that they never exist twice together."""
    first = next(pieces)
    if first.shape[2] == length:
        return first
    whole = first.new_empty((*first.shape[:2], length, *first.shape[3:]))
    at = first.shape[2]
    whole[:, :, :at] = first
    for piece in pieces:
        whole[:, :, at : at + piece.shape[2]] = piece[:, :, : length - at]
        at += piece.shape[2]
    if at != length:
        why = f"the VAE's groups gave {at} frames in all, wanted {length}"
        raise BackendError(why, "`helios certify --backend NAME --filter 'vae'` shows which group")
    return whole


def _blend(
    part: Callable[[int, int, int, int], Tensor],
    spans: list[list[tuple[int, int]]],
    size: int,
    stride: int,
    shape: tuple[int, int],
) -> Tensor:
    """Tiles blended linearly into their neighbours above and to the left, over the ``size − stride`` that they share.

    Args:
        part: computes the tile of rows and columns (top, bottom, left, right), in latent pixels.
        spans: start and stop of the tiles along rows and columns, in latent pixels.
        size, stride: of the tiles, in pixels of the result.
        shape: rows and columns of the result.
    """
    overlap = size - stride
    whole: Tensor | None = None
    above: list[Tensor] = []
    for i, (top, bottom) in enumerate(spans[0]):
        row: list[Tensor] = []
        for j, (left, right) in enumerate(spans[1]):
            tile = part(top, bottom, left, right).clone()
            if above:
                _ramp(above[j], tile, 3, overlap)
            if row:
                _ramp(row[-1], tile, 4, overlap)
            row.append(tile)
            if whole is None:
                whole = tile.new_empty((*tile.shape[:3], *shape))
            kept = tile[..., :stride, :stride]
            y, x = i * stride, j * stride
            whole[..., y : y + kept.shape[3], x : x + kept.shape[4]] = kept
        above = row
    assert whole is not None
    return whole


def _ramp(before: Tensor, tile: Tensor, dim: int, overlap: int) -> None:
    """Let the first rows (or columns) of ``tile`` grow out of the last ones of ``before``, in place."""
    n = min(before.shape[dim], tile.shape[dim], overlap)
    if n == 0:
        return
    weight = (torch.arange(n, dtype=accumulator(tile.dtype), device=tile.device) / n).view(-1, *(1,) * (4 - dim))
    old = before.narrow(dim, before.shape[dim] - n, n)
    new = tile.narrow(dim, 0, n)
    new.copy_(old * (1 - weight) + new * weight)
