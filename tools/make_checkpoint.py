"""Write a complete small model folder in the published format, with seeded random weights.

    python tools/make_checkpoint.py --size tiny --variant distilled --out /tmp/tiny

The folder holds what a published one holds: ``model_index.json``, transformer and VAE in sharded safetensors with an
index, a UMT5 text encoder, a T5 tokenizer and the variant's scheduler. So the code that loads real checkpoints runs,
whole, where no real checkpoint fits. Videos made from it are noise; the headers of the weights say that they are
random, and ``helios generate`` writes it into the frames.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

from helios.errors import HeliosError, InputError
from helios.model.config import TextConfig
from helios.model.presets import SIZES, VARIANTS, size, variant
from helios.model.random_weights import RandomWeights
from helios.model.shapes import keeps_float32, transformer_shapes, vae_shapes
from helios.model.weights import WeightSource

FORMAT = "0.42.1"  # the diffusers release whose folder layout this follows
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARD_MB = {"tiny": 0.1, "mini": 128.0}  # small enough that the transformer of each size has several shards

# Words of everyday prompts, so that tokens are longer than letters; everything else is spelt.
WORDS = """
a an the and of in on with at to is are over under through into from by for as it its his her their this that
video film shot camera close up wide slow motion cinematic realistic detailed bright dark warm cold soft light shadow
man woman child person people cat dog horse bird fish tree forest river ocean sea beach mountain sky cloud sun moon rain
snow city street car train boat house room window table chair red green blue white black yellow golden walking running
flying swimming standing sitting looking moving playing dancing eating night day morning evening summer winter spring
autumn water fire wind grass flower field road
"""


def write_checkpoint(
    out: Path,
    *,
    size_name: str,
    variant_name: str,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_mb: float | None = None,
) -> None:
    """Write the folder; ``model_index.json`` comes last, so that a folder cut short shows it.

    Args:
        out: a folder that is empty or not there.
        size_name: ``tiny`` or ``mini``.
        variant_name: ``base``, ``mid`` or ``distilled``.
        seed: of all weights; the same seed gives the same bytes.
        dtype: of transformer and text encoder. What the network keeps in float32 and the whole VAE are float32 always.
        max_shard_mb: largest shard in MB (10⁶ bytes).

    Raises:
        InputError: unknown size or variant, or ``out`` is not empty.
    """
    networks, sampling = size(size_name), variant(variant_name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder", "give another --out, or add --force")
    limit = int((SHARD_MB.get(size_name, 1000.0) if max_shard_mb is None else max_shard_mb) * 1e6)
    weights = RandomWeights(
        transformer_shapes(networks.transformer),
        seed=seed,
        dtype=lambda name: torch.float32 if keeps_float32(name) else dtype,
    )
    write_network(out / "transformer", networks.transformer.to_dict(), weights, limit)
    vae = RandomWeights(vae_shapes(networks.vae), seed=seed)
    write_network(out / "vae", networks.vae.to_dict(), vae, limit)
    write_tokenizer(out / "tokenizer")
    write_text_encoder(out / "text_encoder", networks.text, seed, dtype)
    write_json(out / "scheduler" / "scheduler_config.json", sampling.scheduler.to_dict())
    components = {
        "scheduler": ["diffusers", sampling.scheduler.class_name],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "HeliosTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    write_json(out / "model_index.json", sampling.pipeline.to_dict() | components)


def write_network(folder: Path, config: dict[str, Any], source: WeightSource, limit: int) -> None:
    """Write ``config.json`` and the weights; one shard is in memory at a time."""
    write_json(folder / "config.json", config)
    write_weights(folder, source, limit)


def write_weights(folder: Path, source: WeightSource, limit: int) -> None:
    """Write safetensors of at most ``limit`` bytes of data each (a larger tensor stands alone), and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(split(source, limit))
    if len(shards) == 1:
        _save(folder / "diffusion_pytorch_model.safetensors", source, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(folder / file, source, names)
        weight_map |= dict.fromkeys(names, file)
    total = sum(info.nbytes for info in source.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def split(source: WeightSource, limit: int) -> Iterator[list[str]]:
    """The names of each shard, in the order of the state dict."""
    names: list[str] = []
    filled = 0
    for name, info in source.tensors.items():
        if names and filled + info.nbytes > limit:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += info.nbytes
    yield names


def write_tokenizer(folder: Path) -> None:
    """A T5 tokenizer: unigram, whole words where it knows them, else letters; ids 0, 1, 2 are pad, end, unknown."""
    from transformers import T5TokenizerFast

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -6.0) for word in WORDS.split()]
    letters = [(chr(code), -9.0) for code in range(33, 127)]
    single = {word for word, _ in words} | {"▁"}
    starts = [(f"▁{letter}", -8.5) for letter, _ in letters if letter.isalnum() and f"▁{letter}" not in single]
    tokenizer = T5TokenizerFast(vocab=[*special, ("▁", -7.0), *words, *starts, *letters], extra_ids=0)
    tokenizer.save_pretrained(folder)


def write_text_encoder(folder: Path, config: TextConfig, seed: int, dtype: torch.dtype) -> None:
    """A UMT5 encoder as transformers initialises one."""
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = UMT5EncoderModel(UMT5Config(**dataclasses.asdict(config)))
    encoder.config.architectures, encoder.config.dtype = ["UMT5EncoderModel"], dtype
    encoder.config.save_pretrained(folder)
    # the token embedding has two names in the module and one in the file, as in the published folders
    state = {n: t.to(dtype) for n, t in encoder.state_dict().items() if n != "encoder.embed_tokens.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a config file as the published ones are written, with the release that defines its fields."""
    path.parent.mkdir(parents=True, exist_ok=True)
    version = {"_diffusers_version": FORMAT} if "_class_name" in data else {}
    path.write_text(json.dumps(data | version, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save(path: Path, source: WeightSource, names: list[str]) -> None:
    """Write one shard, the same bytes each time: safetensors itself writes metadata in a random order."""
    # The mark travels with the weights: whoever makes a video of them can see that it means nothing.
    data = save({name: source.read(name) for name in names}, {"format": "pt", "random_weights": source.origin})
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text, memoryview(data)[8 + length :]):
            file.write(part)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and write the folder; 2 is a mistake of the caller."""
    parser = argparse.ArgumentParser(description="Write a small model folder with seeded random weights.")
    parser.add_argument("--size", choices=[name for name in SIZES if name in SHARD_MB], default="tiny")
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="distilled")
    parser.add_argument("--out", type=Path, required=True, help="an empty or a new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-mb", type=float, default=None, help="default: 0.1 for tiny, 128 for mini")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--force", action="store_true", help="replace what an earlier run wrote to --out")
    args = parser.parse_args(argv)
    try:
        if args.force and (args.out / "model_index.json").exists():
            shutil.rmtree(args.out)
        write_checkpoint(
            args.out,
            size_name=args.size,
            variant_name=args.variant,
            seed=args.seed,
            dtype=DTYPES[args.dtype],
            max_shard_mb=args.max_shard_mb,
        )
    except HeliosError as error:
        print(error, file=sys.stderr)
        return 2
    total = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {args.size} {args.variant}, random weights of seed {args.seed}, {total / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
