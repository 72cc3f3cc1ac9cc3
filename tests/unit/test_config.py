"""Configs: what reads back, and what is refused with file and field named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helios.errors import CheckpointError, InputError
from helios.model import presets
from helios.model.config import PipelineConfig, SchedulerConfig, TextConfig, TransformerConfig, VaeConfig
from helios.model.fields import load_json

WHERE = "folder/config.json"


@pytest.mark.parametrize("name", sorted(presets.SIZES))
def test_every_size_reads_back_from_its_published_form(name: str) -> None:
    networks = presets.size(name)
    through_json = json.loads(json.dumps([networks.transformer.to_dict(), networks.vae.to_dict()]))
    assert TransformerConfig.from_dict(through_json[0], WHERE) == networks.transformer
    assert VaeConfig.from_dict(through_json[1], WHERE) == networks.vae


@pytest.mark.parametrize("name", sorted(presets.VARIANTS))
def test_every_variant_reads_back_and_is_recognised(name: str) -> None:
    variant = presets.variant(name)
    scheduler = SchedulerConfig.from_dict(json.loads(json.dumps(variant.scheduler.to_dict())), WHERE)
    pipeline = PipelineConfig.from_dict(variant.pipeline.to_dict() | {"vae": ["diffusers", "AutoencoderKLWan"]}, WHERE)
    assert (scheduler, pipeline) == (variant.scheduler, variant.pipeline)
    assert pipeline.variant(scheduler) == name
    assert len(variant.steps) == scheduler.stages


def test_defaults_are_the_published_release() -> None:
    config = TransformerConfig.from_dict({"_class_name": "HeliosTransformer3DModel"}, WHERE)
    assert config.inner_dim == 5120
    assert (config.num_layers, config.ffn_dim, config.rope_dim) == (40, 13824, (44, 42, 42))
    assert (config.guidance_cross_attn, config.zero_history_timestep, config.is_amplify_history) == (True, True, False)


def test_fields_of_the_training_code_are_ignored_where_they_change_nothing() -> None:
    extra = {"restrict_self_attn": False, "restrict_lora": False, "is_use_gan": True, "gan_hooks": [5, 15]}
    assert TransformerConfig.from_dict(extra, WHERE) == TransformerConfig()
    with pytest.raises(CheckpointError, match="restrict_self_attn"):
        TransformerConfig.from_dict({"restrict_self_attn": True}, WHERE)


def test_null_out_channels_means_as_many_as_come_in() -> None:
    assert TransformerConfig.from_dict({"in_channels": 4, "out_channels": None}, WHERE).out_channels == 4


def test_the_time_shift_of_a_scheduler_without_one_is_its_class_default() -> None:
    assert SchedulerConfig.from_dict({"_class_name": "HeliosDMDScheduler"}, WHERE).time_shift_type == "linear"
    assert SchedulerConfig.from_dict({"_class_name": "HeliosScheduler"}, WHERE).time_shift_type == "exponential"
    assert SchedulerConfig.from_dict({"_class_name": "HeliosDMDScheduler"}, WHERE).solver == "dmd"
    assert SchedulerConfig.from_dict({"scheduler_type": "euler"}, WHERE).solver == "euler"


def test_a_changed_sequence_shift_survives_the_round_trip() -> None:
    config = SchedulerConfig.from_dict({"_class_name": "HeliosDMDScheduler", "max_shift": 1.3}, WHERE)
    assert SchedulerConfig.from_dict(config.to_dict(), WHERE) == config
    assert config.max_shift == 1.3


def test_the_text_encoder_config_keeps_the_sizes_and_leaves_the_rest_to_transformers() -> None:
    assert TextConfig.from_dict({"d_model": 32, "dropout_rate": 0.1, "model_type": "umt5"}, WHERE).d_model == 32
    with pytest.raises(CheckpointError, match="d_model"):
        TextConfig.from_dict({"hidden_size": 32}, WHERE)


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown field": (TransformerConfig, {"num_layer": 3}, "unknown field 'num_layer': did you mean 'num_layers'"),
    "text for a number": (TransformerConfig, {"num_layers": "40"}, "'num_layers' is '40', wanted a whole number"),
    "bool for a number": (TransformerConfig, {"num_layers": True}, "'num_layers' is True"),
    "fraction of a layer": (TransformerConfig, {"num_layers": 1.5}, "'num_layers' is 1.5"),
    "number for a bool": (TransformerConfig, {"cross_attn_norm": 1}, "wanted true or false"),
    "null for a number": (TransformerConfig, {"ffn_dim": None}, "'ffn_dim' is None"),
    "short list": (TransformerConfig, {"rope_dim": [64, 64]}, "wanted a list of 3"),
    "text in a list": (TransformerConfig, {"patch_size": [1, 2, "2"]}, "wanted a list of 3"),
    "no layers": (TransformerConfig, {"num_layers": 0}, "num_layers is 0"),
    "negative heads": (TransformerConfig, {"num_attention_heads": -1}, "num_attention_heads is -1"),
    "eps zero": (TransformerConfig, {"eps": 0}, r"eps is 0\.0"),
    "eps infinite": (TransformerConfig, {"eps": float("inf")}, "eps is inf"),
    "patch zero": (TransformerConfig, {"patch_size": [1, 0, 2]}, "patch_size"),
    "odd rope": (TransformerConfig, {"rope_dim": [43, 43, 42]}, "even"),
    "rope sum": (TransformerConfig, {"rope_dim": [44, 42, 40]}, "sums to 126, wanted attention_head_dim = 128"),
    "odd freq_dim": (TransformerConfig, {"freq_dim": 255}, "freq_dim"),
    "other qk_norm": (TransformerConfig, {"qk_norm": "rms_norm_across_head"}, "did you mean 'rms_norm_across_heads'"),
    "other scale mode": (TransformerConfig, {"history_scale_mode": "per_hed"}, "did you mean 'per_head'"),
    "vae levels": (VaeConfig, {"temperal_downsample": [True, True]}, "temperal_downsample has 2 values, wanted 3"),
    "vae scale": (VaeConfig, {"scale_factor_spatial": 16}, "scale_factor_spatial"),
    "vae statistics": (VaeConfig, {"latents_mean": [0.0] * 15}, "latents_mean has 15 values"),
    "vae std": (VaeConfig, {"latents_std": [0.0] * 16}, "latents_std"),
    "vae std NaN": (VaeConfig, {"latents_std": [float("nan")] * 16}, "latents_std"),
    "vae of another model": (VaeConfig, {"is_residual": True}, "is_residual"),
    "vae with attention scales": (VaeConfig, {"attn_scales": [0.5]}, "attn_scales"),
    "vae empty dim_mult": (VaeConfig, {"dim_mult": []}, "dim_mult"),
    "scheduler class": (SchedulerConfig, {"_class_name": "EulerScheduler"}, "class_name"),
    "scheduler type": (SchedulerConfig, {"scheduler_type": "unipcc"}, "did you mean 'unipc'"),
    "scheduler shift type": (SchedulerConfig, {"time_shift_type": "lineal"}, "did you mean 'linear'"),
    "scheduler stages": (SchedulerConfig, {"stages": 2}, "stage_range"),
    "scheduler range order": (SchedulerConfig, {"stage_range": [0, 0.7, 0.3, 1]}, "growing"),
    "scheduler gamma": (SchedulerConfig, {"gamma": 0}, "gamma"),
    "scheduler prediction": (SchedulerConfig, {"prediction_type": "epsilon"}, "prediction_type"),
    "scheduler order": (SchedulerConfig, {"solver_order": 3}, "solver_order"),
    "scheduler sequence": (SchedulerConfig, {"max_image_seq_len": 256}, "base_image_seq_len"),
    "pipeline class": (PipelineConfig, {"_class_name": "WanPipeline"}, "class_name"),
    "pipeline without class": (PipelineConfig, {}, "class_name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused_with_file_and_field(case: str) -> None:
    cls, data, message = BAD[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        cls.from_dict(data, WHERE)
    assert caught.value.why.startswith(f"{WHERE}: ")
    assert caught.value.fix


def test_a_config_made_in_code_is_checked_too() -> None:
    with pytest.raises(CheckpointError, match="rope_dim"):
        TransformerConfig(attention_head_dim=64)


def test_unknown_size_and_variant_name_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown size 'minni': did you mean 'mini'"):
        presets.size("minni")
    with pytest.raises(InputError, match="unknown variant 'distiled': did you mean 'distilled'"):
        presets.variant("distiled")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing"), (b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[1]", "holds a list")],
)
def test_json_that_is_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_json(path)
