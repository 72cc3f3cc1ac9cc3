"""The Helios transformer, written once against the ops: read it from ``denoise_graph`` downwards.

One graph is one forward of one pyramid stage: noisy tokens of that stage, history tokens at full resolution, text by
cross-attention. Sequence order is ``[long | mid | short | noisy]``. The graph speaks of what must be computed; that the
history embedding runs once a chunk and the text keys once a prompt follows from the rates of the inputs.

Shapes in the comments: b batch, s all tokens, n noisy tokens, c history tokens (c + n = s), l text tokens, d width,
h heads, e head size.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch

from helios.errors import InputError
from helios.graph import Builder, Graph, Rate, Value
from helios.model.config import TransformerConfig
from helios.op import accumulator
from helios.ops.attention import attention
from helios.ops.layout import concat, expand, full, narrow, pad_replicate, reshape, split_heads, unbind
from helios.ops.linear import linear
from helios.ops.norm import gated_add, layer_norm, modulate, rms_norm
from helios.ops.patch import patch_embed, timestep_embedding, unpatchify
from helios.ops.pointwise import add, cast, gelu, scale_history_keys, silu
from helios.ops.rope import rope, rope_table

__all__ = ["DenoiseShape", "FrameIndices", "HistoryShape", "denoise_graph", "frame_indices"]

KEEP_FP32 = ("time_embedder", "scale_shift_table", "norm2", "history_key_scale")
"""Weights whose names contain one of these stay float32 in a bf16 run, as published."""


@dataclasses.dataclass(frozen=True, slots=True)
class FrameIndices:
    """Time positions for RoPE, of each history group and of the noisy frames."""

    long: tuple[int, ...]
    mid: tuple[int, ...]
    short: tuple[int, ...]
    noisy: tuple[int, ...]


def frame_indices(
    sizes: tuple[int, int, int] = (16, 2, 1), frames: int = 9, *, keep_first_frame: bool = True
) -> FrameIndices:
    """Positions relative to the history window, the same for every chunk.

    Args:
        sizes: long, mid and short history frames, without the anchor frame.
        frames: noisy latent frames of a chunk.
        keep_first_frame: position 0 is the anchor, which joins the short group; otherwise the short group has one
            more frame of history instead.

    >>> frame_indices().short, frame_indices(keep_first_frame=False).short
    ((0, 19), (18, 19))
    """
    long, mid, short = sizes
    start = 1 if keep_first_frame else 0
    tail = short if keep_first_frame else short + 1
    edges = [start, start + long, start + long + mid, start + long + mid + tail]
    groups = [tuple(range(a, b)) for a, b in itertools.pairwise(edges)]
    anchor = (0,) if keep_first_frame else ()
    return FrameIndices(groups[0], groups[1], anchor + groups[2], tuple(range(edges[3], edges[3] + frames)))


@dataclasses.dataclass(frozen=True, slots=True)
class HistoryShape:
    """History at full latent resolution; height and width in latent pixels."""

    height: int
    width: int


@dataclasses.dataclass(frozen=True, slots=True)
class DenoiseShape:
    """Everything that a denoising graph is static in.

    Args:
        height, width: latent pixels of the noisy frames at this pyramid stage.
        text_tokens: length of the prompt embedding.
        indices: time positions; their number of noisy ones is the number of latent frames.
        history: ``None`` runs without history tokens.
        batch: videos that run together.
    """

    height: int
    width: int
    text_tokens: int = 512
    indices: FrameIndices = dataclasses.field(default_factory=frame_indices)
    history: HistoryShape | None = None
    batch: int = 1

    @property
    def frames(self) -> int:
        return len(self.indices.noisy)


def denoise_graph(
    config: TransformerConfig,
    shape: DenoiseShape,
    *,
    dtype: torch.dtype = torch.bfloat16,
    published: bool = False,
    name: str = "denoise",
) -> Graph:
    """The graph of one forward.

    Args:
        config: of the network.
        shape: static sizes.
        dtype: of the arithmetic; what the publication keeps in float32 is in ``accumulator(dtype)``.
        published: also compute the rows that nobody reads (the history's in the last block), as the published code
            does.
        name: of the graph.

    Inputs: ``sample`` ``[b, in_channels, t, h, w]`` and ``timestep`` ``[b]`` at rate step, ``history_long``,
    ``history_mid``, ``history_short`` ``[b, in_channels, frames, H, W]`` at rate chunk, ``text`` ``[b, l, text_dim]``
    at rate prompt, and the weights by their published names; all activations enter in ``accumulator(dtype)``.
    Output: ``velocity`` ``[b, out_channels, t, h, w]`` in ``dtype``.
    """
    _check(config, shape)
    with Builder(name) as build:
        build.output("velocity", _Transformer(config, shape, dtype, build, published).forward())
    return build.graph()


def _check(config: TransformerConfig, shape: DenoiseShape) -> None:
    _, ph, pw = config.patch_size
    if shape.height % ph or shape.width % pw:
        raise InputError(
            f"latent size {shape.height}×{shape.width} is not a multiple of the patch {ph}×{pw}",
            fix=f"use {shape.height // ph * ph or ph}×{shape.width // pw * pw or pw}",
        )


class _Transformer:
    """Records one forward into a builder."""

    def __init__(
        self, config: TransformerConfig, shape: DenoiseShape, dtype: torch.dtype, build: Builder, published: bool
    ) -> None:
        self.config, self.shape, self.dtype, self.build, self.published = config, shape, dtype, build, published
        self.wide = accumulator(dtype)
        self.width = config.num_attention_heads * config.attention_head_dim
        self.batch = shape.batch

    def weight(self, name: str, *shape: int) -> Value:
        dtype = self.wide if any(part in name for part in KEEP_FP32) else self.dtype
        return self.build.input(name, shape, dtype, Rate.WEIGHTS)

    def linear(self, x: Value, name: str, out: int) -> Value:
        return linear(x, self.weight(f"{name}.weight", out, x.shape[-1]), self.weight(f"{name}.bias", out))

    def activation(self, name: str, rate: Rate, *shape: int) -> Value:
        """A declared input, rounded to the working dtype as its first use."""
        return self.rounded(self.build.input(name, shape, self.wide, rate))

    def rounded(self, x: Value) -> Value:
        return x if x.dtype == self.dtype else cast(x, dtype=self.dtype)

    def widened(self, x: Value) -> Value:
        return x if x.dtype == self.wide else cast(x, dtype=self.wide)

    # From top to bottom.

    def forward(self) -> Value:
        cfg, shape = self.config, self.shape
        sample = self.activation(
            "sample", Rate.STEP, self.batch, cfg.in_channels, shape.frames, shape.height, shape.width
        )
        x = self.patch(sample, "patch_embedding", cfg.patch_size)  # [b, n, d]
        noisy = x.shape[1]
        table = self.table(shape.indices.noisy, shape.height // cfg.patch_size[1], shape.width // cfg.patch_size[2])
        if shape.history is not None:
            history, history_table = self.history(shape.history)
            x, table = concat([history, x], dim=1), concat([history_table, table], dim=0)
        split = x.shape[1] - noisy
        temb, rows = self.time(split)
        block_rows = [self.modulation(f"blocks.{i}.", rows) for i in range(cfg.num_layers)]
        text = self.text()
        for i in range(cfg.num_layers):
            x = self.block(f"blocks.{i}.", x, text, block_rows[i], table, split, last=i == cfg.num_layers - 1)
        return self.head(self.tail(x, noisy), temb)

    def patch(self, x: Value, name: str, kernel: tuple[int, ...]) -> Value:
        padded = (
            x
            if all(n % k == 0 for n, k in zip(x.shape[2:], kernel, strict=True))
            else pad_replicate(x, multiple=kernel)
        )
        weight = self.weight(f"{name}.weight", self.width, self.config.in_channels, *kernel)
        return patch_embed(padded, weight, self.weight(f"{name}.bias", self.width))

    def table(self, frames: tuple[int, ...], height: int, width: int, pool: tuple[int, int, int] = (1, 1, 1)) -> Value:
        cfg = self.config
        dims, theta = cfg.rope_dim, cfg.rope_theta
        made: Any = rope_table(
            frames=frames, height=height, width=width, dims=dims, theta=theta, pool=pool, dtype=self.wide
        )
        return made

    def history(self, size: HistoryShape) -> tuple[Value, Value]:
        """Tokens and RoPE table of ``[long | mid | short]``: coarser patches the further back."""
        _, ph, pw = patch = self.config.patch_size
        groups = (
            ("long", self.shape.indices.long, 4),
            ("mid", self.shape.indices.mid, 2),
            ("short", self.shape.indices.short, 1),
        )
        tokens, tables = [], []
        for name, frames, factor in groups:
            if not frames:
                continue
            latents = self.activation(
                f"history_{name}", Rate.CHUNK, self.batch, self.config.in_channels, len(frames), size.height, size.width
            )
            tokens.append(self.patch(latents, f"patch_{name}", tuple(factor * p for p in patch)))
            tables.append(self.table(frames, size.height // ph, size.width // pw, (factor, factor, factor)))
        return concat(tokens, dim=1), concat(tables, dim=0)

    def time(self, split: int) -> tuple[Value, Value]:
        """The timestep's embedding ``[b, d]`` and the modulation rows ``[b, r, 6, d]``: history has row t = 0."""
        t = self.build.input("timestep", (self.batch,), self.wide, Rate.STEP)
        temb, row = self.time_row(t)
        if not split or not self.config.zero_history_timestep:
            return temb, row
        start: Any = full(shape=(1,), value=0.0, dtype=self.wide)
        _, zero = self.time_row(start)
        zero = expand(zero, shape=row.shape) if zero.shape != row.shape else zero
        return temb, concat([zero, row], dim=1)

    def time_row(self, t: Value) -> tuple[Value, Value]:
        name = "condition_embedder"
        x = timestep_embedding(t, dim=self.config.freq_dim)
        x = self.linear(x, f"{name}.time_embedder.linear_1", self.width)
        x = self.linear(silu(x), f"{name}.time_embedder.linear_2", self.width)
        temb = self.rounded(x)
        row = self.linear(silu(temb), f"{name}.time_proj", 6 * self.width)
        return temb, self.widened(reshape(row, shape=(t.shape[0], 1, 6, self.width)))

    def text(self) -> Value:
        """Text tokens in the width of the blocks ``[b, l, d]``; the padding is attended like any token."""
        name = "condition_embedder.text_embedder"
        x = self.activation("text", Rate.PROMPT, self.batch, self.shape.text_tokens, self.config.text_dim)
        return self.linear(gelu(self.linear(x, f"{name}.linear_1", self.width)), f"{name}.linear_2", self.width)

    def modulation(self, name: str, rows: Value) -> tuple[Value, ...]:
        """shift, scale, gate of the attention, then of the feed-forward: six times ``[b, r, d]``."""
        return unbind(add(rows, self.weight(f"{name}scale_shift_table", 1, 6, self.width)), dim=2)

    def block(
        self, name: str, x: Value, text: Value, rows: tuple[Value, ...], table: Value, split: int, *, last: bool
    ) -> Value:
        noisy = x.shape[1] - split
        shift, scale, gate, ff_shift, ff_scale, ff_gate = rows
        two_rows = shift.shape[1] == 2
        h = self.adaln(x, scale, shift, split if two_rows else 0)
        if last and split and not self.published:
            # From here on nobody reads the history rows of the last block, only its keys and values.
            branch = self.self_attention(f"{name}attn1.", h, self.tail(h, noisy), table, split)
            x, split = self.tail(x, noisy), 0
            gate, ff_shift, ff_scale, ff_gate = (self.last_row(r) for r in (gate, ff_shift, ff_scale, ff_gate))
            two_rows = False
        else:
            branch = self.self_attention(f"{name}attn1.", h, h, table, split)
        x = gated_add(x, branch, gate, gate_split=split if two_rows else 0)
        x = gated_add(x, self.cross_attention(name, x if self.all_see_text else self.tail(x, noisy), text))
        h = self.adaln(x, ff_scale, ff_shift, split if two_rows else 0)
        h = gelu(self.linear(h, f"{name}ffn.net.0.proj", self.config.ffn_dim))
        h = self.linear(h, f"{name}ffn.net.2", self.width)
        return gated_add(x, h, ff_gate, gate_split=split if two_rows else 0)

    @property
    def all_see_text(self) -> bool:
        return not self.config.guidance_cross_attn

    def adaln(self, x: Value, scale: Value, shift: Value, split: int) -> Value:
        normed = layer_norm(x, eps=self.config.eps, dtype=self.wide)
        return modulate(normed, scale, shift, split=split, dtype=self.dtype)

    def self_attention(self, name: str, x: Value, queries: Value, table: Value, split: int) -> Value:
        """Every token attends to every token. ``queries`` are x, or its tail."""
        rows = queries.shape[1]
        q = self.linear(queries, f"{name}to_q", self.width)  # [b, s, d]
        k = self.linear(x, f"{name}to_k", self.width)
        v = self.linear(x, f"{name}to_v", self.width)
        q, k = self.qk_norm(q, name, "q"), self.qk_norm(k, name, "k")
        q, k = self.heads(q), self.heads(k)  # [b, s, h, e]
        q = rope(q, table if rows == x.shape[1] else narrow(table, dim=0, start=x.shape[1] - rows, length=rows))
        k = rope(k, table)
        if self.config.is_amplify_history and split:
            count = self.config.num_attention_heads if self.config.history_scale_mode == "per_head" else 1
            k = scale_history_keys(k, self.weight(f"{name}history_key_scale", count), split=split)
        return self.merge(attention(q, k, self.heads(v)), name)

    def cross_attention(self, name: str, x: Value, text: Value) -> Value:
        h = x
        if self.config.cross_attn_norm:
            weight, bias = self.weight(f"{name}norm2.weight", self.width), self.weight(f"{name}norm2.bias", self.width)
            h = layer_norm(x, weight, bias, eps=self.config.eps)
        name = f"{name}attn2."
        k = self.heads(self.qk_norm(self.linear(text, f"{name}to_k", self.width), name, "k"))  # [b, l, h, e]
        v = self.heads(self.linear(text, f"{name}to_v", self.width))
        q = self.heads(self.qk_norm(self.linear(h, f"{name}to_q", self.width), name, "q"))
        return self.merge(attention(q, k, v), name)

    def qk_norm(self, x: Value, name: str, which: str) -> Value:
        return rms_norm(x, self.weight(f"{name}norm_{which}.weight", self.width), eps=self.config.eps)

    def heads(self, x: Value) -> Value:
        return split_heads(x, heads=self.config.num_attention_heads)

    def merge(self, x: Value, name: str) -> Value:
        return self.linear(reshape(x, shape=(*x.shape[:2], self.width)), f"{name}to_out.0", self.width)

    def tail(self, x: Value, rows: int) -> Value:
        return x if x.shape[1] == rows else narrow(x, dim=1, start=x.shape[1] - rows, length=rows)

    def last_row(self, row: Value) -> Value:
        return self.tail(row, 1)

    def head(self, x: Value, temb: Value) -> Value:
        """Norm, projection and the way back to latents, of the noisy tokens ``[b, n, d]``."""
        cfg, shape = self.config, self.shape
        table = self.weight("norm_out.scale_shift_table", 1, 2, self.width)
        rows = add(reshape(self.widened(temb), shape=(self.batch, 1, self.width)), table)  # [b, 2, d]
        shift, scale = (narrow(rows, dim=1, start=i, length=1) for i in (0, 1))
        out = self.linear(self.adaln(x, scale, shift, 0), "proj_out", cfg.out_channels * _volume(cfg.patch_size))
        pt, ph, pw = cfg.patch_size
        return unpatchify(out, grid=(shape.frames // pt, shape.height // ph, shape.width // pw), patch=(pt, ph, pw))


def _volume(patch: tuple[int, ...]) -> int:
    t, h, w = patch
    return t * h * w
