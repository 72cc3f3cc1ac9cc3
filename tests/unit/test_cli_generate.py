"""``helios generate``: what it makes, what it says, and every mistake as one line with its fix."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from helios.cli import main
from helios.cli.job import read_prompts
from helios.cli.progress import Report
from helios.errors import InputError
from helios.media import SegmentWriter, read_metadata, read_video
from helios.pipeline import Progress
from helios.pipeline.store import RunFolder

SMALL = ["--height", "64", "--width", "64", "--steps", "1"]
SIZE = ["--size", "tiny", "--backend", "cpu", "--precision", "fp32", *SMALL]
Captured = pytest.CaptureFixture[str]


def said(capsys: Captured) -> str:
    """Standard output as one line, however the terminal broke it."""
    return " ".join(capsys.readouterr().out.split())


def generate(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def latents(out: Path, chunk: int) -> torch.Tensor:
    return RunFolder.open(RunFolder.beside(out)).read(chunk).latents


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three chunks. Not to be changed: ``copied`` gives one that may be."""
    out = tmp_path_factory.mktemp("finished") / "boat.mp4"
    assert generate("a red boat", *SIZE, "--frames", 99, "--seed", 4, "--out", out) == 0
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(RunFolder.beside(finished), tmp_path / "boat.helios")
    return Path(shutil.copyfile(finished, tmp_path / "boat.mp4"))


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_checkpoint.write_checkpoint(path, size_name="tiny", variant_name="distilled")
    return path


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


# --- runs that go on ---


def test_a_complete_run_is_joined_again(copied: Path, capsys: Captured) -> None:
    before = copied.read_bytes()
    copied.unlink()
    assert generate("--resume", "--out", copied) == 0
    assert "this run is complete" in said(capsys)
    assert copied.read_bytes() == before


def test_a_complete_run_can_be_made_longer(copied: Path, finished: Path) -> None:
    assert generate("--resume", "--chunks", 4, "--out", copied) == 0
    assert read_video(copied, height=64, width=64).shape[0] == 129
    assert torch.equal(latents(copied, 2), latents(finished, 2))
    assert latents(copied, 3).shape == latents(finished, 2).shape


def test_damage_is_told_and_mended(copied: Path, finished: Path, capsys: Captured) -> None:
    folder = RunFolder.beside(copied)
    (folder / "chunk-00001.safetensors").write_bytes(b"nothing")
    (folder / "segment-00000.mp4").write_bytes(b"nothing")
    assert generate("--resume", "--out", copied) == 0
    text = said(capsys)
    assert "chunk-00001.safetensors is damaged" in text
    assert "1 chunk before it kept, chunk 1 and those after it are made again" in text
    assert "the segment of chunk 0 was lost or damaged, and is decoded again" in text
    assert copied.read_bytes() == finished.read_bytes()
    assert all(torch.equal(latents(copied, k), latents(finished, k)) for k in range(3))


def test_a_longer_run_stays_longer(copied: Path) -> None:
    assert generate("--resume", "--chunks", 4, "--out", copied) == 0
    (RunFolder.beside(copied) / "chunk-00003.safetensors").unlink()
    assert generate("--resume", "--out", copied) == 0
    assert RunFolder.open(RunFolder.beside(copied)).finished().count == 4


def test_without_a_finished_chunk_anything_may_change(copied: Path, finished: Path, capsys: Captured) -> None:
    folder = RunFolder.beside(copied)
    (folder / "chunk-00000.safetensors").unlink()
    error = refused(capsys, "--resume", "--seed", 5, "--out", copied)  # the other two are of seed 4
    assert "'seed': 4" in error
    for chunk in (1, 2):
        (folder / f"chunk-0000{chunk}.safetensors").unlink()
    assert generate("--resume", "--seed", 5, "--height", 128, "--chunks", 1, "--out", copied) == 0
    assert RunFolder.open(folder).about["settings"]["seed"] == 5
    assert generate("--resume", "--out", copied) == 0
    assert read_video(copied, height=128, width=64).shape[0] == 33
    assert latents(copied, 0).shape[-2:] == (16, 8)
    assert not torch.equal(latents(copied, 0)[..., :8, :], latents(finished, 0))


def test_resume_without_a_run_starts_one(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "boat.mp4"
    assert generate("a red boat", *SIZE, "--chunks", 1, "--resume", "--out", out) == 0
    assert "this one starts from the beginning" in said(capsys)


def test_a_branch_leaves_the_run_alone(copied: Path, finished: Path, tmp_path: Path, capsys: Captured) -> None:
    before = {path.name: path.read_bytes() for path in RunFolder.beside(copied).iterdir()}
    out = tmp_path / "storm.mp4"
    assert generate("a storm", "--from-chunk", 1, "--run", copied, "--chunks", 2, "--out", out) == 0
    assert "branches off from" in said(capsys)
    assert {path.name: path.read_bytes() for path in RunFolder.beside(copied).iterdir()} == before
    assert copied.read_bytes() == finished.read_bytes()
    assert torch.equal(latents(out, 0), latents(finished, 0))
    assert not torch.equal(latents(out, 1), latents(finished, 1))
    about = RunFolder.open(RunFolder.beside(out)).about
    assert (about["prompt"], about["first"]) == ("a storm", 1)
    assert read_video(out, height=64, width=64).shape[0] == 65


def test_a_branch_without_a_new_name_gets_one(copied: Path, finished: Path, capsys: Captured) -> None:
    for name in ("boat-from2.mp4", "boat-from2-2.mp4"):
        assert generate("--from-chunk", 2, "--seed", 9, "--out", copied) == 0
        assert f"{name}: asked for 99 frames" in said(capsys)
        assert not torch.equal(latents(copied.with_name(name), 2), latents(finished, 2))
    assert copied.read_bytes() == finished.read_bytes()


def test_a_branch_that_changes_nothing_gives_the_same_bits(copied: Path, finished: Path) -> None:
    out = copied.with_name("same.mp4")
    assert generate("--from-chunk", 1, "--run", copied, "--out", out) == 0
    assert all(torch.equal(latents(out, k), latents(finished, k)) for k in range(3))


def test_a_branch_can_be_resumed(copied: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "storm.mp4", tmp_path / "again.mp4"
    for name in (out, again):
        assert generate("a storm", "--from-chunk", 1, "--run", copied, "--seed", 7, "--out", name) == 0
    (RunFolder.beside(again) / "chunk-00002.safetensors").unlink()
    assert generate("--resume", "--out", again) == 0
    assert torch.equal(latents(out, 2), latents(again, 2))
    (RunFolder.beside(again) / "chunk-00001.safetensors").unlink()
    (RunFolder.beside(again) / "chunk-00002.safetensors").unlink()
    assert generate("--resume", "--out", again) == 0
    assert torch.equal(latents(out, 2), latents(again, 2))


# --- mistakes ---


def refused(capsys: Captured, *arguments: object) -> str:
    """What a mistake prints; it ends with 2, without a traceback, and with something to do next."""
    capsys.readouterr()
    assert generate(*arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("error: ") == 1
    return error


def test_without_model_and_size_it_explains_the_choices(tmp_path: Path, capsys: Captured) -> None:
    error = refused(capsys, "a red boat", "--out", tmp_path / "boat.mp4")
    for word in (
        "--model PATH|REPO",
        "--size tiny|mini|14b",
        "random weights",
        "RANDOM WEIGHTS",
        "fix: helios generate",
    ):
        assert word in error
    assert list(tmp_path.iterdir()) == []


MISTAKES: list[tuple[list[str], str]] = [
    (["a", *SIZE, "--model", "x"], "both --model and --size"),
    (["a", "--size", "tinny"], "unknown size 'tinny': did you mean 'tiny'?"),
    (["a", *SIZE, "--variant", "destilled"], "unknown variant 'destilled': did you mean 'distilled'?"),
    (["a", "--size", "tiny", "--backend", "cpuu"], "'cpuu': did you mean 'cpu'?"),
    (["a", *SIZE, "--precision", "bf17"], "'bf17': did you mean 'bf16'?"),
    (["a", *SIZE, "--fallback", "maybe"], "unknown fallback 'maybe'"),
    (["a", *SIZE, "--height", "100"], "height is 100, wanted a multiple of 64"),
    (["a", *SIZE, "--height", "100"], "use height 64 or 128"),
    (["a", *SIZE, "--frames", "0"], "frames is 0"),
    (["a", *SIZE, "--frames", "-3"], "frames is -3"),
    (["a", *SIZE, "--chunks", "0"], "chunks is 0"),
    (["a", *SIZE, "--seconds", "0"], "seconds is 0"),
    (["a", *SIZE, "--chunks", "1", "--seconds", "2"], "chunks and seconds are given"),
    (["a", *SIZE, "--chunks", "many"], "Invalid value for '--chunks'"),
    (["", *SIZE], "the prompt is empty"),
    (["  ", *SIZE], "the prompt is empty"),
    (SIZE, "there is no prompt"),
    (["a", *SIZE, "--steps", "1,1"], "this model has 3"),
    (["a", *SIZE, "--steps", "1,x,1"], "--steps 1,x,1"),
    (["a", *SIZE, "--steps", "0"], "--steps 0"),
    (["a", *SIZE, "--guidance", "-1"], "guidance is -1"),
    (["a", *SIZE, "--seed", "-1"], "seed is -1"),
    (["a", *SIZE, "--image", "{tmp}/a.png", "--video", "{tmp}/a.mp4"], "both an image and a video"),
    (["a", *SIZE, "--image", "{tmp}/none.png"], "none.png does not exist"),
    (["a", *SIZE, "--image", "{tmp}/text.txt"], "not a picture"),
    (["a", *SIZE, "--video", "{tmp}/none.mp4"], "none.mp4 does not exist"),
    (["a", *SIZE, "--video", "{tmp}/text.txt"], "text.txt"),
    (["a", *SIZE, "--video", "{tmp}/short.mp4"], "has 32 frames, at least 33"),
    (["a", *SIZE, "--prompts", "{tmp}/text.txt"], "both a PROMPT and --prompts"),
    ([*SIZE, "--prompts", "{tmp}/none.txt"], "none.txt cannot be read: No such file"),
    ([*SIZE, "--prompts", "{tmp}/empty.txt"], "empty.txt holds no prompt"),
    ([*SIZE, "--prompts", "{tmp}/zero.txt"], "zero.txt, line 2: 'a | 0' wants a prompt and at least 1 chunk"),
    ([*SIZE, "--prompts", "{tmp}/latin.txt"], "latin.txt is not UTF-8"),
    (["a", "--model", "{tmp}/nothing"], "nothing"),
    (["a", "--model", "owner/name"], "owner/name"),
    (["a", "--model", "{tmp}/folder"], "folder"),
    (["a", *SIZE, "--out", "{tmp}/boat.avi"], "only .mp4 can be written"),
    (["a", *SIZE, "--out", "{tmp}/folder.mp4"], "is a folder"),
    (["a", *SIZE, "--chunks", "1", "--out", "{tmp}/text.txt/boat.mp4"], "cannot write"),
    (["a", *SIZE, "--from-chunk", "1"], "holds no run"),
    (["a", *SIZE, "--run", "{tmp}/a.mp4"], "add --from-chunk K"),
    (["a", *SIZE, "--nonsense"], "--nonsense"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str], words: str, tmp_path: Path, capsys: Captured
) -> None:
    for name in ("folder", "folder.mp4"):
        (tmp_path / name).mkdir()
    for name, text in {"text.txt": "words", "empty.txt": "# no\n\n", "zero.txt": "b\na | 0\n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "a.png").touch()
    if "short.mp4" in " ".join(arguments):
        short = SegmentWriter(tmp_path, size=(64, 64)).write(0, torch.zeros(32, 64, 64, 3, dtype=torch.uint8))
        short.rename(tmp_path / "short.mp4")
    before = sorted(tmp_path.rglob("*"))
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    error = refused(capsys, *given, *([] if "--out" in given else ["--out", str(tmp_path / "new" / "boat.mp4")]))
    assert words in error
    assert sorted(tmp_path.rglob("*")) == before


def test_other_settings_are_refused_by_name(copied: Path, finished: Path, capsys: Captured) -> None:
    for arguments, words in [
        (["--seed", "5"], "seed: 4 was saved, 5 is asked for"),
        (["--height", "128"], "height: 64 was saved, 128 is asked for"),
        (["--steps", "2", "--guidance", "3"], "guidance: 1.0 was saved, 3.0 is asked for"),
        (["a blue boat"], "prompt of chunk 0: 'a red boat' was saved, 'a blue boat' is asked for"),
        (["--size", "tiny", "--variant", "mid"], "model: 'tiny' was saved, 'tiny mid' is asked for"),
        (["--chunks", "4", "--precision", "bf16"], "precision: 'fp32' was saved, 'bf16' is asked for"),
        (["--chunks", "4", "--backend", "reference"], "backend: 'cpu' was saved, 'reference' is asked for"),
    ]:
        error = refused(capsys, *arguments, "--resume", "--out", copied)
        assert words in error
        assert "--from-chunk 3" in error
    assert copied.read_bytes() == finished.read_bytes()
    assert generate("a red boat", *SIZE, "--seed", 4, "--resume", "--out", copied) == 0


def test_an_image_that_changed_is_noticed(tmp_path: Path, capsys: Captured) -> None:
    picture, out = tmp_path / "start.png", tmp_path / "boat.mp4"
    Image.new("RGB", (64, 64), "red").save(picture)
    arguments = ["a", *SIZE, "--chunks", 1, "--image", picture, "--out", out]
    assert generate(*arguments) == 0
    Image.new("RGB", (64, 64), "blue").save(picture)
    assert "given: " in refused(capsys, *arguments, "--resume")
    assert generate("--resume", "--out", out) == 0  # the picture is in the run


def test_what_exists_is_not_overwritten_unasked(copied: Path, finished: Path, capsys: Captured) -> None:
    error = refused(capsys, "a", *SIZE, "--out", copied)
    for word in ("exists already", "--resume", "--overwrite", "--from-chunk"):
        assert word in error
    copied.unlink()  # the run alone is enough
    assert "boat.helios exists already" in refused(capsys, "a", *SIZE, "--out", copied)
    assert torch.equal(latents(copied, 2), latents(finished, 2))
    assert generate("a", *SIZE, "--chunks", 1, "--overwrite", "--out", copied) == 0
    assert RunFolder.open(RunFolder.beside(copied)).finished().count == 1


def test_options_that_exclude_each_other(copied: Path, capsys: Captured) -> None:
    assert "give one of them" in refused(capsys, "--resume", "--overwrite", "--out", copied)
    assert "give one of them" in refused(capsys, "--resume", "--from-chunk", 1, "--out", copied)
    assert "is the run to branch off from" in refused(
        capsys, "--from-chunk", 1, "--run", copied, "--out", copied, "--overwrite"
    )
    for chunk in (4, -1):
        error = refused(capsys, "--from-chunk", chunk, "--out", copied)
        assert "has 3 finished chunks" in error
        assert "--from-chunk from 0 to 3" in error
    error = refused(capsys, "--from-chunk", 3, "--out", copied)
    assert "nothing is to be made" in error
    assert "--chunks 4" in error


def test_a_run_folder_that_is_none(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "boat.mp4"
    out.touch()
    assert "holds no run" in refused(capsys, "--resume", "--out", out)
    RunFolder.beside(out).mkdir()
    (RunFolder.beside(out) / "thesis.txt").write_text("words")
    assert "which no run wrote" in refused(capsys, "a", *SIZE, "--overwrite", "--out", out)
    assert (RunFolder.beside(out) / "thesis.txt").read_text() == "words"


def test_too_little_disk_is_told_before_anything_starts(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    error = refused(capsys, "a", *SIZE, "--chunks", 44, "--out", tmp_path / "boat.mp4")
    assert "a video of 44 chunks needs" in error
    assert "where 1.0 MB are free" in error
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_what_is_finished(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "boat.mp4", SegmentWriter.write

    def full(self: SegmentWriter, chunk: int, frames: torch.Tensor) -> Path:
        if chunk == 1:
            from helios.errors import StorageError

            raise StorageError("cannot write: No space left on device", "free some room")
        return write(self, chunk, frames)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentWriter, "write", full)
        error = refused(capsys, "a", *SIZE, "--chunks", 2, "--out", out)
    assert "1 finished chunk kept" in error
    assert f"helios generate --resume --out {out}" in error
    assert generate("--resume", "--out", out) == 0
    assert RunFolder.open(RunFolder.beside(out)).finished().count == 2


def test_damaged_weights_are_told_with_file_and_tensor(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(checkpoint, tmp_path / "model")
    file = sorted((model / "transformer").glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = torch.full_like(tensors[name], np.nan)
    save_file(tensors, file)
    out = tmp_path / "boat.mp4"
    error = refused(capsys, "a", "--model", model, *SMALL, "--chunks", 1, "--out", out)
    assert file.name in error
    assert name in error
    assert not out.exists()


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
