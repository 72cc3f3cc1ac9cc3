"""A model folder in the published layout: what is in it, which variant it is, and whether its parts fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios.errors import CheckpointError
from helios.model.config import PipelineConfig, SchedulerConfig, TextConfig, TransformerConfig, VaeConfig
from helios.model.fields import load_json, require
from helios.model.shapes import TRANSFORMER_UNUSED, transformer_shapes, vae_shapes
from helios.model.weights import SafetensorsFolder, WeightSource, check, current_names

__all__ = ["ModelFolder", "missing_files", "model_folder"]

_CLASSES = {
    "transformer": ("HeliosTransformer3DModel",),
    "vae": ("AutoencoderKLWan",),
    "scheduler": ("HeliosScheduler", "HeliosDMDScheduler"),
    "text_encoder": ("UMT5EncoderModel",),
    "tokenizer": ("T5TokenizerFast", "T5Tokenizer", "AutoTokenizer", "PreTrainedTokenizerFast"),
}
# A folder without a text encoder still generates from given embeddings.
_NEEDED = ("transformer", "vae", "scheduler")
_WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model folder whose configs were read and fit each other. No weight has been read.

    Attributes:
        path: the folder.
        variant: ``"base"``, ``"mid"`` or ``"distilled"``.
        classes: component -> published class name; components that the folder lacks are absent.
        text: sizes of the text encoder, or None without one.
    """

    path: Path
    variant: str
    classes: Mapping[str, str]
    pipeline: PipelineConfig
    scheduler: SchedulerConfig
    transformer: TransformerConfig
    vae: VaeConfig
    text: TextConfig | None

    @property
    def random_weights(self) -> bool:
        """Whether a file of the transformer says in its header that its weights are random numbers."""
        from safetensors import SafetensorError, safe_open

        for path in sorted((self.path / "transformer").glob("*.safetensors")):
            try:
                with safe_open(str(path), framework="pt") as file:
                    if "random_weights" in (file.metadata() or {}):
                        return True
            except (SafetensorError, OSError):  # told, with more words, by whoever reads the weights
                continue
        return False

    def transformer_weights(self) -> WeightSource:
        """The transformer's weights, under today's names, checked against the config.

        Raises:
            CheckpointError: a file is damaged or the weights do not fit the config.
        """
        source = current_names(SafetensorsFolder(self.path / "transformer"))
        check(source, transformer_shapes(self.transformer), ignore=TRANSFORMER_UNUSED)
        return source

    def vae_weights(self) -> WeightSource:
        """The autoencoder's weights, checked against the config.

        Raises:
            CheckpointError: a file is damaged or the weights do not fit the config.
        """
        source = SafetensorsFolder(self.path / "vae")
        check(source, vae_shapes(self.vae))
        return source

    def text_weights(self) -> WeightSource | None:
        """The text encoder's weights, or None without one: files and headers are checked here, names and shapes when
        the encoder is built, for only transformers knows them.

        Raises:
            CheckpointError: a file is damaged, missing, pickled, or outside its folder.
        """
        return SafetensorsFolder(self.path / "text_encoder") if self.text is not None else None


def model_folder(path: str | Path) -> ModelFolder:
    """Read the configs of a model folder.

    Raises:
        CheckpointError: not a Helios folder, a part is missing, a config makes no sense, or two contradict each other.
    """
    path = Path(path)
    index = _index(path)
    pipeline = PipelineConfig.from_dict(index, path / "model_index.json")
    classes = _classes(index, path / "model_index.json")
    missing = missing_files(path)
    require(
        not missing, f"{path} is incomplete, it lacks {_list(missing)}", "finish the download or copy of the folder"
    )
    files = {name: path / name / "config.json" for name in _CLASSES} | {"scheduler": _scheduler_file(path)}
    scheduler = SchedulerConfig.from_dict(load_json(files["scheduler"]), files["scheduler"])
    has_text = "text_encoder" in classes
    folder = ModelFolder(
        path,
        pipeline.variant(scheduler),
        classes,
        pipeline,
        scheduler,
        TransformerConfig.from_dict(load_json(files["transformer"]), files["transformer"]),
        VaeConfig.from_dict(load_json(files["vae"]), files["vae"]),
        TextConfig.from_dict(load_json(files["text_encoder"]), files["text_encoder"]) if has_text else None,
    )
    _require_harmony(folder)
    return folder


def missing_files(path: Path) -> list[str]:
    """The files that a model folder should have and lacks, relative to it; links that lead nowhere count as lacking.

    Raises:
        CheckpointError: ``model_index.json`` or the index of a sharded component is not what it should be.
    """
    if not (path / "model_index.json").is_file():
        return ["model_index.json"]
    lacking: list[str] = []
    for name in _components(load_json(path / "model_index.json")):
        lacking += [f"{name}/{file}" for file in _missing_in(path / name, name)]
    return lacking


def _missing_in(folder: Path, name: str) -> list[str]:
    if name == "tokenizer":
        vocabulary = any((folder / file).is_file() for file in ("tokenizer.json", "spiece.model"))
        return [] if vocabulary else ["tokenizer.json"]
    config = "scheduler_config.json" if name == "scheduler" else "config.json"
    lacking = [] if (folder / config).is_file() else [config]
    return lacking + (_missing_weights(folder, _WEIGHTS[name]) if name in _WEIGHTS else [])


def _missing_weights(folder: Path, base: str) -> list[str]:
    index = folder / f"{base}.safetensors.index.json"
    if index.is_file():
        shards = load_json(index).get("weight_map")
        names = (
            sorted({shard for shard in shards.values() if isinstance(shard, str)}) if isinstance(shards, dict) else []
        )
        return [name for name in names if not (folder / name).is_file()]
    if (folder / f"{base}.safetensors").is_file() or any(folder.glob("*.bin")):  # pickles are refused at the reading
        return []
    return [f"{base}.safetensors"]


def _index(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder", "give the folder that holds model_index.json")
    if not (path / "model_index.json").exists():
        inside = (path.parent / "model_index.json").exists()
        fix = f"give its parent, {path.parent}" if inside else "give the folder that holds model_index.json"
        raise CheckpointError(f"{path} has no model_index.json: it is not a model folder", fix)
    return load_json(path / "model_index.json")


def _components(index: Mapping[str, Any]) -> dict[str, str]:
    """Component -> class name; a component that a folder does without is the pair [null, null]."""
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    return {name: str(pair[1]) for name, pair in pairs.items() if name in _CLASSES and len(pair) == 2 and pair[1]}


def _classes(index: Mapping[str, Any], where: Path) -> dict[str, str]:
    classes = _components(index)
    for name in _NEEDED:
        require(name in classes, f"{where} lists no {name}", "use a complete Helios folder")
    for name, came in classes.items():
        wanted = " or ".join(_CLASSES[name])
        require(came in _CLASSES[name], f"{where}: {name} is a {came}, wanted {wanted}", "use a Helios folder")
    both = ("text_encoder" in classes) == ("tokenizer" in classes)
    require(both, f"{where} lists one of text_encoder and tokenizer without the other", "use a complete Helios folder")
    return classes


def _scheduler_file(path: Path) -> Path:
    return path / "scheduler" / "scheduler_config.json"


def _require_harmony(folder: ModelFolder) -> None:
    """What two configs must agree on."""
    path, classes = folder.path, folder.classes
    channels, z = folder.transformer.in_channels, folder.vae.z_dim
    require(channels == z, f"{path}: the transformer takes {channels} latent channels, the vae makes {z}", _MIXED)
    out = folder.transformer.out_channels
    require(out == channels, f"{path}: the transformer takes {channels} latent channels and returns {out}", _MIXED)
    if folder.text is not None:
        took, makes = folder.transformer.text_dim, folder.text.d_model
        require(
            took == makes, f"{path}: the transformer takes text of width {took}, text_encoder makes {makes}", _MIXED
        )
    require(
        folder.scheduler.class_name == classes["scheduler"],
        f"{path}: model_index.json lists a {classes['scheduler']}, scheduler_config.json is of a "
        f"{folder.scheduler.class_name}",
        _MIXED,
    )
    require(
        folder.pipeline.is_distilled == (folder.scheduler.solver == "dmd"),
        f"{path}: is_distilled is {folder.pipeline.is_distilled}, but the scheduler is a {classes['scheduler']}: "
        "distilled weights and the DMD scheduler need each other",
        _MIXED,
    )
    _require_pyramid(folder)
    require(
        folder.transformer.has_multi_term_memory_patch,
        f"{path}: has_multi_term_memory_patch is false in transformer/config.json: without the patches of its history "
        "the transformer cannot go on from one chunk to the next, and every Helios pipeline needs that",
        "use a released checkpoint; they all have it true",
    )


def _require_pyramid(folder: ModelFolder) -> None:
    """The published pipelines are two classes, with and without a pyramid; the schedule must be of the same kind."""
    pyramid, stages = folder.pipeline.class_name == "HeliosPyramidPipeline", folder.scheduler.stages
    wanted = "several stages" if pyramid else "one stage"
    require(
        pyramid == (stages > 1),
        f"{folder.path}: model_index.json lists a {folder.pipeline.class_name}, whose scheduler has {wanted}; "
        f"scheduler_config.json has stages {stages}",
        _MIXED,
    )


_MIXED = "the folder mixes two models: take all parts from one"


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
