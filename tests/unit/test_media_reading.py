"""Pictures and videos in: orientation, odd sizes, pixels that are not square, bad and damaged files."""

from __future__ import annotations

import errno
import io
import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from hypothesis import given
from hypothesis import strategies as st
from media_frames import HEIGHT, WIDTH, moving, quick, raw_video, read_back
from PIL import Image
from torch import Tensor

from helios import media
from helios.errors import InputError

# --- pictures --------------------------------------------------------------------------------------------------------


def test_read_image_equals_the_published_preprocessing(tmp_path: Path) -> None:
    picture = Image.fromarray(moving(1, 61, 83)[0].numpy())
    picture.save(tmp_path / "p.png")
    theirs = VideoProcessor(vae_scale_factor=8).preprocess(picture, height=32, width=48)
    frame = media.read_image(tmp_path / "p.png", height=32, width=48)
    assert frame.shape == (32, 48, 3)
    assert torch.equal(media.to_model(frame[None])[:, :, 0], theirs)


# What each EXIF orientation says was done to the upright picture when it was stored, from the EXIF standard.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = moving(1, 20, 30)[0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright.numpy()))
    Image.fromarray(stored).save(tmp_path / "p.png", exif=exif)
    assert torch.equal(media.read_image(tmp_path / "p.png", height=20, width=30), upright)


def png(frames: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frames[0].numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"hello " * 100, "not a picture that Pillow knows"),
        (png(moving(1))[:200], "cannot be read: .*truncated"),
    ],
)
def test_bad_pictures(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        media.read_image(path, height=8, width=8)
    assert str(path) in caught.value.why
    assert caught.value.fix


@pytest.mark.parametrize("read", [media.read_image, media.read_video])
def test_a_folder_or_a_forbidden_file(
    tmp_path: Path, read: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="is a folder"):
        read(tmp_path, height=8, width=8)
    path = tmp_path / "secret"
    path.write_bytes(b"x")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # a mode of 000 would not stop root, which tests may run as
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        read(path, height=8, width=8)


# --- videos ----------------------------------------------------------------------------------------------------------


def test_read_video_gives_exact_frames(tmp_path: Path) -> None:
    frames = moving(7, 34, 50)
    path = raw_video(tmp_path / "v.mp4", frames)
    assert torch.equal(media.read_video(path, height=34, width=50), frames)
    assert torch.equal(media.read_video(path, height=34, width=50, max_frames=3), frames[:3])
    resized = media.as_frames(frames, height=20, width=21)
    assert torch.equal(media.read_video(path, height=20, width=21), resized)


@quick
@given(st.integers(3, 41), st.integers(3, 41), st.integers(1, 4))
def test_videos_of_odd_sizes(tmp_path: Path, height: int, width: int, count: int) -> None:
    frames = moving(count, height, width)
    path = raw_video(tmp_path / "odd.mkv", frames)
    assert torch.equal(media.read_video(path, height=height, width=width), frames)


# Display matrices as cameras write them (16.16 fixed point), and the picture that a viewer must see.
ONE = 1 << 16
SHOWN: dict[str, tuple[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]]] = {
    "clockwise": ((0, ONE, -ONE, 0), lambda p: np.rot90(p, -1, (1, 2))),
    "half turn": ((-ONE, 0, 0, -ONE), lambda p: np.rot90(p, 2, (1, 2))),
    "anticlockwise": ((0, -ONE, ONE, 0), lambda p: np.rot90(p, 1, (1, 2))),
    "mirrored": ((-ONE, 0, 0, ONE), lambda p: p[:, :, ::-1]),
    "transposed": ((0, ONE, ONE, 0), lambda p: p.swapaxes(1, 2)),
}


@pytest.mark.parametrize("name", SHOWN)
def test_display_rotation(tmp_path: Path, name: str) -> None:
    (a, b, c, d), shown = SHOWN[name]
    frames = moving(2, 20, 30)
    path = raw_video(tmp_path / "v.mp4", frames, lambda s: s.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30]))
    wanted = torch.from_numpy(np.ascontiguousarray(shown(frames.numpy())))
    assert torch.equal(media.read_video(path, height=wanted.shape[1], width=wanted.shape[2]), wanted)


def test_crop_knows_pixels_that_are_not_square(tmp_path: Path) -> None:
    frames = torch.zeros(1, 20, 40, 3, dtype=torch.uint8)
    frames[:, :, 12:28] = 255  # a square takes columns 15 to 25 (shown 20 wide), and Lanczos looks 3 pixels further
    path = raw_video(
        tmp_path / "v.mp4", frames, lambda s: setattr(s.codec_context, "sample_aspect_ratio", Fraction(2, 1))
    )
    assert media.read_video(path, height=16, width=16, fit="crop").min() == 255
    assert media.read_video(path, height=16, width=32, fit="crop").min() == 0


def test_crop_knows_such_pixels_in_a_turned_video(tmp_path: Path) -> None:
    frames = torch.zeros(1, 20, 40, 3, dtype=torch.uint8)
    frames[:, :, 12:28] = 255

    def turned(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        stream.set_display_matrix([0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30])

    path = raw_video(tmp_path / "v.mp4", frames, turned)
    assert media.read_video(path, height=16, width=16, fit="crop").min() == 255
    assert media.read_video(path, height=32, width=16, fit="crop").min() == 0


def test_alpha_of_a_video_lies_over_black(tmp_path: Path) -> None:
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., 1], rgba[..., 3] = 200, 128
    with av.open(str(tmp_path / "v.mov"), "w") as container:
        stream = container.add_stream("png", rate=24)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "rgba"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")))
        container.mux(stream.encode(None))
    frames = media.read_video(tmp_path / "v.mov", height=16, width=16)
    assert frames[0, 3, 3].tolist() == [0, 100, 0]


def silence() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.mp4", None, "does not exist"),
        ("http:v.mp4", None, "does not exist"),
        ("empty.mp4", b"", "is empty"),
        ("zeros.mp4", bytes(5000), "not a video that FFmpeg knows"),
        ("notes.txt", b"hello world\n" * 50, "is a text file"),
        ("still.png", png(moving(1)), r"still picture \(png\)"),
        ("sound.wav", silence(), "no video stream; found: audio"),
    ],
)
def test_not_a_video(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        media.read_video(tmp_path / name, height=8, width=8)
    assert name in caught.value.why
    assert caught.value.fix


def test_a_video_without_frames_or_with_too_few(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "none.avi"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width = 16, 16
        container.start_encoding()
    with pytest.raises(InputError, match="has 0 frames, at least 1"):
        media.read_video(tmp_path / "none.avi", height=8, width=8)
    path = raw_video(tmp_path / "v.mp4", moving(5))
    assert media.read_video(path, height=8, width=8, min_frames=5).shape[0] == 5
    with pytest.raises(InputError, match="has 5 frames, at least 33 are needed"):
        media.read_video(path, height=8, width=8, min_frames=33)
    with pytest.raises(InputError, match="below min_frames"):
        media.read_video(path, height=8, width=8, max_frames=0)


def test_a_truncated_video_names_the_frame(tmp_path: Path) -> None:
    path = raw_video(tmp_path / "whole.mp4", moving(12), movflags="+faststart")
    data = path.read_bytes()
    with av.open(str(path)) as container:
        ends = sorted(entry.pos + entry.size for entry in container.streams.video[0].index_entries)
    assert ends[-1] == len(data)
    cut = tmp_path / "cut.mp4"
    for kept, end in enumerate(ends[:-1], start=1):
        for length in (end, end + 1, end + 20):  # exactly between two frames, and inside the next one
            cut.write_bytes(data[:length])
            with pytest.raises(InputError, match=f"frame {kept + 1} of 12 is damaged or missing") as caught:
                read_back(cut)
            assert f"use only its first {kept} frames" in caught.value.fix
            first = media.read_video(cut, height=HEIGHT, width=WIDTH, max_frames=kept)
            assert torch.equal(first, moving(kept))
    cut.write_bytes(data[: ends[0] - 1])
    with pytest.raises(InputError, match="frame 1 of 12 is damaged or missing, 0 before it are whole"):
        read_back(cut)


def test_half_a_frame_is_not_a_frame(tmp_path: Path) -> None:
    """A decoder that shows what it has of a picture, such as that of JPEG, must not hide that the rest is gone."""
    path = tmp_path / "v.mov"
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("mjpeg", rate=24)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuvj420p"
        for frame in moving(3).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes()[:-60])
    assert media.read_video(path, height=8, width=8, max_frames=2).shape[0] == 2
    with pytest.raises(InputError, match="frame 3 of 3 is damaged"):
        media.read_video(path, height=8, width=8, max_frames=3)


def test_a_video_cut_before_its_index_says_so(tmp_path: Path) -> None:
    data = raw_video(tmp_path / "whole.mp4", moving(12)).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"index \(moov\) is missing or damaged"):
        read_back(tmp_path / "cut.mp4")


def test_a_damaged_frame_in_the_middle(tmp_path: Path) -> None:
    path = raw_video(tmp_path / "v.mp4", moving(9))
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        entry = list(container.streams.video[0].index_entries)[4]
    data[entry.pos : entry.pos + entry.size] = b"\xff" * entry.size
    path.write_bytes(data)
    with pytest.raises(InputError, match="frame 5 of 9 is damaged"):
        read_back(path)
