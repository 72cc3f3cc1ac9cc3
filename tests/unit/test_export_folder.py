"""A folder of exported models: each weight once, checked when it is read, and there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from helios.errors import (
    CheckpointError,
    GraphError,
    HeliosError,
    InputError,
    StorageError,
    UnsupportedNode,
)
from helios.export import folder as folders
from helios.export import weights as files
from helios.export.emitter import Options
from helios.export.folder import Exported, export, load
from helios.export.manifest import About, digest, schema
from helios.graph import TensorType
from helios.passes import Plan
from helios.pipeline.entries import PARTS, BothWeights, Entries
from helios.pipeline.model import sized_model
from helios.precision import precision

MODEL = sized_model("tiny", "distilled")
ABOUT = About(
    {"name": "tiny", "variant": "distilled", "identity": "0123456789abcdef", "random_weights": True},
    "bf16",
    {"height": 64, "width": 64, "batch": 1, "text_tokens": 8},
)


def plan(precision_name: str = "bf16", stage: int | None = 1, parts: Any = PARTS[:2]) -> Plan:
    return Entries(MODEL, 64, 64, 1, 8, precision(precision_name), parts, stage).plan()


SMALL = plan()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A good folder. Not to be changed: ``copied`` gives one that may be."""
    return export(tmp_path_factory.mktemp("export") / "good", [SMALL], BothWeights(MODEL), ABOUT)


@pytest.fixture
def copied(made: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.path, tmp_path / "copy"))


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_there_is_a_model_for_each_graph_that_computes(made: Exported) -> None:
    names = [name for name, graph in SMALL.graphs.items() if graph.nodes]
    assert [model["name"] for model in made.manifest["models"]] == names
    there = {path.name for path in made.path.iterdir()}
    assert there == {f"{name}.onnx" for name in names} | {"weights.data", "manifest.json"}
    assert made.model("denoise.1") == made.path / "denoise.1.onnx"
    assert made.nbytes == sum(path.stat().st_size for path in made.path.iterdir() if path.name != "manifest.json")
    with pytest.raises(GraphError, match=r"no model 'denoise\.7'"):
        made.model("denoise.7")


def test_the_manifest_says_which_graphs_it_was_made_of(made: Exported) -> None:
    told = made.manifest
    assert told["plan_sha256"] == SMALL.digest
    assert {model["name"]: model["graph_sha256"] for model in told["models"]} == {
        name: graph.digest for name, graph in SMALL.graphs.items() if graph.nodes
    }
    assert told["notice"].startswith("RANDOM WEIGHTS")
    assert json.loads((made.path / "manifest.json").read_text()) == told


def test_models_tell_of_random_weights_and_of_their_plan(made: Exported) -> None:
    model = onnx.load(made.model("denoise.1"), load_external_data=False)
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert model.doc_string.startswith("RANDOM WEIGHTS")
    assert told["ai.helios.plan.sha256"] == SMALL.digest
    assert told["ai.helios.graph.sha256"] == SMALL.graphs["denoise.1"].digest


def test_each_weight_stands_once_in_the_dtype_of_the_graphs(made: Exported) -> None:
    source, data = BothWeights(MODEL), np.memmap(made.path / "weights.data", np.uint8, "r")
    wanted = {v.name: v.dtype for v in SMALL.graphs["denoise.1"].inputs if v.name in made.manifest["weights"]}
    assert {torch.float32, torch.bfloat16} == set(wanted.values())
    ends = [0]
    for name, told in made.manifest["weights"].items():
        stored = torch.from_numpy(np.array(data[told["offset"] : told["offset"] + told["bytes"]]))
        exact = source.read(name)
        assert torch.equal(stored.view(wanted.get(name, exact.dtype)).view(exact.shape), exact.to(wanted.get(name)))
        assert ends[-1] <= told["offset"] < ends[-1] + files.ALIGNMENT
        ends.append(told["offset"] + told["bytes"])
    assert ends[-1] == made.manifest["data"]["bytes"] == len(data)


def test_models_refer_to_the_one_file_and_hold_no_weight(made: Exported) -> None:
    for told in made.manifest["models"]:
        model = onnx.load(made.path / told["file"], load_external_data=False)
        outside = [x for x in model.graph.initializer if x.data_location == onnx.TensorProto.EXTERNAL]
        assert {x.name for x in outside} == set(told["weights"])
        for tensor in outside:
            where = {entry.key: entry.value for entry in tensor.external_data}
            weight = made.manifest["weights"][tensor.name]
            expected = {"location": "weights.data", "offset": str(weight["offset"]), "length": str(weight["bytes"])}
            assert where == expected


def full(kind: onnx.TypeProto) -> bool:
    dims = kind.tensor_type.shape.dim
    return kind.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)


@pytest.mark.parametrize("options", [Options(), Options("annotated"), Options(opset=18)], ids=["23", "annotated", "18"])
def test_onnx_itself_finds_every_shape(options: Options, tmp_path: Path) -> None:
    """Of models without what we say of shapes inside: strict inference alone gives all of them, the very same."""
    everything = plan("fp32", None, PARTS)
    made = export(tmp_path / "onnx", [everything], BothWeights(MODEL), ABOUT, options)
    for told in made.manifest["models"]:
        onnx.checker.check_model(str(made.path / told["file"]), full_check=True)
        model = onnx.load(made.path / told["file"], load_external_data=False)
        ours = {value.name: value.type for value in model.graph.value_info}
        assert all(full(kind) for kind in ours.values())
        del model.graph.value_info[:]
        found = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        theirs = {value.name: value.type for value in found.graph.value_info}
        names = {name for node in model.graph.node for name in node.output} - {x.name for x in model.graph.output}
        assert names <= set(ours)
        assert {name for name in names if not (name in theirs and full(theirs[name]))} == set(), told["name"]
        assert {name for name in names if theirs[name] != ours[name]} == set(), told["name"]


# --- the schema -------------------------------------------------------------------------------------------------------


def test_the_schema_describes_what_is_written(made: Exported) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.Draft202012Validator(schema()).validate(dict(made.manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.pop("opset"),
        lambda told: told.update(more=1),
        lambda told: told["models"][0].update(file="../weights.onnx"),
        lambda told: told["data"].update(file="/etc/passwd"),
        lambda told: next(iter(told["weights"].values())).update(offset=4095),
        lambda told: next(iter(told["weights"].values())).update(dtype="complex64"),
        lambda told: told["models"][-1]["inputs"][0].update(source={"from": "somewhere"}),
    ],
    ids=["missing", "extra", "parent", "absolute", "unaligned", "dtype", "source"],
)
def test_the_schema_refuses(change: Callable[[Any], Any], copied: Path) -> None:
    rewrite(copied, change, sign=True)
    with pytest.raises(GraphError, match=r"manifest\.json, \$"):
        load(copied)


def rewrite(folder: Path, change: Callable[[Any], Any], *, sign: bool) -> None:
    path = folder / "manifest.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told | ({"sha256": digest(told)} if sign else {})))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_good_folder_is_read(copied: Path, made: Exported) -> None:
    assert load(copied).manifest == made.manifest
    assert load(copied, whole=False).path == copied


def test_a_change_of_the_manifest_is_seen(copied: Path) -> None:
    rewrite(copied, lambda told: told["sizes"].update(height=128), sign=False)
    with pytest.raises(GraphError, match="does not fit its own digest"):
        load(copied)


@pytest.mark.parametrize(
    ("text", "why"), [("{", "is not JSON"), ("[]", "is no manifest"), ('{"format": "other"}', "is no manifest")]
)
def test_other_files_are_no_manifests(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(GraphError, match=why):
        load(tmp_path)
    with pytest.raises(GraphError, match="No such file"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("change", [{"opset": 1}, {"opset_sha256": "0" * 64}])
def test_another_opset_is_refused(change: dict[str, Any], copied: Path) -> None:
    rewrite(copied, lambda told: told.update(change), sign=True)
    with pytest.raises(GraphError, match="was written for opset"):
        load(copied)


def test_a_changed_model_is_named(copied: Path) -> None:
    path = copied / "denoise.1.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(GraphError, match=r"denoise\.1\.onnx does not fit its digest"):
        load(copied, whole=False)
    path.unlink()
    with pytest.raises(GraphError, match=r"cannot read the model .*denoise\.1\.onnx: No such file"):
        load(copied, whole=False)


def test_a_changed_weight_is_named(copied: Path, made: Exported) -> None:
    name, told = list(made.manifest["weights"].items())[20]
    with (copied / "weights.data").open("r+b") as file:
        file.seek(told["offset"] + told["bytes"] - 1)
        last = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(GraphError, match=f"weights.data: weight '{name}' .*does not fit its digest"):
        load(copied)
    load(copied, whole=False)  # does not read them


def test_missing_and_cut_weights_are_named(copied: Path, made: Exported) -> None:
    name, told = list(made.manifest["weights"].items())[20]
    os.truncate(copied / "weights.data", told["offset"] + 1)
    for whole in (True, False):
        with pytest.raises(GraphError, match=f"weights.data has .* bytes, wanted .*: cut off in weight '{name}'"):
            load(copied, whole=whole)
    (copied / "weights.data").unlink()
    with pytest.raises(GraphError, match=r"cannot read the weights in .*weights\.data: No such file"):
        load(copied, whole=False)


# --- writing: before anything is written ------------------------------------------------------------------------------


class Unread:
    def read(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")


def nothing_at(parent: Path) -> None:
    assert list(parent.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        export(tmp_path / "out", [SMALL], Unread(), ABOUT)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists already"):
        export(tmp_path / "link", [SMALL], Unread(), ABOUT)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match=r"file is a file"):
        export(tmp_path / "file" / "deep" / "out", [SMALL], Unread(), ABOUT)
    assert (tmp_path / "file").read_text() == "kept"


def test_an_op_without_a_form_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedNode, match=r"(?s)quantize_rows.*to_q\.weight: bfloat16\[24,24\]") as raised:
        export(tmp_path / "out", [plan("fp8")], Unread(), ABOUT)
    assert "fp32, bf16 or fp16" in raised.value.fix
    nothing_at(tmp_path)


def test_too_little_room_is_told_before_a_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"needs .* where 100\.0 kB are free"):
        export(tmp_path / "out", [SMALL], Unread(), ABOUT)
    nothing_at(tmp_path)


def test_what_a_killed_export_left_does_not_count_as_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".out.part-1"
    left.mkdir()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0) if left.exists() else usage)
    load(export(tmp_path / "out", [SMALL], BothWeights(MODEL), ABOUT).path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_onnx_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(HeliosError, match="which is not installed") as raised:
        export(tmp_path / "out", [SMALL], Unread(), ABOUT)
    assert raised.value.fix == "pip install 'helios-hal[onnx]'"


# --- writing: what goes wrong in the middle ---------------------------------------------------------------------------


class Stops(BothWeights):
    """Gives some weights, then raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(MODEL)
        self.left, self.error = 10, error

    def read(self, name: str) -> Tensor:
        self.left -= 1
        if not self.left:
            raise self.error
        return super().read(name)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StorageError),
        (CheckpointError("damaged"), CheckpointError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["full", "checkpoint", "ctrl-c"],
)
def test_what_breaks_off_leaves_nothing(error: BaseException, told: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(told):
        export(tmp_path / "out", [SMALL], Stops(error), ABOUT)
    nothing_at(tmp_path)


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=False)
    if done.returncode:
        pytest.skip("a disk of its own can be mounted by root alone")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own can be mounted by root alone")
def test_a_disk_that_fills_up_is_told_and_left_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may fill it after the room was counted."""
    monkeypatch.setattr(folders, "need_space", lambda *args, **kwargs: None)
    with small_disk(tmp_path / "disk", 256 << 10):
        with pytest.raises(StorageError, match="No space left on device") as raised:
            export(tmp_path / "disk" / "out", [SMALL], BothWeights(MODEL), ABOUT)
        assert "free some room" in raised.value.fix
        nothing_at(tmp_path / "disk")


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    class Wrong(BothWeights):
        def read(self, name: str) -> Tensor:
            return super().read(name)[:1]

    with pytest.raises(CheckpointError, match=r"weight '.*' has shape .*, the graphs take"):
        export(tmp_path / "out", [SMALL], Wrong(MODEL), ABOUT)
    nothing_at(tmp_path)


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
import test_export_folder as tests
class Slow(tests.BothWeights):
    left = 10
    def read(self, name):
        self.left -= 1
        if not self.left:
            print("half", flush=True)
            time.sleep(60)
        return super().read(name)
tests.export(sys.argv[1], [tests.SMALL], Slow(tests.MODEL), tests.ABOUT)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_export_is_cleaned_up_by_the_next(how: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(out), str(Path(__file__).parent)]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **path}) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"half\n"
        with pytest.raises(StorageError, match="another export writes"):
            export(out, [SMALL], Unread(), ABOUT)
        run.send_signal(how)
        run.wait(timeout=20)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([] if how == signal.SIGINT else [f".out.part-{run.pid}"])
    made = export(out, [SMALL], BothWeights(MODEL), ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load(made.path)


# --- the file of weights alone ----------------------------------------------------------------------------------------


def test_an_empty_export_has_an_empty_file(tmp_path: Path) -> None:
    made = export(tmp_path / "out", [plan(parts=["sampler"])], Unread(), ABOUT)
    assert (tmp_path / "out" / "weights.data").stat().st_size == 0
    assert load(made.path).manifest["weights"] == {}


def test_weights_are_aligned_and_need_not_be_contiguous(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(12.0).reshape(3, 4).t()}

    class Reader:
        def read(self, name: str) -> Tensor:
            return tensors[name]

    places = files.arrange({name: TensorType(tuple(t.shape), torch.float32) for name, t in tensors.items()})
    told: list[int] = []
    digests = files.write(tmp_path / "w", places, Reader(), told.append)
    data = np.fromfile(tmp_path / "w", np.float32)
    assert data[:6].tolist() == [*range(6)]
    assert data[1024:].reshape(4, 3).tolist() == tensors["b"].tolist()
    assert told == [24, 4096 + 48]
    files.require_whole(tmp_path / "w", [(places[n], digests[n]) for n in places], size=4096 + 48)
    with pytest.raises(GraphError, match="weight 'b'"):
        files.require_whole(tmp_path / "w", [(places[n], digests["a"]) for n in places], size=4096 + 48)
