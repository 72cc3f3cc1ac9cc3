"""What a checkpoint says about itself: the fields of the published config files, their defaults and their sense.

Field names are those of the published folders (``transformer/config.json``, ``vae/config.json``,
``scheduler/scheduler_config.json``, ``model_index.json``), so that a file reads as the dataclass and back. Defaults are
the 14B release. A config that exists makes sense: each class checks its values when it is made.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios.errors import unknown_name
from helios.model.fields import plain, read, require

__all__ = ["PipelineConfig", "SchedulerConfig", "TextConfig", "TransformerConfig", "VaeConfig"]

# Fields that the training code writes beside the network's own. They shape no tensor and no result of a forward.
_TRAINING_ONLY = ("restrict_lora", "restrict_lora_rank", "gan_cond_map_dim", "gan_hooks")


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """The video transformer: ``transformer/config.json``."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    added_kv_proj_dim: int | None = None
    rope_dim: tuple[int, int, int] = (44, 42, 42)
    rope_theta: float = 10000.0
    guidance_cross_attn: bool = True
    zero_history_timestep: bool = True
    has_multi_term_memory_patch: bool = True
    is_amplify_history: bool = False
    history_scale_mode: str = "per_head"

    @property
    def inner_dim(self) -> int:
        """Width of the residual stream: heads × head size."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str | Path) -> TransformerConfig:
        """Read the published JSON form; :class:`CheckpointError` names file and field."""
        require(
            not data.get("restrict_self_attn", False),
            f"{where}: field 'restrict_self_attn' is true: history that sees only itself is another network",
            "use a released checkpoint; they all have it false",
        )
        # null means "as many as come in", in the published class
        filled = dict(data) | ({"out_channels": data.get("in_channels", 16)} if not data.get("out_channels", 1) else {})
        return read(cls, filled, where, ignore=_is_training_only)

    def to_dict(self) -> dict[str, Any]:
        """The published JSON form."""
        return {"_class_name": "HeliosTransformer3DModel"} | plain(self)

    def __post_init__(self) -> None:
        _require_positive(self, "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim")
        _require_positive(self, "freq_dim", "ffn_dim", "num_layers", "eps", "rope_theta")
        _require_one_of(self, "qk_norm", "rms_norm_across_heads")
        _require_one_of(self, "history_scale_mode", "per_head", "scalar")
        require(min(self.patch_size) >= 1, f"patch_size is {list(self.patch_size)}, wanted three numbers ≥ 1")
        require(self.freq_dim % 2 == 0, f"freq_dim is {self.freq_dim}, wanted an even number: half cos, half sin")
        even = all(d >= 2 and d % 2 == 0 for d in self.rope_dim)
        require(even, f"rope_dim is {list(self.rope_dim)}, wanted even numbers ≥ 2: RoPE turns pairs")
        require(
            sum(self.rope_dim) == self.attention_head_dim,
            f"rope_dim {list(self.rope_dim)} sums to {sum(self.rope_dim)}, wanted attention_head_dim = "
            f"{self.attention_head_dim}",
        )


# The statistics of the published latents, one value a channel: decode sees latent × std + mean.
_LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """The Wan video autoencoder: ``vae/config.json``. ``temperal`` is the published spelling."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = _LATENTS_MEAN
    latents_std: tuple[float, ...] = _LATENTS_STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    @property
    def decoder_dim(self) -> int:
        """Base width of the decoder, which may differ from the encoder's."""
        return self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str | Path) -> VaeConfig:
        """Read the published JSON form; :class:`CheckpointError` names file and field."""
        return read(cls, data, where)

    def to_dict(self) -> dict[str, Any]:
        """The published JSON form."""
        return {"_class_name": "AutoencoderKLWan"} | plain(self)

    def __post_init__(self) -> None:
        _require_positive(self, "base_dim", "decoder_dim", "z_dim", "num_res_blocks", "in_channels", "out_channels")
        require(len(self.dim_mult) >= 1 and min(self.dim_mult) >= 1, f"dim_mult is {list(self.dim_mult)}, wanted ≥ 1")
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}, wanted 0 ≤ dropout < 1")
        _require_one_of(self, "attn_scales", ())
        _require_one_of(self, "is_residual", False)
        _require_one_of(self, "patch_size", None, 1)
        levels = len(self.dim_mult) - 1
        require(
            len(self.temperal_downsample) == levels,
            f"temperal_downsample has {len(self.temperal_downsample)} values, wanted {levels}: one less than dim_mult",
        )
        self._require_scales(levels)
        self._require_statistics()

    def _require_scales(self, levels: int) -> None:
        spatial, temporal = 2**levels, 2 ** sum(self.temperal_downsample)
        came = (self.scale_factor_spatial, self.scale_factor_temporal)
        require(
            came == (spatial, temporal),
            f"scale_factor_spatial, scale_factor_temporal are {came[0]}, {came[1]}, but dim_mult and "
            f"temperal_downsample make {spatial}, {temporal}",
        )

    def _require_statistics(self) -> None:
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            require(
                len(values) == self.z_dim and all(map(math.isfinite, values)),
                f"{name} has {len(values)} values, wanted z_dim = {self.z_dim} finite ones",
            )
        require(min(self.latents_std) > 0, f"latents_std holds {min(self.latents_std)}, wanted every value > 0")


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The sizes of the UMT5 encoder: those fields of ``text_encoder/config.json`` that shape a tensor."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str | Path) -> TextConfig:
        """Read ``text_encoder/config.json``, whose many other fields transformers reads for itself."""
        known = {f.name for f in dataclasses.fields(cls)}
        require("d_model" in data, f"{where}: field 'd_model' is missing: this is not a T5 encoder")
        return read(cls, data, where, ignore=lambda name: name not in known)

    def __post_init__(self) -> None:
        _require_positive(self, *(f.name for f in dataclasses.fields(self)))


_DMD, _MULTISTEP = "HeliosDMDScheduler", "HeliosScheduler"
_DMD_FIELDS = (
    *("num_train_timesteps", "shift", "stages", "stage_range", "gamma", "prediction_type", "use_flow_sigmas"),
    *("use_dynamic_shifting", "time_shift_type"),
)
_SEQUENCE_SHIFT = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The noise schedule and its solver: ``scheduler/scheduler_config.json`` of both published scheduler classes.

    The last four fields are read by the published pipelines, not by the scheduler: they turn a number of tokens into
    the shift ``mu``.
    """

    class_name: str = _MULTISTEP
    num_train_timesteps: int = 1000
    shift: float = 1.0
    stages: int = 3
    stage_range: tuple[float, ...] = (0.0, 1 / 3, 2 / 3, 1.0)
    gamma: float = 1 / 3
    thresholding: bool = False
    prediction_type: str = "flow_prediction"
    solver_order: int = 2
    predict_x0: bool = True
    solver_type: str = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    solver_p: None = None
    use_flow_sigmas: bool = True
    scheduler_type: str = "unipc"
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    @property
    def solver(self) -> str:
        """``"dmd"``, ``"unipc"`` or ``"euler"``."""
        return "dmd" if self.class_name == _DMD else self.scheduler_type

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str | Path) -> SchedulerConfig:
        """Read the published JSON form, whose ``_class_name`` decides the solver and the default time shift."""
        name = data.get("_class_name", _MULTISTEP)
        linear = {"time_shift_type": "linear"} if name == _DMD else {}
        return read(cls, {"class_name": name} | linear | dict(data), where)

    def to_dict(self) -> dict[str, Any]:
        """The published JSON form: the fields that its class knows, and a changed sequence shift."""
        values = plain(self)
        del values["class_name"]
        unknown = set(values) - set(_DMD_FIELDS) if self.class_name == _DMD else set()
        default = {f.name: f.default for f in dataclasses.fields(self)}
        usual = {name for name in _SEQUENCE_SHIFT if values[name] == default[name]}
        kept = {n: v for n, v in values.items() if n not in usual and (n not in unknown or n in _SEQUENCE_SHIFT)}
        return {"_class_name": self.class_name} | kept

    def __post_init__(self) -> None:
        _require_one_of(self, "class_name", _MULTISTEP, _DMD)
        _require_positive(self, "num_train_timesteps", "shift", "stages", "gamma")
        _require_one_of(self, "scheduler_type", "unipc", "euler")
        _require_one_of(self, "time_shift_type", "exponential", "linear")
        self._require_published_solver()
        self._require_stage_range()
        require(
            0 < self.base_image_seq_len < self.max_image_seq_len,
            f"base_image_seq_len {self.base_image_seq_len} and max_image_seq_len {self.max_image_seq_len}: "
            "wanted 0 < base < max",
        )

    def _require_published_solver(self) -> None:
        """Every release has these; another value is another sampler, which must not pass for this one."""
        _require_one_of(self, "prediction_type", "flow_prediction")
        _require_one_of(self, "use_flow_sigmas", True)
        _require_one_of(self, "thresholding", False)
        _require_one_of(self, "predict_x0", True)
        _require_one_of(self, "lower_order_final", True)
        _require_one_of(self, "solver_order", 1, 2)
        # the published class reads the last three names as bh2
        _require_one_of(self, "solver_type", "bh2", "midpoint", "heun", "logrho")
        _require_one_of(self, "disable_corrector", ())

    def _require_stage_range(self) -> None:
        r = self.stage_range
        require(
            len(r) == self.stages + 1 and r[0] == 0 and r[-1] == 1 and all(a < b for a, b in itertools.pairwise(r)),
            f"stage_range is {list(r)}, wanted stages + 1 = {self.stages + 1} growing numbers from 0 to 1",
        )
        require(
            self.num_train_timesteps >= self.stages,
            f"num_train_timesteps is {self.num_train_timesteps}, wanted at least one for each of {self.stages} stages",
        )


@dataclass(frozen=True, slots=True)
class PipelineConfig:
    """What ``model_index.json`` says beside its components."""

    class_name: str = "HeliosPipeline"
    is_cfg_zero_star: bool = False
    is_distilled: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str | Path) -> PipelineConfig:
        """Read the published JSON form; a component is a pair [library, class] and not a field of this."""
        fields = {name: value for name, value in data.items() if not isinstance(value, list)}
        return read(cls, {"class_name": data.get("_class_name", "")} | fields, where)

    def to_dict(self) -> dict[str, Any]:
        """The published JSON form without the components; only the pyramid's class knows the two flags."""
        flags = plain(self) if self.class_name == "HeliosPyramidPipeline" else {}
        return {"_class_name": self.class_name} | {name: value for name, value in flags.items() if name != "class_name"}

    def variant(self, scheduler: SchedulerConfig) -> str:
        """``"base"``, ``"mid"`` or ``"distilled"``: the flags and the stages of the schedule tell it, no name does."""
        if self.is_distilled:
            return "distilled"
        return "base" if scheduler.stages == 1 else "mid"

    def __post_init__(self) -> None:
        _require_one_of(self, "class_name", "HeliosPipeline", "HeliosPyramidPipeline")


def _is_training_only(name: str) -> bool:
    return name in _TRAINING_ONLY or name == "restrict_self_attn" or name.startswith("is_use_gan")


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value) and value > 0, f"{name} is {value}, wanted a number > 0")


def _require_one_of(config: object, name: str, *allowed: object) -> None:
    value = getattr(config, name)
    if isinstance(value, str) and value not in allowed:
        require(False, unknown_name(name, value, map(str, allowed)))
    spelt = " or ".join(repr(list(a) if isinstance(a, tuple) else a) for a in allowed)
    require(value in allowed, f"{name} is {value!r}, wanted {spelt}: the only one that Helios has")
