"""The identity of a model folder: a run is not continued with other weights, another text encoder or tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helios.cli import main
from helios.errors import CheckpointError
from helios.model.digest import PIECE, folder_digest
from helios.pipeline.model import folder_model

RUN = ["--backend", "cpu", "--precision", "fp32", "--height", "64", "--width", "64", "--steps", "1", "--chunks", "1"]
ATTENTION = ("transformer", "blocks.1.attn1.to_k.weight")
TEXT = ("text_encoder", "encoder.block.1.layer.1.DenseReluDense.wo.weight")
VAE = ("vae", "decoder.mid_block.attentions.0.proj.weight")


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_checkpoint.write_checkpoint(path, size_name="tiny", variant_name="distilled")
    return path


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def change(folder: Path, tensor: tuple[str, str], by: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Rewrite one tensor of a folder."""
    for file in sorted((folder / tensor[0]).glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        if tensor[1] in tensors:
            tensors[tensor[1]] = by(tensors[tensor[1]]).contiguous()
            save_file(tensors, file, metadata)
            return
    raise AssertionError(f"the folder has no {tensor}")


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2


def test_a_copy_is_the_same_model(checkpoint: Path, copy: Path) -> None:
    assert folder_model(checkpoint).identity == folder_model(copy).identity


@pytest.mark.parametrize("tensor", [ATTENTION, TEXT, VAE], ids=lambda pair: pair[0])
def test_one_rescaled_tensor_is_another_model(copy: Path, tensor: tuple[str, str]) -> None:
    change(copy, tensor, lambda values: values)
    same = folder_model(copy).identity
    change(copy, tensor, doubled)
    assert folder_model(copy).identity != same


@pytest.mark.parametrize("file", ["tokenizer/tokenizer.json", "text_encoder/config.json", "tokenizer/added.txt"])
def test_the_files_of_the_text_count(checkpoint: Path, copy: Path, file: str) -> None:
    with (copy / file).open("a") as opened:
        opened.write("\n")
    assert folder_model(copy).identity != folder_model(checkpoint).identity


@pytest.mark.parametrize(("place", "seen"), [(0, True), (5000, True), (9999, True), (2000, False)])
def test_what_is_seen_of_a_large_tensor(tmp_path: Path, place: int, seen: bool) -> None:
    """The limit that the docstring states: changes between the pieces are not seen."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    values = torch.zeros(10000)
    assert values.nbytes > 3 * PIECE
    save_file({"a": values}, tmp_path / "vae" / "a.safetensors")
    before = folder_digest(tmp_path)
    values[place] = 1
    save_file({"a": values}, tmp_path / "vae" / "a.safetensors")
    assert (folder_digest(tmp_path) != before) == seen


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_index\.json cannot be read"):
        folder_digest(tmp_path)


def test_a_run_is_not_resumed_with_other_weights(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tensor in (ATTENTION, TEXT):  # written once as they are, so that only values differ below
        change(copy, tensor, lambda values: values)
    out = tmp_path / "boat.mp4"
    assert main(["generate", "a red boat", "--model", str(copy), *RUN, "--out", str(out)]) == 0
    for tensor in (ATTENTION, TEXT):
        change(copy, tensor, doubled)
        capsys.readouterr()
        assert main(["generate", "--resume", "--out", str(out)]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert "the run in" in error
        assert "its weights or configs are others" in error
        change(copy, tensor, lambda values: values / 2)  # exact
    assert main(["generate", "--resume", "--out", str(out)]) == 0
