"""The folder of a run: what is kept, what is noticed when the disk damages it, and what is never deleted."""

from __future__ import annotations

import errno
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import helios
from helios.errors import StateError, StorageError
from helios.media import mark_random, read_metadata, read_video
from helios.pipeline import Chunk, Pipeline
from helios.pipeline.store import RunFolder, chunk_bytes, decode_again, lock

SMALL: dict[str, Any] = {"height": 64, "width": 64, "max_sequence_length": 8, "steps": 1, "seed": 3}
ABOUT: dict[str, Any] = {"size": [64, 64], "metadata": {"title": "a cat"}, "first": 0}


@functools.cache
def tiny() -> Pipeline:
    return helios.load(size="tiny", backend="reference")


@functools.cache
def chunks() -> list[Chunk]:
    return list(tiny().stream("a cat", chunks=3, image=torch.zeros(64, 64, 3), **SMALL))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of three chunks."""
    made = RunFolder.create(tmp_path / "cat.helios", ABOUT)
    for chunk in chunks():
        made.save(chunk, mark_random(chunk.frames)[0])
    return made


def damage(path: Path) -> None:
    """Turn one bit."""
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def test_what_is_saved_is_read_back(folder: RunFolder) -> None:
    again = RunFolder.open(folder.path)
    assert again.about == json.loads((folder.path / "run.json").read_text()) == {"format": 1, **ABOUT}
    for chunk in chunks():
        saved = again.read(chunk.index)
        assert torch.equal(saved.latents, chunk.latents)
        assert saved.latents.dtype == torch.float32
        assert torch.equal(saved.state.history, chunk.state.history)
        assert chunk.state.anchor is not None
        assert torch.equal(saved.state.anchor, chunk.state.anchor)  # type: ignore[arg-type]
        assert saved.state.plan == chunk.state.plan
        assert saved.state.differences(chunk.state.settings, chunk.state.plan) == []
        assert read_video(again.segment(chunk.index), height=64, width=64).shape[0] == 33
    finished = again.finished()
    assert (finished.count, finished.problem) == (3, "")
    assert finished.prompts == (("a cat",),) * 3
    assert read_metadata(again.segment(0)) == {"title": "a cat"}


def test_no_temporary_file_stays(folder: RunFolder) -> None:
    names = sorted(path.name for path in folder.path.iterdir())
    each = [name for k in range(3) for name in (f"chunk-0000{k}.safetensors", f"segment-0000{k}.mp4")]
    assert names == sorted([*each, "run.json"])


def test_one_wrong_bit_is_noticed_anywhere(folder: RunFolder) -> None:
    path = folder.path / "chunk-00001.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    for at in (0, *range(8, header, 17), *range(header, len(whole), 9973), len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StateError, match="damaged"):
            folder.read(1)
    finished = folder.finished()
    assert finished.count == 1
    assert "chunk-00001.safetensors is damaged" in finished.problem


def test_truncated_and_missing_chunks(folder: RunFolder) -> None:
    path = folder.path / "chunk-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert folder.finished().count == 2
    assert "chunk-00002.safetensors is damaged" in folder.finished().problem
    path.unlink()
    assert (folder.finished().count, folder.finished().problem) == (2, "")  # never made, as far as anybody can see
    (folder.path / "chunk-00000.safetensors").unlink()
    assert folder.finished().count == 0
    assert "chunk-00000.safetensors is missing" in folder.finished().problem


def test_a_lost_segment_is_made_again_from_the_latents(folder: RunFolder) -> None:
    before = folder.segment(1).read_bytes()
    damage(folder.segment(1))
    assert [folder.segment_is_whole(k) for k in range(3)] == [True, False, True]
    frames = decode_again(tiny().codec, folder.read(1))
    assert torch.equal(frames, chunks()[1].frames)
    folder.rewrite_segment(1, mark_random(frames)[0])
    assert folder.segment(1).read_bytes() == before
    assert folder.segment_is_whole(1)
    folder.segment(1).unlink()
    assert not folder.segment_is_whole(1)


def test_a_segment_by_another_encoder_counts_as_whole(folder: RunFolder) -> None:
    folder.rewrite_segment(1, chunks()[1].frames[0])  # without the mark: other bytes, as of another encoder
    assert folder.segment_is_whole(1)
    assert torch.equal(folder.read(1).latents, chunks()[1].latents)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "damaged"),
        ("[]", "damaged"),
        ("{", "damaged"),
        ('{"format": 1}', "damaged"),
        ('{"format": 7}', "format 7, this Helios reads format 1"),
    ],
)
def test_a_damaged_run_json(folder: RunFolder, text: str, match: str) -> None:
    (folder.path / "run.json").write_text(text)
    with pytest.raises(StateError, match=match):
        RunFolder.open(folder.path)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"holds no run: run\.json is missing"):
        RunFolder.open(tmp_path)


def test_a_branch_takes_the_first_chunks_along_and_leaves_the_run_alone(folder: RunFolder, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    branch = RunFolder.create(tmp_path / "branch.helios", ABOUT | {"first": 2}, (folder, 2))
    assert branch.finished().count == 2
    assert torch.equal(branch.read(1).latents, chunks()[1].latents)
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


def test_a_new_run_replaces_an_old_one_and_nothing_else(folder: RunFolder, tmp_path: Path) -> None:
    assert RunFolder.create(folder.path, ABOUT).finished().count == 0
    assert [path.name for path in folder.path.iterdir()] == ["run.json"]
    (folder.path / "thesis.txt").write_text("words")
    with pytest.raises(StateError, match=r"holds 'thesis.txt', which no run wrote"):
        RunFolder.create(folder.path, ABOUT)
    assert (folder.path / "thesis.txt").read_text() == "words"
    assert (folder.path / "run.json").exists()
    (tmp_path / "file.helios").write_text("")
    with pytest.raises(StateError, match="is a file"):
        RunFolder.create(tmp_path / "file.helios", ABOUT)


def test_a_full_disk_loses_nothing(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left"):
        folder.save(chunks()[2], mark_random(chunks()[2].frames)[0])
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


def test_two_processes_do_not_write_one_run(folder: RunFolder) -> None:
    imports = "from pathlib import Path; from helios.pipeline.store import lock"
    other = f"{imports}\nwith lock(Path({str(folder.path)!r})): print('in')"

    def enter() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)

    with lock(folder.path):
        refused = enter()
    assert "another process is writing the run" in refused.stderr
    assert enter().stdout == "in\n"
    with lock(folder.path), pytest.raises(StateError, match="another process"), lock(folder.path):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="cannot write"), lock(tmp_path / "x.helios"):
        pass


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "videos").write_text("")
    with pytest.raises(StorageError, match="cannot write"), lock(tmp_path / "videos" / "x.helios"):
        pass


def test_the_estimate_holds_what_a_chunk_takes(folder: RunFolder) -> None:
    frame = 4 * 16 * 8 * 8
    files = [folder.path / "chunk-00001.safetensors", folder.segment(1), folder.segment(1)]  # once more when joined
    taken = sum(path.stat().st_size for path in files)
    assert taken <= chunk_bytes(64, 64, 9 * frame, 20 * frame) < 3 * taken
