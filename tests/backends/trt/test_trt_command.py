"""``helios trt`` on the recorder. Not run on a device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trt_rig import RecordedTrt, recorded

from helios.cli import main
from helios_trt import command
from helios_trt.inspector import Layer, by_kind, layers

SMALL = ["--size", "tiny", "--height", "64", "--width", "64", "--precision", "fp32"]


@pytest.fixture(scope="module", params=[10, 11])
def version(request: pytest.FixtureRequest) -> Iterator[int]:
    with recorded(request.param), pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_backend", lambda index, options: RecordedTrt("", index, **options))
        yield request.param


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main(["trt", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_build_makes_what_a_run_needs_and_then_it_is_there(version: int, capsys: pytest.CaptureFixture[str]) -> None:
    made = asked(capsys, "build", *SMALL)["engines"]
    names = {engine["name"].partition("_1x")[0] for engine in made}
    assert {"prompt", "chunk", "denoise.0", "step.0", "enter.1", "shrink", "vae_decode_whole"} <= names
    stages = next(engine for engine in made if engine["name"] == "denoise.0")
    assert list(stages["graphs"]) == ["denoise.0", "denoise.1", "denoise.2"]
    again = asked(capsys, "build", *SMALL)["engines"]
    assert {engine["sha256"] for engine in again} == {engine["sha256"] for engine in made}
    assert {engine["built"] for engine in again} == {engine["built"] for engine in made}
    assert main(["trt", "build", *SMALL]) == 0
    assert f"{len(made)} engines in " in " ".join(capsys.readouterr().out.split())


def test_list_needs_no_gpu_and_no_tensorrt(version: int, capsys: pytest.CaptureFixture[str]) -> None:
    made = asked(capsys, "build", *SMALL)["engines"]
    assert {engine["entry"] for engine in made} <= {engine["entry"] for engine in asked(capsys, "list")["engines"]}
    assert main(["trt", "list"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "on device 0, sm 0.0" in out
    assert "of 200.00 GB in" in out


def test_inspect_shows_layers(version: int, capsys: pytest.CaptureFixture[str]) -> None:
    made = asked(capsys, "build", *SMALL)["engines"]
    entry = next(engine["entry"] for engine in made if engine["name"] == "shrink")
    told = asked(capsys, "inspect", entry)
    assert told["entry"]["entry"] == entry
    assert told["engine"]["Layers"]
    assert main(["trt", "inspect", entry, "--layers"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "kind types layers ONNX nodes in them kgen FP32" in out
    assert "__my_" in out


@pytest.fixture
def copied(version: int, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Path:
    """An engine in a folder of its own, with its JSON."""
    made = asked(capsys, "build", *SMALL)["engines"]
    path = Path(next(engine["path"] for engine in made if engine["name"] == "shrink"))
    for file in (path, path.with_suffix(".json")):
        shutil.copy(file, tmp_path)
    return tmp_path / path.name


@pytest.mark.parametrize(
    ("where", "key", "value", "said"),
    [
        ("environment", "tensorrt", "9.9.9", "was built for TensorRT 9.9.9 on device 0, sm 0.0; here is TensorRT 1"),
        ("device", "name", "another GPU", "on another GPU, sm 0.0; here is"),
        ("device", "capability", "9.9", "on device 0, sm 9.9; here is"),
    ],
)
def test_inspect_of_an_engine_for_elsewhere_says_so_and_leaves_it(
    copied: Path, capsys: pytest.CaptureFixture[str], where: str, key: str, value: str, said: str
) -> None:
    beside = copied.with_suffix(".json")
    facts = json.loads(beside.read_text())
    (facts["environment"] if where == "environment" else facts["environment"]["device"])[key] = value
    beside.write_text(json.dumps(facts))
    assert main(["trt", "inspect", str(copied)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error
    assert "rm " not in error


def test_inspect_of_an_engine_built_under_another_driver(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which may load all the same."""
    beside = copied.with_suffix(".json")
    beside.write_text(beside.read_text().replace('"driver": "0.0"', '"driver": "1.0"'))
    assert json.loads(beside.read_text())["environment"]["device"]["driver"] == "1.0"
    assert asked(capsys, "inspect", str(copied))["engine"]["Layers"]


def test_inspect_of_an_empty_file(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied.write_bytes(b"")
    assert main(["trt", "inspect", str(copied)]) != 0
    error = capsys.readouterr().err
    assert "is empty" in error
    assert "mmap" not in error
    assert "Traceback" not in error


def test_list_passes_over_json_of_something_else(version: int, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = asked(capsys, "list")["engines"]
    cache.mkdir(parents=True, exist_ok=True)
    stranger = cache / "stranger-0.json"
    stranger.write_text('{"format": "helios-trt-1", "bytes": 1}')
    try:
        assert main(["trt", "list"]) == 0
        assert "stranger" not in capsys.readouterr().out
        assert asked(capsys, "list")["engines"] == before
    finally:
        stranger.unlink()


def test_help_offers_what_engines_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trt", "build", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "|".join(RecordedTrt.precisions) in out
    assert "fp8" not in out
    assert "Way to sample." in out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["build"], "name either a model or a size"),
        (["build", "--size", "tiny", "--model", "x"], "name either a model or a size"),
        (["build", "--size", "tiny", "--precision", "fp8"], "fp8"),
        (["build", "--size", "tiny", "--backend-option", "weights=twice"], "twice"),
        (["inspect", "nothing"], "no engine is called 'nothing'"),
    ],
)
def test_mistakes_are_told(version: int, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str) -> None:
    capsys.readouterr()
    assert main(["trt", *arguments]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert "Traceback" not in error


def test_layers_of_both_versions_and_without_details() -> None:
    """The forms that the inspector's documentation shows: 10 has one text for format and type, 11 has two."""
    ten = {"Name": "a", "LayerType": "gemm", "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear BF16"}]}
    eleven = {"Name": "b", "LayerType": "gemm", "Outputs": [{"Name": "y", "Format": "kLINEAR", "DataType": "BFloat16"}]}
    half = {
        "Name": "c",
        "Outputs": [{"Name": "y", "DataType": "Half"}],
        "Metadata": "[ONNX Layer: p]\x1e[ONNX Layer: q]",
    }
    found = layers({"Layers": [ten, eleven, half, "d + e"]})
    assert [layer.types for layer in found] == [("BF16",), ("BF16",), ("FP16",), ()]
    assert found[2].nodes == ("p", "q")
    assert found[3] == Layer("d + e")
    assert by_kind(found)[0] == ("gemm", "BF16", 2, 0)
    assert layers({}) == []
