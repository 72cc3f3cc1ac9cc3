"""Writing that is stopped in the middle, and a full disk."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media_frames import moving, read_back, three_segments

from helios import media
from helios.errors import StorageError
from helios.media import writing


@pytest.fixture
def run(tmp_path: Path) -> tuple[media.SegmentWriter, list[Path]]:
    return three_segments(tmp_path / "segments")


# --- stopped in the middle, and a full disk --------------------------------------------------------------------------


def test_ctrl_c_leaves_what_is_finished(
    run: tuple[media.SegmentWriter, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, paths = run
    before = [path.read_bytes() for path in paths]
    genuine = writing._video_frame

    def interrupted(picture: np.ndarray, index: int, fps: Fraction) -> Any:
        if index == 6:
            raise KeyboardInterrupt
        return genuine(picture, index, fps)

    monkeypatch.setattr(writing, "_video_frame", interrupted)
    for chunk in (3, 0):  # a new segment, and one that replaces another
        with pytest.raises(KeyboardInterrupt):
            writer.write(chunk, moving(9, shift=3))
    assert sorted(writer.folder.iterdir()) == paths
    assert [path.read_bytes() for path in paths] == before
    assert media.join(media.finished_segments(writer.folder), tmp_path / "out.mp4") == 15
    assert read_back(tmp_path / "out.mp4").shape[0] == 15


WRITE_FOREVER = """
import sys, torch
from helios.media import SegmentWriter
writer = SegmentWriter(sys.argv[1], size=(64, 96))
frames = torch.randint(0, 256, (33, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
for chunk in range(100_000):
    writer.write(chunk, frames)
"""


def test_a_killed_process_leaves_a_playable_start(tmp_path: Path) -> None:
    folder = tmp_path / "segments"
    with subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(folder)]) as process:
        deadline = time.monotonic() + 60
        while len(media.finished_segments(folder)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finished = media.finished_segments(folder)
    assert len(finished) >= 2
    assert media.join(finished, tmp_path / "out.mp4") == 33 * len(finished)
    assert media.read_video(tmp_path / "out.mp4", height=8, width=8).shape[0] == 33 * len(finished)


@contextmanager
def files_no_larger_than(count: int) -> Iterator[None]:
    """The kernel refuses any byte beyond that position of any file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_no_room_for_a_segment_or_the_video(tmp_path: Path, share: float) -> None:
    noise = torch.randint(0, 256, (8, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    writer = media.SegmentWriter(tmp_path / "segments", size=(96, 96))
    first = writer.write(0, noise)
    size = first.stat().st_size
    assert size > 50_000
    with files_no_larger_than(int(size * share)), pytest.raises(StorageError, match=r"cannot write .*segment-00001"):
        writer.write(1, noise)
    assert list(writer.folder.iterdir()) == [first]
    with files_no_larger_than(int(size * share)), pytest.raises(StorageError, match=r"cannot write .*out\.mp4"):
        media.join([first], tmp_path / "out.mp4")
    assert os.listdir(tmp_path) == ["segments"]
    assert media.join([first], tmp_path / "out.mp4") == 8


def test_a_full_disk_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        media.SegmentWriter(tmp_path, size=(16, 16)).write(0, moving(1, 16, 16))
    assert "free some room" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write"):
        media.SegmentWriter(tmp_path / "file" / "sub", size=(16, 16)).write(0, moving(1, 16, 16))


def test_need_space(tmp_path: Path) -> None:
    media.need_space(tmp_path / "not" / "yet" / "there.mp4", 1)
    with pytest.raises(StorageError, match=r"the checkpoint needs 9000\.0 TB in .* are free") as caught:
        media.need_space(tmp_path / "x", 9 * 10**15, purpose="the checkpoint")
    assert str(tmp_path) in caught.value.why
    assert "another disk" in caught.value.fix
