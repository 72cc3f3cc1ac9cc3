"""What a pipeline needs of a model: configs, where the weights come from, text; from a folder or of a named size."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from helios.errors import CheckpointError, InputError
from helios.model import presets
from helios.model.config import PipelineConfig, SchedulerConfig, TransformerConfig, VaeConfig
from helios.model.digest import folder_digest
from helios.model.fields import plain
from helios.model.folder import model_folder
from helios.model.hub import resolve
from helios.model.presets import Variant
from helios.model.random_weights import RandomWeights
from helios.model.shapes import keeps_float32, transformer_shapes, vae_shapes
from helios.model.text import NoText, StandInText, TextEncoder, Umt5Text
from helios.model.weights import WeightSource

__all__ = ["Model", "folder_model", "sized_model"]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Configs, weights and text encoder of one model.

    Attributes:
        name: of the folder, or ``size variant``.
        variant: how it samples, with its defaults.
        transformer_weights, vae_weights: sources; no weight has been read.
        text: makes a text encoder of a dtype on a device.
        contents: makes a digest of the weights and of the text encoder, quickly.
        random_weights: the weights mean nothing, and neither do its videos.
    """

    name: str
    variant: Variant
    pipeline: PipelineConfig
    scheduler: SchedulerConfig
    transformer: TransformerConfig
    vae: VaeConfig
    transformer_weights: WeightSource
    vae_weights: WeightSource
    text: Callable[[torch.dtype, torch.device], TextEncoder]
    contents: Callable[[], bytes]
    random_weights: bool = False

    def __post_init__(self) -> None:
        scales = self.vae.scale_factor_temporal
        if scales != 4:
            raise CheckpointError(
                f"{self.name}: the vae makes {scales} frames of a latent; Helios is trained with 4", "use its own vae"
            )

    @functools.cached_property
    def identity(self) -> str:
        """A digest of the configs, of the tensors' names and shapes, and of ``contents``: 16 hexadecimal digits.

        Of a folder it sees every tensor of the three networks, but a few hundred bytes of each; what it does not see
        stands in ``helios.model.digest.folder_digest``. Of a named size it sees size, variant and seed, and one tensor
        of each network, so that other rules for random weights are another model.
        """
        sha = hashlib.sha256()
        for config in (self.pipeline, self.scheduler, self.transformer, self.vae):
            sha.update(json.dumps(plain(config), sort_keys=True).encode())
        for source in (self.transformer_weights, self.vae_weights):
            sha.update(json.dumps([(n, info.shape) for n, info in sorted(source.tensors.items())]).encode())
        sha.update(self.contents())
        return sha.hexdigest()[:16]


def folder_model(path_or_repo: str | Path, variant: str | None = None) -> Model:
    """The model of a folder in the published layout, or of a hub repository.

    Raises:
        CheckpointError: see ``helios.model.hub.resolve`` and ``helios.model.folder.model_folder``.
        InputError: the folder holds another variant than the one named.
    """
    folder = model_folder(resolve(path_or_repo))
    if variant is not None and presets.variant(variant).name != folder.variant:
        raise InputError(f"{folder.path} is a {folder.variant} model, not {variant}", "leave the variant out")
    folder.text_weights()  # damaged files are told now, not when the first prompt comes
    return Model(
        str(folder.path),
        presets.variant(folder.variant),
        folder.pipeline,
        folder.scheduler,
        folder.transformer,
        folder.vae,
        folder.transformer_weights(),
        folder.vae_weights(),
        functools.partial(_folder_text, folder.path, folder.transformer.text_dim, folder.text is not None),
        functools.partial(folder_digest, folder.path),
        random_weights=folder.random_weights,
    )


def _folder_text(path: Path, text_dim: int, there: bool, dtype: torch.dtype, device: torch.device) -> TextEncoder:
    host = torch.device("cpu") if device.type == "meta" else device
    return Umt5Text(path, text_dim=text_dim, dtype=dtype, device=host) if there else NoText()


def sized_model(size: str, variant: str | None = None, seed: int = 0) -> Model:
    """A model of a named size with seeded random weights, in the dtypes of a published checkpoint.

    Args:
        size: ``tiny``, ``mini`` or ``14b``.
        variant: ``base``, ``mid`` or ``distilled``; the last is the default.
        seed: of the weights.

    Raises:
        InputError: no such size or variant; names the nearest.
    """
    networks, sampling = presets.size(size), presets.variant(variant or "distilled")
    transformer = RandomWeights(
        transformer_shapes(networks.transformer),
        seed=seed,
        dtype=lambda name: torch.float32 if keeps_float32(name) else torch.bfloat16,
    )
    vae = RandomWeights(vae_shapes(networks.vae), seed=seed)
    name = f"{size} {sampling.name}, random weights of seed {seed}"
    return Model(
        name,
        sampling,
        sampling.pipeline,
        sampling.scheduler,
        networks.transformer,
        networks.vae,
        transformer,
        vae,
        lambda dtype, device: StandInText(networks.transformer.text_dim),
        lambda: _random_contents(name, transformer, vae),
        random_weights=True,
    )


def _random_contents(name: str, transformer: WeightSource, vae: WeightSource) -> bytes:
    sha = hashlib.sha256("\n".join((name, transformer.origin, vae.origin, StandInText.origin)).encode())
    for source, tensor in ((transformer, "proj_out.weight"), (vae, "decoder.conv_out.weight")):
        sha.update(source.read(tensor).view(torch.uint8).numpy().tobytes())
    return sha.digest()
