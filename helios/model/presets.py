"""The named sizes and variants: what ``--size`` and ``--variant`` mean where no checkpoint says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from helios.errors import InputError, unknown_name
from helios.model.config import PipelineConfig, SchedulerConfig, TextConfig, TransformerConfig, VaeConfig

__all__ = ["SIZES", "VARIANTS", "Size", "Variant", "size", "variant"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Size:
    """The three networks of one size."""

    name: str
    transformer: TransformerConfig
    vae: VaeConfig
    text: TextConfig


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the three published ways to sample, with the settings of its published example.

    Attributes:
        steps: solver steps of each pyramid stage; one number where there is no pyramid.
        guidance: scale of classifier-free guidance; 1 evaluates the conditional branch alone.
        frames: length of the published example, in frames.
        zero_init: the first steps move by zero (part of CFG-Zero*).
        amplify_first_chunk: the first chunk takes twice the steps.
    """

    name: str
    pipeline: PipelineConfig
    scheduler: SchedulerConfig
    steps: tuple[int, ...]
    guidance: float
    frames: int
    zero_init: bool = False
    amplify_first_chunk: bool = False


SIZES = {
    # Small enough for a test that runs in milliseconds; every code path of the published size is in it.
    "tiny": Size(
        "tiny",
        TransformerConfig(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_dim=(4, 4, 4),
        ),
        VaeConfig(base_dim=3, dim_mult=(1, 1, 1, 1), num_res_blocks=1),
        TextConfig(
            vocab_size=512,
            d_model=32,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
        ),
    ),
    # Real head size, real RoPE split and the real shape of every kernel; a tenth of the width.
    "mini": Size(
        "mini",
        TransformerConfig(num_attention_heads=12, text_dim=512, ffn_dim=8960, num_layers=4),
        VaeConfig(base_dim=16),
        TextConfig(vocab_size=512, d_model=512, d_ff=1024, num_layers=2, num_heads=8),
    ),
    "14b": Size("14b", TransformerConfig(), VaeConfig(), TextConfig()),
}

VARIANTS = {
    "base": Variant(
        "base",
        PipelineConfig(),
        SchedulerConfig(stages=1, stage_range=(0.0, 1.0), use_dynamic_shifting=True),
        steps=(50,),
        guidance=5.0,
        frames=99,
    ),
    "mid": Variant(
        "mid",
        PipelineConfig("HeliosPyramidPipeline", is_cfg_zero_star=True),
        SchedulerConfig(use_dynamic_shifting=True),
        steps=(20, 20, 20),
        guidance=5.0,
        frames=99,
        zero_init=True,
    ),
    "distilled": Variant(
        "distilled",
        PipelineConfig("HeliosPyramidPipeline", is_distilled=True),
        SchedulerConfig("HeliosDMDScheduler", use_dynamic_shifting=True, time_shift_type="linear"),
        steps=(2, 2, 2),
        guidance=1.0,
        frames=240,
        amplify_first_chunk=True,
    ),
}


def size(name: str) -> Size:
    """The size of that name.

    Raises:
        InputError: no such size; names the nearest.
    """
    return _find("size", name, SIZES)


def variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        InputError: no such variant; names the nearest.
    """
    return _find("variant", name, VARIANTS)


def _find(kind: str, name: str, table: dict[str, T]) -> T:
    if name not in table:
        raise InputError(unknown_name(kind, name, table), f"use --{kind} with one of {', '.join(sorted(table))}")
    return table[name]
