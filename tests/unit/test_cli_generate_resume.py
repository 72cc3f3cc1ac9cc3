"""``helios generate`` on runs that go on: resumed, mended, made longer, branched off from."""

from __future__ import annotations

from pathlib import Path

import torch
from generate_runs import SIZE, Captured, generate, latents, refused, said

from helios.media import read_video
from helios.pipeline.store import RunFolder

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
