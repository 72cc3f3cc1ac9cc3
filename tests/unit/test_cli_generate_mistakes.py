"""``helios generate``: every mistake is one line with its fix."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from generate_runs import SIZE, SMALL, Captured, generate, latents, refused
from PIL import Image

from helios.media import SegmentWriter
from helios.pipeline.store import RunFolder

# --- mistakes ---


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
