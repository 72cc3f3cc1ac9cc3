"""Damaged text encoders: refused with file and tensor named; sound ones encode as transformers itself would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import helios
from helios.errors import CheckpointError
from helios.model.text import Umt5Text
from helios.pipeline.model import folder_model

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
KEY = "encoder.block.0.layer.0.SelfAttention.q.weight"
SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "text_encoder" / FILE)
    change(tensors)
    save_file(tensors, folder / "text_encoder" / FILE, metadata={"format": "pt"})


def umt5(folder: Path, dtype: torch.dtype = torch.float32) -> Umt5Text:
    return Umt5Text(folder, text_dim=32, dtype=dtype, device=torch.device("cpu"))


def spoil(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[KEY].view(-1)[-1] = value

    return change


WEIGHTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop(KEY), f"text_encoder does not fit its config: 1 missing: {KEY}\n"),
    "no embeddings": (lambda t: [t.pop(n, None) for n in (SHARED, TIED)], f"1 missing: {SHARED}\n"),
    "extra": (lambda t: t.update(x=torch.ones(2)), f"1 unexpected: x in {FILE}"),
    "dtype": (lambda t: t.update({KEY: t[KEY].to(torch.int8)}), f"1 wrong dtype: {KEY} in {FILE} is int8"),
    "shape": (lambda t: t.update({KEY: torch.ones(3, 3)}), rf"1 wrong shape: {KEY} in {FILE} is \[3, 3\]"),
    "nan": (spoil(float("nan")), f"text_encoder/{FILE}: tensor '{KEY}' holds NaN"),
    "infinity": (spoil(float("inf")), f"text_encoder/{FILE}: tensor '{KEY}' holds NaN or infinity"),
    "two embeddings": (lambda t: t.update({SHARED: t[SHARED], TIED: t[SHARED] + 1}), f"{FILE}: '{TIED}' differs"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit_are_refused_before_the_first_chunk(folder: Path, case: str) -> None:
    change, message = WEIGHTS[case]
    edit(folder, change)
    pipeline = helios.load(folder, backend="reference")
    with pytest.raises(CheckpointError, match=message):
        next(iter(pipeline.stream("a cat", chunks=1, height=64, width=64, steps=1, max_sequence_length=8)))


def test_a_config_with_more_layers_than_the_weights(folder: Path) -> None:
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    layers = config["num_layers"]
    path.write_text(json.dumps(config | {"num_layers": layers + 1}))
    with pytest.raises(CheckpointError, match=rf"text_encoder .* missing: encoder\.block\.{layers}\.layer\.0"):
        umt5(folder).encode("a", 8)


def truncate(folder: Path) -> None:
    path = folder / FILE
    path.write_bytes(path.read_bytes()[:-100])


def index(folder: Path, shard: str) -> None:
    weight_map = dict.fromkeys(load_file(folder / FILE), shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def outside(folder: Path) -> None:
    index(folder, "../x.safetensors")
    (folder / FILE).rename(folder.parent / "x.safetensors")


def lost(folder: Path) -> None:
    index(folder, "lost.safetensors")
    (folder / FILE).unlink()


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, f"text_encoder/{FILE} is truncated: tensor '.*' ends at byte"),
    "outside": (outside, rf'text_encoder/{INDEX} names "\.\./x\.safetensors", a path outside its folder'),
    "missing shard": (lost, f"text_encoder/{INDEX} names the shard lost.safetensors, which is missing"),
    "pickled": (
        lambda folder: (folder / FILE).rename(folder / "pytorch_model.bin"),
        r"text_encoder holds only pickled weights \(pytorch_model.bin\), which are refused",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_be_read_are_refused_when_the_model_is_opened(folder: Path, case: str) -> None:
    damage, message = FILES[case]
    damage(folder / "text_encoder")
    with pytest.raises(CheckpointError, match=message):
        umt5(folder).encode("a", 8)
    opening = "it lacks text_encoder/lost.safetensors" if case == "missing shard" else message
    with pytest.raises(CheckpointError, match=opening):
        folder_model(folder)


def theirs(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoTokenizer, UMT5EncoderModel

    batch = AutoTokenizer.from_pretrained(folder / "tokenizer")(
        ["a cat in the snow"], padding="max_length", max_length=8, return_tensors="pt"
    )
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype)
    with torch.no_grad():
        state = encoder(batch.input_ids, batch.attention_mask).last_hidden_state[0].float()
    return torch.as_tensor(state * batch.attention_mask[0, :, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [(SHARED,), (TIED,), (SHARED, TIED)], ids=["shared", "tied", "both"])
def test_a_sound_folder_encodes_as_transformers_does(
    checkpoint: Path, folder: Path, dtype: torch.dtype, stored: tuple[str, ...]
) -> None:
    def rename(tensors: Tensors) -> None:
        matrix = next(tensors.pop(name) for name in (SHARED, TIED) if name in tensors)
        tensors.pop(TIED, None)
        tensors.update({name: matrix.clone() for name in stored})

    edit(folder, rename)
    ours = umt5(folder, dtype)
    embedding = ours.encode("a cat in the snow", 8).embedding
    assert torch.equal(embedding, theirs(checkpoint, dtype))
    assert embedding.abs().sum() > 0
    _, encoder = ours._loaded or (None, None)
    assert encoder is not None
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert {parameter.dtype for parameter in encoder.parameters()} == {dtype}
