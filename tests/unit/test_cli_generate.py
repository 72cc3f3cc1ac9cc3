"""``helios generate``: what it makes, and what it says meanwhile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from generate_runs import SIZE, SMALL, Captured, generate, latents, said
from PIL import Image

from helios.cli.job import read_prompts
from helios.cli.progress import Report
from helios.errors import InputError
from helios.media import read_metadata, read_video
from helios.pipeline import Progress
from helios.pipeline.store import RunFolder

# --- what it makes ---


def test_it_says_what_was_asked_and_what_is_returned(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "new" / "folder" / "boat.mp4"  # a folder that is missing is made
    assert generate("a red boat", *SIZE, "--frames", 99, "--seed", 4, "--out", out) == 0
    captured = capsys.readouterr()
    text = " ".join(captured.out.split())
    assert "asked for 99 frames: 3 chunks of 33 frames make a video of 97 frames (4.04 s)" in text
    assert "asked for 99 frames, 97 frames returned" in text
    assert "RANDOM WEIGHTS: the video is noise" in text
    for part in ("prepare", "text", "history", "denoise", "decode", "write", "together"):
        assert part in text
    lines = captured.err.splitlines()  # not a terminal: plain lines, one a chunk
    assert [line.split(":")[0] for line in lines] == ["chunk 1/3", "chunk 2/3", "chunk 3/3"]
    assert all("FPS so far" in line for line in lines)
    assert read_video(out, height=64, width=64).shape == (97, 64, 64, 3)


def test_random_weights_stand_in_the_frames_and_the_metadata(finished: Path) -> None:
    frames = read_video(finished, height=64, width=64).float()
    plate = frames[:, 44:56, 15:49]
    assert float((plate < 40).float().mean()) > 0.3  # the black plate,
    assert float((plate > 215).float().mean()) > 0.15  # and white letters on it, in every frame
    assert float(plate.std(0).mean()) < 0.2 * float(frames[:, :12].std(0).mean())
    metadata = read_metadata(finished)
    assert metadata["random_weights"] == "true"
    assert "RANDOM WEIGHTS" in metadata["comment"]
    assert (metadata["title"], metadata["seed"]) == ("a red boat", "4")
    assert (metadata["asked"], metadata["returned"]) == ("99 frames", "97 frames")


def test_a_checkpoint_of_random_weights_is_marked_too(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "boat.mp4"
    assert generate("a red boat", "--model", checkpoint, *SMALL, "--chunks", 1, "--out", out, "--sheet") == 0
    assert "RANDOM WEIGHTS" in said(capsys)
    assert read_metadata(out)["random_weights"] == "true"
    frames = read_video(out, height=64, width=64).float()
    assert float((frames[:, 44:56, 15:49] < 40).float().mean()) > 0.3
    with Image.open(tmp_path / "boat.png") as sheet:
        assert sheet.size == (8 * 66 - 2, 3 * 66 - 2)


def test_trained_weights_are_not_marked(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    """The mark in the headers decides: the same weights without it are taken for trained ones."""
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(checkpoint, tmp_path / "model")
    for path in (model / "transformer").glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})
    out = tmp_path / "boat.mp4"
    assert generate("a red boat", "--model", model, *SMALL, "--chunks", 1, "--out", out) == 0
    assert "RANDOM" not in said(capsys)
    assert read_metadata(out)["random_weights"] == "false"
    frames = read_video(out, height=64, width=64).float()
    assert float((frames[:, 44:56, 15:49] < 40).float().mean()) < 0.3


def test_from_an_image_and_from_a_video(finished: Path, tmp_path: Path, capsys: Captured) -> None:
    picture = tmp_path / "start.png"
    Image.new("RGB", (80, 50), "red").save(picture)
    for option, file in (("image", picture), ("video", finished)):
        out = tmp_path / f"{option}.mp4"
        assert generate("a red boat", *SIZE, "--chunks", 1, "--seed", 4, f"--{option}", file, "--out", out) == 0
        assert f"{option} to video" in said(capsys)
        assert not torch.equal(latents(out, 0), latents(finished, 0))


def test_prompts_of_a_file(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# three acts\na red boat | 1\n\na | b\nthe end|2\n", encoding="utf-8")
    assert read_prompts(file) == (("a red boat", 1), "a | b", ("the end", 2))
    file.write_text("a red boat | 1\na blue boat | 2\n")
    out = tmp_path / "boat.mp4"
    assert generate("--prompts", file, *SIZE, "--out", out) == 0
    assert "3 chunks" in said(capsys)
    prompts = RunFolder.open(RunFolder.beside(out)).finished().prompts
    assert prompts == (("a red boat",), ("a blue boat",), ("a blue boat",))
    assert json.loads(read_metadata(out)["prompts"]) == [["a red boat", 1], ["a blue boat", 2]]
    assert generate("--resume", "--out", out) == 0
    assert "complete" in said(capsys)


def test_a_prompt_that_is_cut_is_told(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    text = "boat " * 600 + "the end"
    out = tmp_path / "boat.mp4"
    assert generate(text, "--model", checkpoint, *SMALL, "--chunks", 1, "--out", out) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "longer than 512 tokens" in warnings[0]
    assert warnings[0].endswith("the end'")


def test_environment_and_options(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "boat.mp4"
    monkeypatch.setenv("HELIOS_BACKEND", "reference")
    monkeypatch.setenv("HELIOS_FALLBACK", "reference")
    assert generate("a", "--size", "tiny", *SMALL, "--chunks", 1, "--out", out) == 0
    assert "on reference in fp32" in said(capsys)
    plan = RunFolder.open(RunFolder.beside(out)).read(0).state.plan
    assert (plan["backend"], plan["fallback"]) == ("reference", "reference")
    monkeypatch.setenv("HELIOS_BACKEND", "nonsense")
    monkeypatch.setenv("HELIOS_FALLBACK", "nonsense")
    flags = ["--backend", "cpu", "--fallback", "error", "--overwrite"]
    assert generate("a", "--size", "tiny", *SMALL, "--chunks", 1, "--out", out, *flags) == 0
    assert "on cpu in bf16" in said(capsys)


# --- progress ---


def step(chunk: int, done: int) -> Progress:
    return Progress(chunk=chunk, chunks=2, stage=1, step=done, steps=6, seconds=12.0)


def test_plain_progress_tells_steps_now_and_then(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with Report(2, terminal=False) as report:
        for done in range(1, 7):
            now[0] += 4.0
            report.step(step(0, done))
        report.chunk(0, 33, {"denoise": 20.0, "decode": 4.0, "total": 24.0}, 1.0)
        report.warn("cut")
    assert capsys.readouterr().err.splitlines() == [
        "chunk 1/2 stage 1 step 3/6, 12 s",
        "chunk 1/2 stage 1 step 6/6, 12 s",
        "chunk 1/2: 33 frames in 25 s (denoise 20 s, decode 4 s); 1.38 FPS so far",
        "warning: cut",
    ]


def test_a_bar_on_a_terminal(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with Report(2, terminal=True) as report:
        report.step(step(0, 6))
        report.chunk(0, 33, {"denoise": 20.0, "decode": 4.0, "total": 24.0}, 1.0)
        report.step(step(1, 1))
    text = capsys.readouterr().err
    assert "chunk 1/2: 33 frames in 25 s" in text
    assert "chunk 2/2 stage 1 step 1/6" in text
    assert "FPS so far" in text


def test_read_prompts_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\n| 3\n")
    with pytest.raises(InputError, match=r"line 2: '\| 3' wants a prompt"):
        read_prompts(file)
