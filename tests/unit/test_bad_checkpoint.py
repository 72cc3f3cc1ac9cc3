"""Damaged, incomplete, hostile and contradictory checkpoints: each refused with file and tensor named."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helios.errors import CheckpointError
from helios.model.folder import model_folder
from helios.model.weights import SafetensorsFolder, check

FILE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
FIRST, SECOND = (f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))


def raw_file(folder: Path, header: object, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


GOOD = entry(0, 8)


def test_the_hand_made_file_is_good_before_it_is_damaged(tmp_path: Path) -> None:
    raw_file(tmp_path, {"a": GOOD, "__metadata__": {"format": "pt"}}, struct.pack("<2f", 1, 2))
    assert SafetensorsFolder(tmp_path).read("a").tolist() == [1, 2]


HEADERS: dict[str, tuple[object, bytes, str]] = {
    "truncated data": ({"a": GOOD}, bytes(7), r"truncated: tensor 'a' ends at byte 8 of the data, the file has 7"),
    "bytes after the last": ({"a": GOOD}, bytes(9), "1 bytes after its last tensor"),
    "hole": ({"a": GOOD, "b": entry(12, 16)}, bytes(16), "tensor 'b' leaves a hole"),
    "overlap": ({"a": GOOD, "b": entry(4, 12)}, bytes(12), "tensor 'b' overlaps"),
    "same bytes twice": ({"a": GOOD, "b": entry(0, 8)}, bytes(8), "tensor 'b' overlaps"),
    "length against shape": ({"a": entry(0, 8, [3])}, bytes(8), "'a' of shape .* needs 12 bytes"),
    "length against dtype": ({"a": entry(0, 8, [2], "BF16")}, bytes(8), "needs 4 bytes"),
    "backwards": ({"a": entry(8, 0, [2])}, bytes(8), "data_offsets give -8"),
    "unknown dtype": ({"a": entry(0, 8, [2], "F7")}, bytes(8), "dtype 'F7', which is unknown"),
    "dtype is a list": ({"a": entry(0, 8, [2], ["F32"])}, bytes(8), "which is unknown"),
    "negative size": ({"a": entry(0, 8, [-1, -2])}, bytes(8), "no sizes"),
    "fraction": ({"a": entry(0, 8, [2.0])}, bytes(8), "no sizes"),
    "true as a size": ({"a": entry(0, 4, [True])}, bytes(4), "no sizes"),
    "three offsets": ({"a": GOOD | {"data_offsets": [0, 4, 8]}}, bytes(8), "no sizes"),
    "huge size": ({"a": entry(0, 8, [1 << 62, 1 << 62])}, bytes(8), "needs"),
    "missing key": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "lacks one of"),
    "extra key": ({"a": GOOD | {"stride": [1]}}, bytes(8), "lacks one of"),
    "entry is a number": ({"a": 3}, bytes(8), "lacks one of"),
    "header is a list": ([GOOD], bytes(8), "no JSON object"),
    "header is no JSON": (b"\x80\x02}q\x00.", bytes(8), "not JSON"),
    "name twice": (b'{"a": %s, "a": %s}' % ((json.dumps(GOOD).encode(),) * 2), bytes(8), "'a' stands twice"),
    "deep nesting": (b'{"a":' * 100_000, b"", "not JSON"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_files_are_refused(tmp_path: Path, case: str) -> None:
    header, data, message = HEADERS[case]
    raw_file(tmp_path, header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFolder(tmp_path)
    assert FILE in caught.value.why


@pytest.mark.parametrize(
    ("length", "message"), [(1 << 60, "not a safetensors file"), (99_000_000, "truncated: its header needs")]
)
def test_header_lengths_beyond_the_file_are_refused_before_they_are_read(
    tmp_path: Path, length: int, message: str
) -> None:
    raw_file(tmp_path, {"a": GOOD}, bytes(8), length)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(tmp_path)


def test_a_file_shorter_than_its_first_field(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="has 3 bytes"):
        SafetensorsFolder(tmp_path)


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / FILE)
    source = SafetensorsFolder(tmp_path)
    with (tmp_path / FILE).open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(CheckpointError, match="became shorter"):
        source.read("a")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nan_and_infinity_are_found_wherever_they_are(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    for position in (0, 4999, 9999):
        tensor = torch.ones(100, 100, dtype=dtype)
        tensor.view(-1)[position] = value
        save_file({"fine": torch.ones(2), "blocks.0.ffn.weight": tensor}, tmp_path / FILE)
        source = SafetensorsFolder(tmp_path)
        assert source.read("fine").tolist() == [1, 1]
        with pytest.raises(CheckpointError, match=rf"{FILE}: tensor 'blocks\.0\.ffn\.weight' holds NaN or infinity"):
            source.read("blocks.0.ffn.weight")


def test_nan_in_fp8(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match="'a' holds NaN"):
        SafetensorsFolder(tmp_path).read("a")


def shards(folder: Path) -> dict[str, str]:
    """Two good shards and their index."""
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / FIRST)
    save_file({"c": torch.ones(4)}, folder / SECOND)
    weight_map = {"a": FIRST, "b": FIRST, "c": SECOND}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_good_shards_read(tmp_path: Path) -> None:
    shards(tmp_path)
    source = SafetensorsFolder(tmp_path)
    assert {name: tuple(source.read(name).shape) for name in source.tensors} == {"a": (2,), "b": (3,), "c": (4,)}
    assert source.where("c").endswith(SECOND)


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / SECOND).unlink()
    with pytest.raises(CheckpointError, match=rf"{INDEX} names the shard {SECOND}, which is missing"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x", "C:x", "", ".."]
)
def test_an_index_that_names_a_path_outside_its_folder(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "transformer"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file({"c": torch.ones(4)}, place / "x.safetensors")
    write_index(folder, shards(folder) | {"c": shard})
    with pytest.raises(CheckpointError, match=f"{INDEX} names .* a path outside its folder"):
        SafetensorsFolder(folder)


def test_an_index_at_odds_with_its_shards(tmp_path: Path) -> None:
    weight_map = shards(tmp_path)
    write_index(tmp_path, weight_map | {"d": SECOND})
    with pytest.raises(CheckpointError, match=f"places tensor 'd' in {SECOND}, which lacks it"):
        SafetensorsFolder(tmp_path)
    write_index(tmp_path, {"a": FIRST, "c": SECOND})
    with pytest.raises(CheckpointError, match=f"{FIRST} holds tensor 'b', which {INDEX} does not know"):
        SafetensorsFolder(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    shards(tmp_path)
    save_file({"c": torch.ones(4), "a": torch.zeros(2)}, tmp_path / SECOND)
    with pytest.raises(CheckpointError, match=f"{SECOND} holds tensor 'a', which {INDEX} places elsewhere"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("content", [{}, {"weight_map": [1]}, {"weight_map": {"a": 3}}])
def test_an_index_without_a_map(tmp_path: Path, content: object) -> None:
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="has no weight_map"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.ckpt", "weights.pth"])
def test_pickled_weights_are_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(CheckpointError, match=r"pickled weights .* refused") as caught:
        SafetensorsFolder(tmp_path)
    assert "save_file" in caught.value.fix
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_weights_and_a_path_without_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        SafetensorsFolder(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        SafetensorsFolder(tmp_path / "none")


def test_missing_extra_misshapen_and_integer_tensors_are_named_in_one_error(tmp_path: Path) -> None:
    tensors = {"shape": torch.ones(2, 3), "int": torch.ones(2, dtype=torch.int8), "extra": torch.ones(1)}
    save_file(tensors, tmp_path / FILE)
    expected: dict[str, tuple[int, ...]] = {"shape": (3, 2), "int": (2,), **{f"gone{i:02}": (1,) for i in range(12)}}
    with pytest.raises(CheckpointError) as caught:
        check(SafetensorsFolder(tmp_path), expected)
    why = caught.value.why
    assert "12 missing: gone00, " in why
    assert "gone09, … 2 more" in why
    assert f"1 unexpected: extra in {FILE}" in why
    assert f"1 wrong shape: shape in {FILE} is [2, 3], wanted [3, 2]" in why
    assert f"1 wrong dtype: int in {FILE} is int8, wanted floating point" in why


# --- whole folders ---


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "tiny"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_good_folder_is_good(checkpoint: Path) -> None:
    folder = model_folder(checkpoint)
    assert folder.variant == "distilled"
    assert folder.text is not None
    for source in (folder.transformer_weights(), folder.vae_weights()):
        assert all(source.read(name).shape == info.shape for name, info in source.tensors.items())


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
    "another pipeline": (lambda f: edit(f / "model_index.json", _class_name="WanPipeline"), "class_name 'WanPipeline'"),
    "another transformer": (
        lambda f: edit(f / "model_index.json", transformer=["diffusers", "WanTransformer3DModel"]),
        "transformer is a WanTransformer3DModel, wanted HeliosTransformer3DModel",
    ),
    "no vae": (lambda f: edit(f / "model_index.json", vae=[None, None]), "lists no vae"),
    "tokenizer alone": (lambda f: edit(f / "model_index.json", text_encoder=[None, None]), "without the other"),
    "missing config": (lambda f: (f / "vae" / "config.json").unlink(), "lacks vae/config.json"),
    "missing folder": (
        lambda f: shutil.rmtree(f / "text_encoder"),
        "lacks text_encoder/config.json, text_encoder/model",
    ),
    "missing shard": (
        lambda f: next((f / "transformer").glob("*-00002-of-*")).unlink(),
        r"lacks transformer/diffusion_pytorch_model-00002-of-00003\.safetensors",
    ),
    "missing tokenizer": (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), "lacks tokenizer/tokenizer.json"),
    "bad field": (lambda f: edit(f / "transformer" / "config.json", eps=-1), r"transformer/config\.json: eps"),
    "channels": (
        lambda f: edit(f / "vae" / "config.json", z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        "takes 16 latent channels, the vae makes 4",
    ),
    "text width": (
        lambda f: edit(f / "transformer" / "config.json", text_dim=64),
        "text of width 64, text_encoder makes 32",
    ),
    "scheduler class": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", _class_name="HeliosScheduler"),
        "lists a HeliosDMDScheduler, scheduler_config.json is of a HeliosScheduler",
    ),
    "not distilled": (lambda f: edit(f / "model_index.json", is_distilled=False), "is_distilled is False"),
    "pyramid of one stage": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", stages=1, stage_range=[0.0, 1.0]),
        "lists a HeliosPyramidPipeline, whose scheduler has several stages; .* has stages 1",
    ),
    "stages without a pyramid": (
        lambda f: edit(f / "model_index.json", _class_name="HeliosPipeline"),
        "lists a HeliosPipeline, whose scheduler has one stage; .* has stages 3",
    ),
    "no history": (
        lambda f: edit(f / "transformer" / "config.json", has_multi_term_memory_patch=False),
        r"has_multi_term_memory_patch is false in transformer/config\.json",
    ),
    "is_distilled is a text": (lambda f: edit(f / "model_index.json", is_distilled="yes"), "'is_distilled' is 'yes'"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_refused(copy: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        model_folder(copy)
    assert caught.value.fix


def test_config_values_that_contradict_the_weights(copy: Path) -> None:
    edit(copy / "transformer" / "config.json", num_layers=3, ffn_dim=64)
    with pytest.raises(CheckpointError) as caught:
        model_folder(copy).transformer_weights()
    assert "27 missing: blocks.2." in caught.value.why
    assert "wrong shape: blocks.0.ffn.net.0.proj.weight" in caught.value.why
    edit(copy / "vae" / "config.json", base_dim=4)
    with pytest.raises(CheckpointError, match="wrong shape"):
        model_folder(copy).vae_weights()


def test_a_component_given_for_the_folder_points_to_its_parent(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        model_folder(checkpoint / "transformer")
    assert caught.value.fix == f"give its parent, {checkpoint}"


def test_a_folder_without_text_encoder_is_fine(copy: Path) -> None:
    edit(copy / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    shutil.rmtree(copy / "text_encoder")
    folder = model_folder(copy)
    assert folder.text is None
    assert "tokenizer" not in folder.classes
