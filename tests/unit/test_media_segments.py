"""Videos out: segments and their bytes, and joining them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from media_frames import HEIGHT, WIDTH, moving, packets, psnr, quick, read_back, three_segments

from helios import media
from helios.errors import HeliosError, InputError, StateError


@pytest.fixture
def run(tmp_path: Path) -> tuple[media.SegmentWriter, list[Path]]:
    return three_segments(tmp_path / "segments")


# --- segments --------------------------------------------------------------------------------------------------------


def test_what_is_written_comes_back_close(tmp_path: Path) -> None:
    """PSNR over all values of 33 frames, measured: 44.6 dB; the conversion to yuv420p alone gives 51.6 dB.

    The mean error, measured 0.15 levels, would show colours that are truncated or mean another matrix.
    """
    frames = moving(33, 64, 96, scale=2)
    path = media.SegmentWriter(tmp_path, size=(64, 96)).write(0, frames)
    back = media.read_video(path, height=64, width=96)
    assert back.shape == frames.shape
    assert psnr(back, frames) >= 43.0
    assert abs((back.double() - frames.double()).mean().item()) < 0.5


def test_a_wrong_picture_fails_that_bound() -> None:
    frames = moving(33, 64, 96, scale=2)
    assert psnr(frames.roll(1, 0), frames) < 43.0
    assert psnr((frames.int() - 3).clamp(0).to(torch.uint8), frames) < 43.0


def test_the_file_says_which_colours_it_means(run: tuple[media.SegmentWriter, list[Path]]) -> None:
    with av.open(str(run[1][0])) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
        assert (context.name, context.pix_fmt, context.has_b_frames) == ("h264", "yuv420p", False)


def test_the_same_frames_give_the_same_bytes(run: tuple[media.SegmentWriter, list[Path]], tmp_path: Path) -> None:
    other = media.SegmentWriter(tmp_path / "again", size=(HEIGHT, WIDTH), metadata={"seed": 7, "title": "T"})
    again = [other.write(k, moving(n, shift=20 * k)) for k, n in reversed(list(enumerate((9, 1, 5))))]
    assert [p.read_bytes() for p in run[1]] == [p.read_bytes() for p in reversed(again)]
    media.join(run[1], tmp_path / "a.mp4")
    media.join(reversed(again), tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert other.write(0, moving(9, shift=1)).read_bytes() != run[1][0].read_bytes()


ENCODE = """
import hashlib, sys, torch
from helios.media import SegmentWriter
x = torch.arange(336).expand(192, 336) + torch.arange(192)[:, None]
frames = torch.stack([torch.stack([x + 3 * t, 2 * x - t, x // 2 + 5 * t], -1) for t in range(9)]).remainder(256)
path = SegmentWriter(sys.argv[1], size=(192, 336)).write(0, frames.to(torch.uint8))
sys.stdout.write(hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_the_bytes_do_not_depend_on_what_memory_held_before(tmp_path: Path) -> None:
    """glibc fills fresh memory as MALLOC_PERTURB_ says: with x264's lookahead on, the value 1 changes the file."""
    command = [sys.executable, "-c", ENCODE, str(tmp_path)]
    runs = [
        subprocess.run(command, env={**os.environ, "MALLOC_PERTURB_": fill}, check=True, capture_output=True, text=True)
        for fill in ("0", "1")
    ]
    assert len(runs[0].stdout) == 64
    assert runs[0].stdout == runs[1].stdout
    # x264 writes its settings into the first picture; smaller pictures than these get one thread in any case.
    assert b" threads=1 " in packets(tmp_path / "segment-00000.mp4")[0][2]


@pytest.mark.parametrize("size", [(33, 48), (32, 47), (0, 48)])
def test_the_writer_refuses_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"even sizes only|not a number of pixels"):
        media.SegmentWriter(tmp_path, size=size)


def test_the_writer_refuses_frames(tmp_path: Path) -> None:
    writer = media.SegmentWriter(tmp_path, size=(HEIGHT, WIDTH))
    with pytest.raises(InputError, match="frames of 48x34 for a video of 48x32"):
        writer.write(0, moving(1, height=34))
    with pytest.raises(InputError, match="not float32"):
        writer.write(0, moving(1).float())
    with pytest.raises(InputError, match="not uint8"):
        writer.write(0, moving(1)[:0])
    with pytest.raises(InputError, match="chunk -1"):
        writer.write(-1, moving(1))
    with pytest.raises(InputError, match="frames per second"):
        media.SegmentWriter(tmp_path, size=(HEIGHT, WIDTH), fps=0)
    assert list(tmp_path.iterdir()) == []


def test_a_pyav_without_x264_is_told_before_any_computing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with pytest.raises(HeliosError, match="without libx264"):
        media.SegmentWriter(tmp_path, size=(HEIGHT, WIDTH))


def test_finished_segments_stop_at_a_gap(run: tuple[media.SegmentWriter, list[Path]], tmp_path: Path) -> None:
    folder = run[0].folder
    (folder / ".segment-00003.mp4.part").write_bytes(b"half")
    (folder / "notes.mp4").write_bytes(b"")
    assert media.finished_segments(folder) == run[1]
    run[0].write(4, moving(1))
    assert media.finished_segments(folder) == run[1]
    run[1][1].unlink()
    assert media.finished_segments(folder) == run[1][:1]
    assert media.finished_segments(tmp_path / "nowhere") == []


# --- joining ---------------------------------------------------------------------------------------------------------


def test_join_copies_packets_and_counts_time(run: tuple[media.SegmentWriter, list[Path]], tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "out.mp4"
    assert media.join(run[1], out) == 15
    joined = packets(out)
    assert [data for _, _, data in joined] == [data for path in run[1] for _, _, data in packets(path)]
    assert [pts for pts, _, _ in joined] == [512 * k for k in range(15)]  # 12288 ticks a second, 24 frames
    assert [dts for _, dts, _ in joined] == [512 * k for k in range(15)]
    assert torch.equal(read_back(out), torch.cat([read_back(path) for path in run[1]]))
    assert os.listdir(out.parent) == ["out.mp4"]
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert stream.frames == 15
        assert stream.average_rate == 24
        assert container.duration == pytest.approx(15 / 24 * av.time_base, abs=1)


@pytest.mark.parametrize("fps", [1, 25, 60, Fraction(30000, 1001)])
def test_frame_rates(tmp_path: Path, fps: int | Fraction) -> None:
    writer = media.SegmentWriter(tmp_path / "s", size=(HEIGHT, WIDTH), fps=fps)
    media.join([writer.write(k, moving(n)) for k, n in enumerate((1, 4, 3))], tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        tick = stream.time_base
        assert tick is not None
        times = [p.pts * tick for p in container.demux(stream) if p.pts is not None]
        assert stream.average_rate == fps
    assert times == [k / Fraction(fps) for k in range(8)]


def test_join_trims_to_any_number_of_frames(run: tuple[media.SegmentWriter, list[Path]], tmp_path: Path) -> None:
    whole = torch.cat([read_back(path) for path in run[1]])
    for count in range(1, 16):
        assert media.join(run[1], tmp_path / "out.mp4", frames=count) == count
        assert torch.equal(read_back(tmp_path / "out.mp4"), whole[:count])
    with pytest.raises(InputError, match="16 frames wanted, the segments hold 15"):
        media.join(run[1], tmp_path / "out.mp4", frames=16)
    with pytest.raises(InputError, match="0 frames"):
        media.join(run[1], tmp_path / "out.mp4", frames=0)
    assert torch.equal(read_back(tmp_path / "out.mp4"), whole)


def test_metadata_is_carried_along_or_replaced(run: tuple[media.SegmentWriter, list[Path]], tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    media.join(run[1], out)
    assert media.read_metadata(out) == {"title": "T", "seed": "7"}
    media.join(run[1], out, metadata={"title": "RANDOM WEIGHTS", "comment": "not a trained model", "helios": "0.1.0"})
    assert media.read_metadata(out)["helios"] == "0.1.0"
    with av.open(str(out)) as container:  # where players look
        assert container.metadata["title"] == "RANDOM WEIGHTS"
        assert container.metadata["comment"] == "not a trained model"


@quick
@given(st.dictionaries(st.sampled_from(["title", "comment", "prompt", "a=b;c"]), st.text(max_size=200)))
def test_any_text_comes_back_from_the_metadata(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = media.SegmentWriter(tmp_path, size=(16, 16), metadata=metadata).write(0, moving(1, 16, 16))
    assert media.read_metadata(path) == metadata


def test_a_long_prompt_fits_into_the_metadata(tmp_path: Path) -> None:
    metadata = {"prompt": "Ein Fuchs läuft durch Schnee. 雪中的狐狸。" * 2000}
    path = media.SegmentWriter(tmp_path, size=(16, 16), metadata=metadata).write(0, moving(1, 16, 16))
    assert media.read_metadata(path) == metadata


def test_metadata_of_a_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "foreign.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"], container.metadata["description"] = "Holiday", "[1]"
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width = 16, 16
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    assert media.read_metadata(path) == {"title": "Holiday", "description": "[1]"}
    with pytest.raises(InputError, match="does not exist"):
        media.read_metadata(tmp_path / "none.mp4")


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def lose_the_last_frame(path: Path) -> None:
    media.SegmentWriter(path.parent, size=(HEIGHT, WIDTH)).write(1, moving(4))
    path.write_bytes(path.read_bytes()[: -len(packets(path)[-1][2])])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (damage, "missing or damaged"),
        (lose_the_last_frame, "3 frames of 4"),
        (lambda path: path.write_bytes(b""), "missing or damaged"),
        (lambda path: path.write_bytes(b"not a video"), "missing or damaged"),
        (Path.unlink, "missing or damaged"),
        (lambda p: media.SegmentWriter(p.parent, size=(64, 48)).write(1, moving(2, 64)), "48x64 at 24 fps"),
        (lambda p: media.SegmentWriter(p.parent, size=(32, 48), fps=30).write(1, moving(2)), "at 30 fps"),
    ],
)
def test_join_refuses_segments(
    run: tuple[media.SegmentWriter, list[Path]], tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    out = tmp_path / "out.mp4"
    out.write_bytes(b"the last good one")
    spoil(run[1][1])
    with pytest.raises(StateError, match=words) as caught:
        media.join(run[1], out)
    assert str(run[1][1]) in caught.value.why
    assert caught.value.fix
    assert out.read_bytes() == b"the last good one"
    assert sorted(os.listdir(tmp_path)) == ["out.mp4", "segments"]


def test_join_refuses_outputs(run: tuple[media.SegmentWriter, list[Path]], tmp_path: Path) -> None:
    for name in ("out.webm", "out", "out.gif"):
        with pytest.raises(InputError, match=r"only \.mp4 can be written") as caught:
            media.join(run[1], tmp_path / name)
        assert caught.value.fix == f"name it {tmp_path / 'out.mp4'}"
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        media.join(run[1], tmp_path / "folder.mp4")
    with pytest.raises(InputError, match="no finished segment"):
        media.join([], tmp_path / "out.mp4")
