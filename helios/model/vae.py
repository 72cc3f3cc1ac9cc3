"""The Wan video autoencoder, written once against the ops: read it from ``decode_graph`` and ``encode_graph`` down.

Time is causal. Every convolution over time sees two frames of the past, so a video can be computed in groups: a *first*
graph starts from nothing, and each *next* graph takes the last frames of the group before as inputs ``cache.N`` and
gives its own as outputs ``cache.N``. The group size changes memory, never the result. With temporal factor T (4) and g
latents a group, the first group holds 1 + T(g − 1) frames and every other one T·g.

Heights and widths are those of the video, in pixels. Shapes in the comments: b batch, c channels, z latent channels,
t frames, h rows, w columns.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from helios.errors import InputError
from helios.graph import Builder, Graph, Rate, Value
from helios.model.config import VaeConfig
from helios.op import accumulator
from helios.ops.attention import attention
from helios.ops.conv import (
    channel_norm,
    clamp,
    conv3d,
    denormalize_latents,
    interleave_frames,
    last_frames,
    pad_zero,
    upsample_nearest,
)
from helios.ops.layout import concat, full, narrow, permute, reshape
from helios.ops.linear import linear
from helios.ops.pointwise import add, silu

__all__ = ["decode_graph", "encode_graph", "frames_of", "latents_of"]

CACHE = "cache."
"""Prefix of the inputs and outputs that carry the past from group to group."""


def frames_of(config: VaeConfig, latents: int, *, first: bool = True) -> int:
    """Frames that a group of latents stands for; the first latent of a video is one frame.

    >>> frames_of(VaeConfig(), 9), frames_of(VaeConfig(), 9, first=False)
    (33, 36)
    """
    return config.scale_factor_temporal * (latents - 1) + 1 if first else config.scale_factor_temporal * latents


def latents_of(config: VaeConfig, frames: int, *, first: bool = True) -> int:
    """Latents that a group of frames becomes.

    Raises:
        InputError: the frames do not fill their last latent.
    """
    factor = config.scale_factor_temporal
    rest = frames - 1 if first else frames
    if frames < 1 or rest % factor:
        near = max(frames - 1, 0) // factor * factor + 1 if first else max(frames // factor, 1) * factor
        rule = f"{factor}·k + 1" if first else f"a multiple of {factor}"
        raise InputError(f"the VAE cannot take {frames} frames: their number must be {rule}", fix=f"pass {near} frames")
    return rest // factor + first


@functools.lru_cache(maxsize=64)
def decode_graph(
    config: VaeConfig,
    *,
    batch: int,
    latents: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    first: bool = True,
    caches: bool = True,
    clip: bool = True,
) -> Graph:
    """The graph that decodes one group of latents.

    Args:
        config: of the network.
        batch: videos that run together.
        latents: of this group, g.
        height, width: of the video in pixels, multiples of the spatial factor (8).
        dtype: of the arithmetic and the weights.
        first: the group starts the video; otherwise it takes ``cache.N``.
        caches: give ``cache.N`` for a group that follows.
        clip: to −1 … 1; tiles are clipped only after they are blended.

    Inputs: ``latents`` ``[b, z, g, height/8, width/8]`` as the transformer makes them (normalised), in
    ``accumulator(dtype)``; ``cache.N`` in ``dtype`` unless ``first``; weights ``decoder.*`` and ``post_quant_conv.*``.
    Outputs: ``video`` ``[b, 3, frames, height, width]`` in ``dtype``; ``cache.N`` in ``dtype``.

    Raises:
        InputError: the size is not a multiple of the spatial factor.
    """
    h, w = _latent_size(config, height, width)
    name = _name("vae_decode" if clip else "vae_decode_tile", first, caches, (batch, latents, height, width))
    with Builder(name) as build:
        x = build.input("latents", (batch, config.z_dim, latents, h, w), accumulator(dtype), Rate.STEP)
        x = denormalize_latents(x, mean=config.latents_mean, std=config.latents_std, dtype=dtype)
        net = _Decoder(config, build, dtype, first, caches)
        video = net.forward(x)
        build.output("video", clamp(video, low=-1.0, high=1.0) if clip else video)
        net.write_caches()
    return build.graph()


@functools.lru_cache(maxsize=64)
def encode_graph(
    config: VaeConfig,
    *,
    batch: int,
    frames: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    first: bool = True,
    caches: bool = True,
) -> Graph:
    """The graph that encodes one group of frames: 1 + 4m of them in a ``first`` group, 4m in any other.

    The other arguments are those of ``decode_graph``.

    Inputs: ``video`` ``[b, 3, frames, height, width]`` in ``dtype``, −1 … 1; ``cache.N`` in ``dtype`` unless ``first``;
    weights ``encoder.*`` and ``quant_conv.*``.
    Outputs: ``moments`` ``[b, 2z, g, height/8, width/8]`` in ``dtype``: means, then log-variances, not yet normalised
    (``helios.ops.conv.sample_posterior`` draws latents from them); ``cache.N`` in ``dtype``.

    Raises:
        InputError: the size is not a multiple of the spatial factor, or the frames do not fill their last latent.
    """
    _latent_size(config, height, width)
    latents_of(config, frames, first=first)
    name = _name("vae_encode", first, caches, (batch, frames, height, width))
    with Builder(name) as build:
        x = build.input("video", (batch, config.in_channels, frames, height, width), dtype, Rate.STEP)
        net = _Encoder(config, build, dtype, first, caches)
        build.output("moments", net.forward(x))
        net.write_caches()
    return build.graph()


def _latent_size(config: VaeConfig, height: int, width: int) -> tuple[int, int]:
    factor = config.scale_factor_spatial
    if min(height, width) < factor or height % factor or width % factor:
        near = [max(size // factor, 1) * factor for size in (height, width)]
        raise InputError(f"video size {height}×{width} is not a multiple of {factor}", fix=f"use {near[0]}×{near[1]}")
    return height // factor, width // factor


def _name(what: str, first: bool, caches: bool, sizes: tuple[int, ...]) -> str:
    place = ("first" if caches else "whole") if first else ("next" if caches else "last")
    return f"{what}_{place}_{'x'.join(map(str, sizes))}"


class _Causal:
    """Layers that both halves share, and the frames that they hand to the next group."""

    def __init__(self, config: VaeConfig, build: Builder, dtype: torch.dtype, first: bool, caches: bool) -> None:
        self.config, self.build, self.dtype, self.first, self.caches = config, build, dtype, first, caches
        self._past: list[Value] = []
        self._count = 0

    def weight(self, name: str, *shape: int) -> Value:
        return self.build.input(name, shape, self.dtype, Rate.WEIGHTS)

    def write_caches(self) -> None:
        """Make the kept frames outputs of the graph."""
        for number, value in enumerate(self._past):
            self.build.output(f"{CACHE}{number}", value)

    def keep(self, x: Value, count: int) -> None:
        """Hand the last frames of x to the next group, if there is one."""
        if self.caches:
            self._past.append(last_frames(x, count=count))

    def past(self, x: Value, count: int) -> Value | None:
        """The ``count`` frames before x: nothing in the first group."""
        if self.first:
            return None
        b, c, _, h, w = x.shape
        self._count += 1
        return self.build.input(f"{CACHE}{self._count - 1}", (b, c, count, h, w), self.dtype, Rate.STEP)

    def extended(self, x: Value) -> Value:
        """x with the two frames before it, zeros before the video; the last two are kept."""
        past = self.past(x, 2)
        x = pad_zero(x, before=(2, 0, 0)) if past is None else concat([past, x], dim=2)
        self.keep(x, 2)
        return x

    def causal(self, x: Value, name: str, out: int) -> Value:
        """3 × 3 × 3, causal in time."""
        return self.conv(self.extended(x), name, out, (3, 3, 3), padding=(0, 1, 1))

    def conv(
        self,
        x: Value,
        name: str,
        out: int,
        kernel: tuple[int, int, int] = (1, 1, 1),
        stride: tuple[int, int, int] = (1, 1, 1),
        padding: tuple[int, int, int] = (0, 0, 0),
    ) -> Value:
        weight = self.weight(f"{name}.weight", out, x.shape[1], *kernel)
        return conv3d(x, weight, self.weight(f"{name}.bias", out), stride=stride, padding=padding)

    def per_frame(self, x: Value, name: str, out: int, stride: int = 1, padding: int = 0) -> Value:
        """3 × 3 in each frame; published as a two-dimensional convolution."""
        c = x.shape[1]
        weight = reshape(self.weight(f"{name}.weight", out, c, 3, 3), shape=(out, c, 1, 3, 3))
        bias = self.weight(f"{name}.bias", out)
        return conv3d(x, weight, bias, stride=(1, stride, stride), padding=(0, padding, padding))

    def norm(self, x: Value, name: str, dims: int = 3) -> Value:
        c = x.shape[1]
        gamma = self.weight(f"{name}.gamma", c, *(1,) * dims)
        return channel_norm(x, reshape(gamma, shape=(c,)))

    def residual(self, x: Value, name: str, out: int) -> Value:
        """Twice norm, SiLU and causal convolution, around them a shortcut, which projects where the width changes."""
        h = self.causal(silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1", out)
        h = self.causal(silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2", out)
        shortcut = x if x.shape[1] == out else self.conv(x, f"{name}.conv_shortcut", out)
        return add(h, shortcut)

    def attention(self, x: Value, name: str) -> Value:
        """One head over the positions of each frame."""
        b, c, t, h, w = x.shape
        tokens = permute(self.norm(x, f"{name}.norm", dims=2), dims=(0, 2, 3, 4, 1))
        tokens = reshape(tokens, shape=(b * t, h * w, c))
        weight = reshape(self.weight(f"{name}.to_qkv.weight", 3 * c, c, 1, 1), shape=(3 * c, c))
        qkv = linear(tokens, weight, self.weight(f"{name}.to_qkv.bias", 3 * c))
        q, k, v = (
            reshape(narrow(qkv, dim=2, start=i * c, length=c), shape=(b * t, h * w, 1, c)) for i in range(3)
        )  # [b·t, h·w, 1, c]
        out = reshape(attention(q, k, v), shape=(b * t, h * w, c))
        weight = reshape(self.weight(f"{name}.proj.weight", c, c, 1, 1), shape=(c, c))
        out = linear(out, weight, self.weight(f"{name}.proj.bias", c))
        return add(x, permute(reshape(out, shape=(b, t, h, w, c)), dims=(0, 4, 1, 2, 3)))

    def middle(self, x: Value, name: str) -> Value:
        x = self.residual(x, f"{name}.resnets.0", x.shape[1])
        x = self.attention(x, f"{name}.attentions.0")
        return self.residual(x, f"{name}.resnets.1", x.shape[1])

    def head(self, x: Value, name: str, out: int) -> Value:
        return self.causal(silu(self.norm(x, f"{name}.norm_out")), f"{name}.conv_out", out)


class _Decoder(_Causal):
    """Latents to frames: each level but the last doubles rows and columns, and some double the frames."""

    def forward(self, x: Value) -> Value:
        cfg = self.config
        widths = [cfg.decoder_dim * m for m in reversed(cfg.dim_mult)]
        x = self.conv(x, "post_quant_conv", cfg.z_dim)
        x = self.middle(self.causal(x, "decoder.conv_in", widths[0]), "decoder.mid_block")
        for level, (width, in_time) in enumerate(zip(widths, (*reversed(cfg.temperal_downsample), None), strict=True)):
            name = f"decoder.up_blocks.{level}"
            for i in range(cfg.num_res_blocks + 1):
                x = self.residual(x, f"{name}.resnets.{i}", width)
            if in_time is not None:
                x = self.upsample(x, f"{name}.upsamplers.0", in_time)
        return self.head(x, "decoder", cfg.out_channels)

    def upsample(self, x: Value, name: str, in_time: bool) -> Value:
        width = x.shape[1]
        if in_time:
            x = self.double_frames(x, f"{name}.time_conv")
        return self.per_frame(upsample_nearest(x), f"{name}.resample.1", width // 2, padding=1)

    def double_frames(self, x: Value, name: str) -> Value:
        """Each frame becomes two. The first of the video stays one, and is not a past for those that follow."""
        if not self.first:
            return self.split_frames(x, name)
        b, c, t, h, w = x.shape
        if t == 1:
            if self.caches:
                zeros: Any = full(shape=(b, c, 2, h, w), value=0.0, dtype=self.dtype)
                self._past.append(zeros)
            return x
        rest = self.split_frames(narrow(x, dim=2, start=1, length=t - 1), name)
        return concat([narrow(x, dim=2, start=0, length=1), rest], dim=2)

    def split_frames(self, x: Value, name: str) -> Value:
        return interleave_frames(self.conv(self.extended(x), name, 2 * x.shape[1], (3, 1, 1)))


class _Encoder(_Causal):
    """Frames to the moments of their latents: the decoder's way back, two residual blocks a level instead of three."""

    def forward(self, x: Value) -> Value:
        cfg = self.config
        widths = [cfg.base_dim * m for m in cfg.dim_mult]
        x = self.causal(x, "encoder.conv_in", cfg.base_dim)
        block = 0
        for width, in_time in zip(widths, (*cfg.temperal_downsample, None), strict=True):
            for _ in range(cfg.num_res_blocks):
                x = self.residual(x, f"encoder.down_blocks.{block}", width)
                block += 1
            if in_time is not None:
                x = self.downsample(x, f"encoder.down_blocks.{block}", in_time)
                block += 1
        x = self.head(self.middle(x, "encoder.mid_block"), "encoder", 2 * cfg.z_dim)
        return self.conv(x, "quant_conv", 2 * cfg.z_dim)

    def downsample(self, x: Value, name: str, in_time: bool) -> Value:
        x = self.per_frame(pad_zero(x, after=(0, 1, 1)), f"{name}.resample.1", x.shape[1], stride=2)
        return self.halve_frames(x, f"{name}.time_conv") if in_time else x

    def halve_frames(self, x: Value, name: str) -> Value:
        """Pairs of frames become one, seen with the frame before them. The first of the video stays as it is."""
        self.keep(x, 1)
        past = self.past(x, 1)
        head = None
        if past is None:
            if x.shape[2] == 1:
                return x
            head = narrow(x, dim=2, start=0, length=1)
        else:
            x = concat([past, x], dim=2)
        x = self.conv(x, name, x.shape[1], (3, 1, 1), stride=(2, 1, 1))
        return x if head is None else concat([head, x], dim=2)
