"""Reading weights: values, names, random sources, and the memory that a load takes."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helios.errors import CheckpointError
from helios.model.random_weights import RandomWeights
from helios.model.safetensors_io import TensorInfo
from helios.model.weights import Renamed, SafetensorsFolder, check, current_names

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    torch.bool,
]


def single(folder: Path, tensors: Mapping[str, torch.Tensor], name: str = "diffusion_pytorch_model") -> Path:
    save_file(dict(tensors), folder / f"{name}.safetensors")
    return folder


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_reads_to_the_bits_that_were_written(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2 if dtype is torch.bool else 60, (7, 3, dtype.itemsize), dtype=torch.uint8)
    written = raw.view(dtype).squeeze(-1)
    source = SafetensorsFolder(single(tmp_path, {"a": written, "b": written[:2].clone()}))
    assert source.tensors == {"a": TensorInfo((7, 3), dtype), "b": TensorInfo((2, 3), dtype)}
    for name, wanted in (("b", written[:2]), ("a", written)):
        read = source.read(name)
        assert (read.shape, read.dtype, read.is_contiguous()) == (wanted.shape, dtype, True)
        assert bits(read) == bits(wanted)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    source = SafetensorsFolder(single(tmp_path, {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}, "model"))
    assert source.read("scalar").item() == 2.5
    assert source.read("empty").shape == (0, 4)


def test_a_read_is_fresh_memory(tmp_path: Path) -> None:
    source = SafetensorsFolder(single(tmp_path, {"a": torch.ones(3)}))
    source.read("a").zero_()
    assert source.read("a").tolist() == [1, 1, 1]


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    single(blobs, {"a": torch.ones(3)}, "5feceb66")
    (folder / "model.safetensors").symlink_to("../blobs/5feceb66.safetensors")
    assert SafetensorsFolder(folder).read("a").tolist() == [1, 1, 1]


def test_names_of_early_checkpoints(tmp_path: Path) -> None:
    old = {"scale_shift_table": 1.0, "multi_term_memory_patch.patch_mid.weight": 2.0, "blocks.0.scale_shift_table": 3.0}
    source = current_names(SafetensorsFolder(single(tmp_path, {n: torch.tensor(v) for n, v in old.items()})))
    new = {"norm_out.scale_shift_table": 1.0, "patch_mid.weight": 2.0, "blocks.0.scale_shift_table": 3.0}
    assert {name: source.read(name).item() for name in source.tensors} == new
    assert source.where("patch_mid.weight").endswith("diffusion_pytorch_model.safetensors")


def test_names_of_today_need_no_renaming(tmp_path: Path) -> None:
    source = SafetensorsFolder(single(tmp_path, {"patch_mid.weight": torch.ones(1)}))
    assert current_names(source) is source


def test_old_and_new_name_of_one_tensor_are_refused(tmp_path: Path) -> None:
    both = {"patch_mid.weight": torch.ones(1), "multi_term_memory_patch.patch_mid.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="old and the new name"):
        current_names(SafetensorsFolder(single(tmp_path, both)))


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    shapes = {f"blocks.{i}.to_q.weight": (8, 32) for i in range(3)}
    one, other = RandomWeights(shapes, seed=1), RandomWeights(dict(reversed(shapes.items())), seed=1)
    forward = {name: one.read(name) for name in shapes}
    backward = {name: other.read(name) for name in reversed(shapes)}
    assert all(torch.equal(forward[name], backward[name]) for name in shapes)
    first, second = forward["blocks.0.to_q.weight"], forward["blocks.1.to_q.weight"]
    assert not torch.equal(first, second)
    assert not torch.equal(first, RandomWeights(shapes, seed=2).read("blocks.0.to_q.weight"))


def test_random_weights_are_rounded_from_float32() -> None:
    shapes = {"a.weight": (16, 16)}
    wide = RandomWeights(shapes, seed=0).read("a.weight")
    assert torch.equal(RandomWeights(shapes, seed=0, dtype=torch.bfloat16).read("a.weight"), wide.bfloat16())


@pytest.mark.parametrize(
    ("name", "shape", "mean", "deviation"),
    [
        ("ffn.net.0.proj.weight", (256, 400), 0.0, 0.05),
        ("patch_mid.weight", (256, 16, 2, 4, 4), 0.0, 512**-0.5),
        ("attn1.norm_q.weight", (40000,), 1.0, 0.1),
        ("conv.norm1.gamma", (40000, 1, 1, 1), 1.0, 0.1),
        ("attn1.history_key_scale", (40000,), 1.0, 0.1),
        ("proj_out.bias", (40000,), 0.0, 0.02),
        ("norm_out.scale_shift_table", (1, 2, 40000), 0.0, 0.005),
    ],
)
def test_random_weights_have_the_stated_scale(name: str, shape: tuple[int, ...], mean: float, deviation: float) -> None:
    drawn = RandomWeights({name: shape}, seed=3).read(name).double()
    error_of_mean = deviation / math.sqrt(drawn.numel())
    assert abs(drawn.mean().item() - mean) < 5 * error_of_mean
    assert drawn.std().item() == pytest.approx(deviation, rel=0.03)


def test_check_accepts_what_fits_and_ignores_what_it_is_told() -> None:
    source = RandomWeights({"a": (2, 3), "b.norm_added_q.weight": (4,)}, seed=0)
    check(source, {"a": (2, 3)}, ignore=("norm_added_q",))
    with pytest.raises(CheckpointError, match=r"1 unexpected: b\.norm_added_q\.weight"):
        check(source, {"a": (2, 3)})


def test_renamed_sources_read_through() -> None:
    source = RandomWeights({"a": (2, 3)}, seed=0)
    assert torch.equal(Renamed(source, {"b": "a"}).read("b"), source.read("a"))


LOAD = """
import resource, sys
import torch
from helios.model.weights import SafetensorsFolder
torch.zeros(4).aminmax()
def peak():  # of this process image: ru_maxrss would carry the parent's over the exec
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
source = SafetensorsFolder(sys.argv[1])
kept = {name: source.read(name) for name in source.tensors}
size = sum(t.numel() * t.element_size() for t in kept.values())
print(size, peak() - before)
"""


def sharded(folder: Path, megabytes: int, shards: int) -> None:
    """Shards of four equal tensors each, with real bytes (a sparse file would read from nowhere)."""
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        rows = megabytes * 1_000_000 // (shards * 4 * 2 * 1000)
        tensors = {f"t{shard}.{i}": torch.full((rows, 1000), 0.5, dtype=torch.bfloat16) for i in range(4)}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = '{"weight_map": {' + ", ".join(f'"{n}": "{f}"' for n, f in weight_map.items()) + "}}"
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index)


@pytest.mark.parametrize("megabytes", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_loading_peaks_at_no_more_than_1_2_times_the_checkpoint(tmp_path: Path, megabytes: int) -> None:
    sharded(tmp_path, megabytes, shards=5)
    run = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True)
    size, growth = map(int, run.stdout.split())
    assert size == pytest.approx(megabytes * 1e6, rel=0.01)
    assert size * 0.9 < growth <= size * 1.2
