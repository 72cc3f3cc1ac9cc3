"""Names and shapes of every tensor of the two networks, as the published state dicts have them.

A shape is a function of the config alone, so a checkpoint can be checked before a byte of it is read, and 14B of
weights can be counted without any.
"""

from __future__ import annotations

import math

from helios.model.config import TransformerConfig, VaeConfig

__all__ = ["TRANSFORMER_UNUSED", "keeps_float32", "transformer_shapes", "vae_shapes"]

Shapes = dict[str, tuple[int, ...]]

# Tensors that a checkpoint may hold and no forward reads: projections of image embeddings, which Helios never feeds.
TRANSFORMER_UNUSED = ("norm_added_q", "norm_added_k", "add_k_proj", "add_v_proj")

_FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "history_key_scale")


def keeps_float32(name: str) -> bool:
    """Whether this transformer tensor stays in float32 when the network runs in 16 bits."""
    return any(part in _FLOAT32 for part in name.split("."))


def transformer_shapes(config: TransformerConfig) -> Shapes:
    """Names and shapes of the transformer's state dict: 1101 tensors at the published size."""
    width, patch = config.inner_dim, config.patch_size
    shapes = _conv("patch_embedding", config.in_channels, width, patch)
    if config.has_multi_term_memory_patch:
        for name, factor in (("short", 1), ("mid", 2), ("long", 4)):
            shapes |= _conv(f"patch_{name}", config.in_channels, width, tuple(factor * p for p in patch))
    shapes |= _condition_embedder(config)
    for layer in range(config.num_layers):
        shapes |= _block(f"blocks.{layer}", config)
    shapes["norm_out.scale_shift_table"] = (1, 2, width)
    return shapes | _linear("proj_out", width, config.out_channels * math.prod(patch))


def _condition_embedder(config: TransformerConfig) -> Shapes:
    width, name = config.inner_dim, "condition_embedder"
    return (
        _linear(f"{name}.time_embedder.linear_1", config.freq_dim, width)
        | _linear(f"{name}.time_embedder.linear_2", width, width)
        | _linear(f"{name}.time_proj", width, 6 * width)
        | _linear(f"{name}.text_embedder.linear_1", config.text_dim, width)
        | _linear(f"{name}.text_embedder.linear_2", width, width)
    )


def _block(name: str, config: TransformerConfig) -> Shapes:
    width = config.inner_dim
    shapes: Shapes = {f"{name}.scale_shift_table": (1, 6, width)}
    for attention in ("attn1", "attn2"):
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= _linear(f"{name}.{attention}.{projection}", width, width)
        shapes |= {f"{name}.{attention}.norm_{x}.weight": (width,) for x in "qk"}
    if config.is_amplify_history:
        scales = config.num_attention_heads if config.history_scale_mode == "per_head" else 1
        shapes[f"{name}.attn1.history_key_scale"] = (scales,)
    if config.cross_attn_norm:
        shapes |= {f"{name}.norm2.weight": (width,), f"{name}.norm2.bias": (width,)}
    shapes |= _linear(f"{name}.ffn.net.0.proj", width, config.ffn_dim)
    return shapes | _linear(f"{name}.ffn.net.2", config.ffn_dim, width)


def vae_shapes(config: VaeConfig) -> Shapes:
    """Names and shapes of the autoencoder's state dict: 126.9M parameters at the published size."""
    z = config.z_dim
    return (
        _encoder("encoder", config)
        | _conv("quant_conv", 2 * z, 2 * z, (1, 1, 1))
        | _conv("post_quant_conv", z, z, (1, 1, 1))
        | _decoder("decoder", config)
    )


def _encoder(name: str, config: VaeConfig) -> Shapes:
    """The blocks of all levels stand in one flat list: residual blocks, then a resampler, level by level."""
    widths = [config.base_dim * m for m in (1, *config.dim_mult)]
    shapes = _conv(f"{name}.conv_in", config.in_channels, widths[0], (3, 3, 3))
    index, width = 0, widths[0]
    for level, out in enumerate(widths[1:]):
        for _ in range(config.num_res_blocks):
            shapes |= _residual(f"{name}.down_blocks.{index}", width, out)
            index, width = index + 1, out
        if level < len(config.temperal_downsample):
            shapes |= _conv(f"{name}.down_blocks.{index}.resample.1", width, width, (3, 3))
            if config.temperal_downsample[level]:
                shapes |= _conv(f"{name}.down_blocks.{index}.time_conv", width, width, (3, 1, 1))
            index += 1
    return shapes | _middle(f"{name}.mid_block", width) | _head(name, width, 2 * config.z_dim)


def _decoder(name: str, config: VaeConfig) -> Shapes:
    """The encoder's mirror, except that a resampler also halves the width."""
    widths = [config.decoder_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    upsample = tuple(reversed(config.temperal_downsample))
    shapes = _conv(f"{name}.conv_in", config.z_dim, widths[0], (3, 3, 3)) | _middle(f"{name}.mid_block", widths[0])
    for level, out in enumerate(widths[1:]):
        block, width = f"{name}.up_blocks.{level}", widths[level] // 2 if level else widths[level]
        for index in range(config.num_res_blocks + 1):
            shapes |= _residual(f"{block}.resnets.{index}", width, out)
            width = out
        if level < len(upsample):
            shapes |= _conv(f"{block}.upsamplers.0.resample.1", out, out // 2, (3, 3))
            if upsample[level]:
                shapes |= _conv(f"{block}.upsamplers.0.time_conv", out, 2 * out, (3, 1, 1))
    return shapes | _head(name, widths[-1], config.out_channels)


def _middle(name: str, width: int) -> Shapes:
    attention = f"{name}.attentions.0"
    return (
        _residual(f"{name}.resnets.0", width, width)
        | {f"{attention}.norm.gamma": (width, 1, 1)}
        | _conv(f"{attention}.to_qkv", width, 3 * width, (1, 1))
        | _conv(f"{attention}.proj", width, width, (1, 1))
        | _residual(f"{name}.resnets.1", width, width)
    )


def _head(name: str, width: int, out: int) -> Shapes:
    return {f"{name}.norm_out.gamma": (width, 1, 1, 1)} | _conv(f"{name}.conv_out", width, out, (3, 3, 3))


def _residual(name: str, width: int, out: int) -> Shapes:
    shapes = (
        {f"{name}.norm1.gamma": (width, 1, 1, 1)}
        | _conv(f"{name}.conv1", width, out, (3, 3, 3))
        | {f"{name}.norm2.gamma": (out, 1, 1, 1)}
        | _conv(f"{name}.conv2", out, out, (3, 3, 3))
    )
    return shapes if width == out else shapes | _conv(f"{name}.conv_shortcut", width, out, (1, 1, 1))


def _linear(name: str, width: int, out: int) -> Shapes:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def _conv(name: str, width: int, out: int, kernel: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": (out, width, *kernel), f"{name}.bias": (out,)}
