"""A run that is killed goes on to the same bits, wherever that was; one that is stopped leaves a file that plays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helios.cli import main
from helios.media import finished_segments, read_metadata, read_video
from helios.pipeline import Chunk, returned_frames
from helios.pipeline.store import RunFolder

SMALL = ["--height", "64", "--width", "64", "--steps", "1", "--seed", "5", "--backend", "cpu", "--precision", "fp32"]
CHUNKS = 4

POINTS = [*((n, "behind") for n in range(1, CHUNKS + 1)), (0, "between"), (2, "between")]

# A process for each point, forked from one that has imported everything. Each kills itself, as the kernel would, when
# that many chunks are on disk; "between" is after the segment of the next one and before its state.
KILLED = """
import json, os, signal, sys
import av, helios
from helios.cli import main
from helios.pipeline.store import RunFolder

# Without arithmetic, so that nothing but imports is left behind.
helios.load(size="tiny", backend="reference:meta").generate("a", chunks=1, height=64, width=64, steps=1)
save, write = RunFolder.save, RunFolder._write

def run(after, where, arguments):
    def die():
        os.kill(os.getpid(), signal.SIGKILL)
    def watched_save(self, chunk, frames):
        save(self, chunk, frames)
        if where == "behind" and chunk.index + 1 == after:
            die()
    def watched_write(self, chunk, saved):
        if where == "between" and chunk == after:
            die()
        write(self, chunk, saved)
    RunFolder.save, RunFolder._write = watched_save, watched_write
    os._exit(main(arguments))

for after, where, arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        run(after, where, arguments)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
        sys.exit(f"{after} {where}: not killed")
"""


def arguments(out: Path, *more: str) -> list[str]:
    return ["generate", "a red boat", "--size", "tiny", "--chunks", str(CHUNKS), *SMALL, "--out", str(out), *more]


def start(*command: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], stdout=pipe, stderr=pipe, text=True, env=environment)


def contents(out: Path) -> dict[str, Any]:
    """Everything that a run leaves: videos by their bytes, tensors by their bits."""
    path = RunFolder.beside(out)
    folder = RunFolder.open(path)
    found: dict[str, Any] = {file.name: file.read_bytes() for file in path.glob("*.mp4")} | {"out": out.read_bytes()}
    for chunk in range(CHUNKS):
        saved = folder.read(chunk)
        tensors, metadata = saved.state.to_tensors()
        tensors["latents"] = saved.latents
        found |= {f"{chunk} {name}": tensor.numpy().tobytes() for name, tensor in tensors.items()}
        found |= {f"{chunk} {name}": text for name, text in metadata.items()}
    return found


def require_same(out: Path, other: Path) -> None:
    ours, theirs = contents(out), contents(other)
    assert {"out", "segment-00003.mp4", "3 latents", "3 history", "3 plan"} <= set(ours)
    assert set(ours) == set(theirs)
    different = [name for name in ours if ours[name] != theirs[name]]
    assert not different, f"differ: {different}"


@contextmanager
def watched() -> Iterator[dict[int, torch.Tensor]]:
    """The frames of each chunk that is saved meanwhile, before they are encoded."""
    made: dict[int, torch.Tensor] = {}
    save = RunFolder.save

    def keeping(self: RunFolder, chunk: Chunk, frames: torch.Tensor) -> None:
        made[chunk.index] = frames.clone()
        save(self, chunk, frames)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save", keeping)
        yield made


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, torch.Tensor]]:
    """The same run, not killed: its video, and its frames before they were encoded."""
    out = tmp_path_factory.mktemp("whole") / "boat.mp4"
    with watched() as frames:
        assert main(arguments(out)) == 0
    return out, frames


@pytest.fixture
def whole(uninterrupted: tuple[Path, dict[int, torch.Tensor]]) -> Path:
    return uninterrupted[0]


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def killed_video(folder: Path, after: int, where: str) -> Path:
    return folder / f"{where}-{after}" / "boat.mp4"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a killed run for each point."""
    folder = tmp_path_factory.mktemp("killed")
    runs = [(after, where, arguments(killed_video(folder, after, where))) for after, where in POINTS]
    process = start("-c", KILLED, json.dumps(runs))
    said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return folder


@pytest.mark.parametrize(("after", "where"), POINTS)
def test_killed_at_any_boundary(
    after: int, where: str, killed: Path, uninterrupted: tuple[Path, dict[int, torch.Tensor]]
) -> None:
    out = killed_video(killed, after, where)
    assert not out.exists()
    folder = RunFolder.open(RunFolder.beside(out))
    assert folder.finished().count == after
    assert len(finished_segments(folder.path)) == after + (where == "between")
    with watched() as frames:
        assert main(arguments(out, "--resume")) == 0
    assert list(frames) == list(range(after, CHUNKS))
    assert all(torch.equal(frames[chunk], uninterrupted[1][chunk]) for chunk in frames)
    require_same(out, uninterrupted[0])


def test_killed_from_outside_in_the_middle_of_a_video_from_an_image(tmp_path: Path) -> None:
    picture = tmp_path / "start.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(picture)
    whole, out = tmp_path / "whole.mp4", tmp_path / "killed.mp4"
    assert main(arguments(whole, "--image", str(picture))) == 0
    process = start("-m", "helios", *arguments(out, "--image", str(picture)))
    wait_for(RunFolder.beside(out) / "chunk-00000.safetensors", process)
    process.kill()
    process.communicate()
    picture.unlink()  # everything that is needed is in the run
    assert main(["generate", "--resume", "--out", str(out)]) == 0
    require_same(out, whole)


def test_the_comparison_can_fail(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "boat.mp4"
    assert main(arguments(out, "--seed", "6")) == 0
    with pytest.raises(AssertionError, match="latents"):
        require_same(out, whole)


def test_ctrl_c_closes_a_file_that_plays(tmp_path: Path) -> None:
    out = tmp_path / "boat.mp4"
    command = ["generate", "a red boat", "--size", "tiny", "--chunks", "500", *SMALL, "--out", str(out)]
    process = start("-m", "helios", *command)
    wait_for(RunFolder.beside(out) / "chunk-00001.safetensors", process)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    done = RunFolder.open(RunFolder.beside(out)).finished().count
    assert 2 <= done < 500
    assert read_video(out, height=64, width=64).shape[0] == returned_frames(done)
    assert read_metadata(out)["random_weights"] == "true"
    assert f"{done} of 500 chunks" in " ".join(said.split())
    assert f"helios generate --resume --out {out}" in " ".join(said.replace("\\\n", "").split())


def test_ctrl_c_before_the_first_chunk_is_no_traceback(tmp_path: Path) -> None:
    out = tmp_path / "boat.mp4"
    command = ["generate", "a red boat", "--size", "tiny", *SMALL, "--out", str(out)]
    process = start("-m", "helios", *command[:-2], "--height", "1024", "--width", "1024", "--out", str(out))
    wait_for(RunFolder.beside(out) / "run.json", process)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "stopped before the first chunk" in said
    assert not out.exists()
