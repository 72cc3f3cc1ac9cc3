"""The folders that we write and the names that we expect, against diffusers and transformers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from helios.model.config import SchedulerConfig, TransformerConfig, VaeConfig
from helios.model.folder import model_folder
from helios.model.presets import SIZES, VARIANTS
from helios.model.random_weights import RandomWeights
from helios.model.shapes import keeps_float32, transformer_shapes, vae_shapes
from helios.model.weights import WeightSource

# diffusers hands torch tensors to np.linspace, which numpy has deprecated.
THEIR_NUMPY = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
TINY, TINY_VAE = SIZES["tiny"].transformer, SIZES["tiny"].vae

TRANSFORMERS = {
    **{name: networks.transformer for name, networks in SIZES.items()},
    "no memory patches": dataclasses.replace(TINY, has_multi_term_memory_patch=False),
    "no norm2": dataclasses.replace(TINY, cross_attn_norm=False),
    "history scale per head": dataclasses.replace(TINY, is_amplify_history=True),
    "one history scale": dataclasses.replace(TINY, is_amplify_history=True, history_scale_mode="scalar"),
    "other patch and channels": dataclasses.replace(TINY, patch_size=(1, 4, 2), in_channels=5, out_channels=3),
    "other widths": dataclasses.replace(TINY, num_attention_heads=3, freq_dim=10, text_dim=7, ffn_dim=50, num_layers=3),
}
VAES = {
    **{name: networks.vae for name, networks in SIZES.items()},
    "other decoder": dataclasses.replace(TINY_VAE, base_dim=4, decoder_base_dim=6, dim_mult=(1, 2, 3, 2)),
    "three levels": dataclasses.replace(
        TINY_VAE,
        dim_mult=(1, 2, 4),
        temperal_downsample=(True, False),
        scale_factor_spatial=4,
        scale_factor_temporal=2,
        num_res_blocks=3,
    ),
    "other channels": VaeConfig(base_dim=4, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4, in_channels=12),
}


def network(cls: Any, config: TransformerConfig | VaeConfig) -> torch.nn.Module:
    """diffusers' network of this config, without memory."""
    with torch.device("meta"):
        module: torch.nn.Module = cls(**{k: v for k, v in config.to_dict().items() if not k.startswith("_")})
    return module


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_names_and_shapes(name: str) -> None:
    config = TRANSFORMERS[name]
    assert transformer_shapes(config) == shapes_of(network(diffusers.HeliosTransformer3DModel, config))


@pytest.mark.parametrize("name", VAES)
def test_vae_names_and_shapes(name: str) -> None:
    config = VAES[name]
    assert vae_shapes(config) == shapes_of(network(diffusers.AutoencoderKLWan, config))


def test_the_published_counts() -> None:
    transformer, vae = transformer_shapes(SIZES["14b"].transformer), vae_shapes(SIZES["14b"].vae)
    assert len(transformer) == 1101
    assert sum(map(math.prod, transformer.values())) == 14_312_427_584
    assert round(sum(map(math.prod, vae.values())) / 1e6, 1) == 126.9


def test_the_tensors_kept_in_float32_are_those_of_diffusers() -> None:
    keep = set(diffusers.HeliosTransformer3DModel._keep_in_fp32_modules)
    for name in transformer_shapes(dataclasses.replace(SIZES["14b"].transformer, is_amplify_history=True)):
        assert keeps_float32(name) == bool(keep & set(name.split("."))), name


@pytest.mark.parametrize(
    ("cls", "ours"),
    [
        (diffusers.HeliosTransformer3DModel, TransformerConfig()),
        (diffusers.AutoencoderKLWan, VaeConfig()),
        (diffusers.HeliosScheduler, SchedulerConfig()),
        (diffusers.HeliosDMDScheduler, SchedulerConfig("HeliosDMDScheduler", time_shift_type="linear")),
    ],
    ids=lambda value: type(value).__name__ if dataclasses.is_dataclass(value) else value.__name__,
)
@THEIR_NUMPY
def test_config_defaults_are_those_of_diffusers(cls: Any, ours: Any) -> None:
    with torch.device("meta" if hasattr(cls, "parameters") else "cpu"):
        theirs = {name: value for name, value in cls().config.items() if not name.startswith("_")}
    expected = {name: list(value) if isinstance(value, tuple) else value for name, value in theirs.items()}
    assert {name: value for name, value in ours.to_dict().items() if not name.startswith("_")} == expected


# --- a folder of ours, loaded by the published code ---


@pytest.fixture(scope="module", params=["base", "mid", "distilled"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    out: Path = tmp_path_factory.mktemp(request.param) / "tiny"
    make_checkpoint.write_checkpoint(out, size_name="tiny", variant_name=request.param, seed=7)
    return out


def test_diffusers_loads_every_component_whole(folder: Path) -> None:
    ours = model_folder(folder)
    for cls, name, source in (
        (diffusers.HeliosTransformer3DModel, "transformer", ours.transformer_weights()),
        (diffusers.AutoencoderKLWan, "vae", ours.vae_weights()),
    ):
        module, info = cls.from_pretrained(folder, subfolder=name, output_loading_info=True)
        assert {kind: list(names) for kind, names in info.items()} == {kind: [] for kind in info}
        assert_same(module.state_dict(), source)


def assert_same(state: dict[str, torch.Tensor], source: WeightSource) -> None:
    """Raise unless the source holds exactly these values, as far as its dtype carries them."""
    assert set(state) == set(source.tensors)
    for name, tensor in state.items():
        torch.testing.assert_close(source.read(name).to(tensor.dtype), tensor, rtol=0, atol=0)


def test_the_comparison_sees_one_changed_value() -> None:
    source = RandomWeights({"a": (4, 4)}, seed=0)
    changed = source.read("a")
    changed[3, 3] += 1e-3
    with pytest.raises(AssertionError):
        assert_same({"a": changed}, source)


@THEIR_NUMPY
def test_the_pipeline_of_diffusers_loads(folder: Path) -> None:
    variant = VARIANTS[folder.parent.name.rstrip("0123456789")]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    assert type(pipeline).__name__ == variant.pipeline.class_name
    assert type(pipeline.scheduler).__name__ == variant.scheduler.class_name
    assert pipeline.config.get("is_distilled", False) == variant.pipeline.is_distilled
    assert pipeline.config.get("is_cfg_zero_star", False) == variant.pipeline.is_cfg_zero_star
    embeds, _ = pipeline.encode_prompt("a cat", do_classifier_free_guidance=False, max_sequence_length=8)
    assert embeds.shape == (1, 8, 32)
    assert model_folder(folder).variant == variant.name


def test_transformers_loads_tokenizer_and_encoder(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder, info = transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert {kind: list(names) for kind, names in info.items()} == {kind: [] for kind in info}
    assert len(tokenizer) <= encoder.config.vocab_size
    tokens = tokenizer("A cat, running on the beach", padding="max_length", max_length=12, return_tensors="pt")
    assert tokenizer.decode(tokens.input_ids[0], skip_special_tokens=True) == "A cat, running on the beach"
    assert tokens.input_ids[0, int(tokens.attention_mask.sum()) - 1] == tokenizer.eos_token_id == 1
    assert tokens.input_ids[0, -1] == tokenizer.pad_token_id == 0
    state = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    assert state.shape == (1, 12, 32)
    assert state.isfinite().all()
    assert state.float().std() > 0.1


def test_two_runs_write_the_same_bytes_and_another_seed_others(tmp_path: Path, make_checkpoint: Any) -> None:
    written = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_checkpoint.write_checkpoint(tmp_path / name, size_name="tiny", variant_name="mid", seed=seed)
        written.append({p.relative_to(tmp_path / name): p.read_bytes() for p in sorted((tmp_path / name).rglob("*.*"))})
    assert written[0] == written[1]
    changed = [path for path in written[0] if written[0][path] != written[2][path]]
    assert {path.parts[0] for path in changed} == {"transformer", "vae", "text_encoder"}


def test_the_script_refuses_to_write_over_something(tmp_path: Path, make_checkpoint: Any, capsys: Any) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    arguments = ["--size", "tiny", "--variant", "mid", "--out", str(tmp_path)]
    assert make_checkpoint.main(arguments) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert make_checkpoint.main([*arguments, "--force"]) == 2  # --force replaces what a run wrote, not what one finds
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


# --- the scale of random weights ---


def filled(cls: Any, config: TransformerConfig | VaeConfig, shapes: dict[str, tuple[int, ...]]) -> Any:
    module = cls(**{k: v for k, v in config.to_dict().items() if not k.startswith("_")}).eval()
    source = RandomWeights(shapes, seed=0)
    module.load_state_dict({name: source.read(name) for name in shapes})
    return module


def history(generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    for name, frames in (("short", [0, 19]), ("mid", [17, 18]), ("long", list(range(1, 17)))):
        yield f"latents_history_{name}", torch.randn(1, 16, len(frames), 8, 8, generator=generator)
        yield f"indices_latents_history_{name}", torch.tensor([frames])


@torch.no_grad()
def test_forty_random_blocks_neither_die_nor_explode() -> None:
    config = dataclasses.replace(TINY, num_layers=40)
    module = filled(diffusers.HeliosTransformer3DModel, config, transformer_shapes(config))
    spread: list[float] = []
    for block in module.blocks:
        block.register_forward_hook(lambda block, inputs, output: spread.append(output.std().item()))
    g = torch.Generator().manual_seed(1)
    noisy, text = torch.randn(1, 16, 9, 8, 8, generator=g), torch.randn(1, 16, 32, generator=g)
    frames = torch.arange(20, 29)[None]
    out = module(noisy, torch.tensor([500]), text, frames, **dict(history(g))).sample
    assert len(spread) == 40
    assert min(spread) > 0.5
    assert 1.5 < spread[-1] / spread[0] < 5  # the blocks change the stream, by a factor of a few
    assert 0.5 < out.std() < 2


@torch.no_grad()
def test_a_random_vae_makes_pictures_that_vary() -> None:
    module = filled(diffusers.AutoencoderKLWan, TINY_VAE, vae_shapes(TINY_VAE))
    g = torch.Generator().manual_seed(1)
    video = module.decode(torch.randn(1, 16, 2, 8, 8, generator=g)).sample
    assert 0.2 < video.std() < 0.8
    assert (video.abs() == 1).float().mean() < 0.2  # few values are clamped
    latents = module.encode(torch.rand(1, 3, 5, 64, 64, generator=g) * 2 - 1).latent_dist.mean
    assert 0.2 < latents.std() < 2
