"""``helios export onnx`` and ``helios export verify``: what they write, tell and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import helios.cli.export
from helios.cli import main
from helios.pipeline.entries import PARTS
from helios.pipeline.model import sized_model

SMALL = ("--height", "64", "--width", "64", "--text-tokens", "8")


def run(*words: object) -> int:
    return main(["export", *map(str, words)])


def onnx(out: Path, *words: object) -> int:
    return run("onnx", "--size", "tiny", *SMALL, *words, "--out", out)


def told(out: Path) -> Any:
    return json.loads((out / "manifest.json").read_text())


def names(out: Path) -> list[str]:
    return [model["name"] for model in told(out)["models"]]


def test_the_default_is_the_transformer_with_its_sampler_in_bf16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert onnx(out) == 0
    shown = capsys.readouterr().out
    assert "RANDOM WEIGHTS" in shown
    assert "15 models" in shown
    assert "denoise.2.onnx" in shown
    made = told(out)
    assert {name.partition(".")[0] for name in names(out)} == {
        "weights", "prompt", "chunk", "shrink", "denoise", "guide", "step", "enter",
    }  # fmt: skip
    assert (made["precision"], made["form"], made["onnx_opset"]) == ("bf16", "standard", 23)
    assert made["model"]["variant"] == "distilled"
    assert made["model"]["identity"] == sized_model("tiny").identity
    assert set(made["programs"]) == {"chunk", "first_chunk"}
    assert {weight["dtype"] for weight in made["weights"].values()} == {"bfloat16", "float32"}


def test_parts_stages_variants_and_precisions_can_be_chosen(tmp_path: Path) -> None:
    assert onnx(tmp_path / "a", "--pyramid-stage", 1, "--precision", "fp32", "--part", "transformer") == 0
    assert names(tmp_path / "a") == ["weights", "prompt", "chunk", "denoise.1"]
    assert {weight["dtype"] for weight in told(tmp_path / "a")["weights"].values()} == {"float32"}
    assert told(tmp_path / "a")["programs"] == {}
    assert onnx(tmp_path / "b", "--variant", "base", "--part", "sampler", "--form", "annotated") == 0
    assert names(tmp_path / "b") == ["guide.0", "step.0"]
    assert onnx(tmp_path / "c", "--part", "vae-decoder", "--vae-precision", "bf16", "--vae-group", 9) == 0
    assert names(tmp_path / "c") == ["vae_decode_whole_9"]
    assert told(tmp_path / "c")["vae_precision"] == "bf16"
    assert onnx(tmp_path / "d", "--part", "vae-decoder", "--part", "vae-encoder", "--opset", 20) == 0
    assert names(tmp_path / "d") == [
        "vae_decode_first_3",
        "vae_decode_next_3",
        "vae_encode_whole_1",
        "vae_encode_first_9",
        "vae_encode_next_12",
    ]
    assert {weight["dtype"] for weight in told(tmp_path / "d")["weights"].values()} == {"float32"}


def test_a_model_folder_is_exported_with_its_own_weights(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    out = tmp_path / "out"
    assert run("onnx", "--model", checkpoint, *SMALL, "--part", "transformer", "--pyramid-stage", 0, "--out", out) == 0
    made = told(out)
    assert made["model"]["name"] == str(checkpoint)
    assert made["model"]["random_weights"] is True  # its files say so
    place = made["weights"]["blocks.1.ffn.net.2.weight"]
    data = np.fromfile(out / "weights.data", np.uint8)[place["offset"] : place["offset"] + place["bytes"]]
    for file in (checkpoint / "transformer").glob("*.safetensors"):
        with safe_open(str(file), "pt") as stored:
            if "blocks.1.ffn.net.2.weight" in stored.keys():  # noqa: SIM118
                exact = stored.get_tensor("blocks.1.ffn.net.2.weight")
    assert torch.equal(torch.from_numpy(data).view(torch.bfloat16).view(exact.shape), exact)


def test_json_is_the_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert onnx(tmp_path / "out", "--part", "sampler", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["manifest"] == told(tmp_path / "out")
    assert run("verify", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {**shown, "verified": True}


def test_verify_tells_good_from_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert onnx(out, "--pyramid-stage", 0) == 0
    assert run("verify", out) == 0
    assert "every file and every weight is as it was written" in capsys.readouterr().out
    with (out / "weights.data").open("r+b") as file:
        file.write(b"\x55")
    assert run("verify", out) == 2
    shown = capsys.readouterr().err
    assert "does not fit its digest" in shown
    assert next(iter(told(out)["weights"])) in shown


@pytest.mark.parametrize(
    ("words", "why", "fix"),
    [
        (("--precision", "fp8"), "quantize_rows", "fp32, bf16 or fp16"),
        (("--precision", "fp23"), "unknown precision", ""),
        (("--form", "loose"), "unknown form 'loose'", "--form standard"),
        (("--opset", "9"), "opset 9 of ONNX cannot be written", ""),
        (("--pyramid-stage", "3"), "no pyramid stage 3", ""),
        (("--height", "72"), "needs multiples of 64", "--height 64"),
        (("--part", "vae-decode"), "did you mean 'vae-decoder'", "vae-decoder"),
        (("--dynamic", "hight"), "did you mean 'height'", "--dynamic"),
        (("--dynamic", "height", "--form", "annotated"), "annotated form has exact sizes", "--form standard"),
        (("--vae-precision", "fp23"), "unknown VAE precision", ""),
        (("--batch", "0"), "batch is 0", ""),
        (("--variant", "base", "--height", "80", "--dynamic", "height"), "multiples of 64", "--height 64"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(
    words: tuple[str, ...], why: str, fix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert onnx(tmp_path / "out", *words) == 2
    shown = capsys.readouterr().err
    assert why in shown
    assert fix in shown.partition("fix:")[2]
    assert list(tmp_path.iterdir()) == []


def test_model_and_size_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("onnx", "--out", tmp_path / "out") == 2
    assert run("onnx", "--size", "tiny", "--model", "x", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("of a model, or of a size") == 2


def test_an_existing_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert onnx(tmp_path / "out") == 2
    assert "choose another --out, or remove it first" in capsys.readouterr().err


def test_the_help_names_the_parts_that_there_are() -> None:
    """They are written twice: help has to be quick, and where they are made torch is loaded."""
    assert helios.cli.export.PARTS == PARTS


def test_a_long_export_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(helios.cli.export, "QUIET_SECONDS", 0.0)
    assert onnx(tmp_path / "out", "--pyramid-stage", 0) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("weights: ")]
    assert len(lines) == len(told(tmp_path / "out")["weights"])
    written, total = lines[-1].removeprefix("weights: ").split(" of ")
    assert written == total
