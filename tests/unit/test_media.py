"""Pictures and videos in and out: ranges, layouts, orientation, segments, joining, bad files and a full disk."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from helios import media
from helios.errors import HeliosError, InputError, StateError, StorageError
from helios.media import reading, writing

HEIGHT, WIDTH = 32, 48
quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def moving(count: int, height: int = HEIGHT, width: int = WIDTH, shift: int = 0, scale: float = 1.0) -> Tensor:
    """Smooth, coloured, moving frames [count, height, width, 3], each different from the others."""
    y, x = np.mgrid[0:height, 0:width] / scale
    waves = [
        np.stack([np.sin(x / 11 + t / 5), np.cos(y / 9 + t / 7), np.sin((x + y) / 17 - t / 9)], axis=-1)
        for t in range(shift, shift + count)
    ]
    return torch.from_numpy(np.round(127 + 100 * np.stack(waves)).astype(np.uint8))


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all values of two uint8 tensors of one shape."""
    assert a.shape == b.shape
    error = (a.double() - b.double()).square().mean().item()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def raw_video(path: Path, frames: Tensor, setup: Callable[[Any], None] = lambda stream: None, **options: str) -> Path:
    """A video straight from PyAV, lossless and in full colour, so that tests of reading see exact pixels."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264rgb", rate=24)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "rgb24"
        stream.codec_context.options = {"crf": "0", "preset": "ultrafast"}
        setup(stream)
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def packets(path: Path) -> list[tuple[int | None, int | None, bytes]]:
    """(pts, dts, payload) of each packet of the first video stream."""
    with av.open(str(path)) as container:
        return [(p.pts, p.dts, bytes(p)) for p in container.demux(container.streams.video[0]) if p.size]


def read_back(path: Path) -> Tensor:
    return media.read_video(path, height=HEIGHT, width=WIDTH)


@pytest.fixture
def run(tmp_path: Path) -> tuple[media.SegmentWriter, list[Path]]:
    """A writer with three finished segments of 9, 1 and 5 frames."""
    writer = media.SegmentWriter(tmp_path / "segments", size=(HEIGHT, WIDTH), metadata={"title": "T", "seed": 7})
    return writer, [writer.write(k, moving(n, shift=20 * k)) for k, n in enumerate((9, 1, 5))]


def test_importing_media_loads_neither_av_nor_pillow() -> None:
    code = "import sys, helios.media; sys.exit(any(n in sys.modules for n in ('av', 'PIL', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the network's range ---------------------------------------------------------------------------------------------


def all_levels() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)


def test_to_model_gives_the_bits_of_the_published_pipelines() -> None:
    frames = all_levels()
    images = [Image.fromarray(frame) for frame in frames.numpy()]
    theirs = VideoProcessor(vae_scale_factor=8).preprocess_video(images, height=16, width=16)
    ours = media.to_model(frames)
    assert ours.shape == (1, 3, 1, 16, 16)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


def test_to_model_keeps_floats_that_are_already_sized() -> None:
    values = torch.rand(2, 16, 24, 3, generator=torch.Generator().manual_seed(0))
    theirs = VideoProcessor(vae_scale_factor=8).preprocess_video(values.numpy()[None], height=16, width=24)
    assert torch.equal(media.to_model(media.as_frames(values, height=16, width=24)), theirs)


def test_to_frames_rounds_half_to_even_and_clamps() -> None:
    # 0.5/255, 1.5/255 and 2.5/255 in [-1, 1]; float64 holds them near enough that float32 hits the half exactly or not
    halves = torch.tensor([0.5, 1.5, 2.5, 126.5, 127.5], dtype=torch.float32)
    video = (halves / 255 * 2 - 1).reshape(1, 1, 1, 1, 5).expand(1, 3, 1, 1, 5)
    level = (video * 0.5 + 0.5) * 255
    wanted = np.round(level.numpy()).astype(np.uint8)  # numpy rounds half to even
    assert np.array_equal(media.to_frames(video).permute(0, 4, 1, 2, 3).numpy(), wanted)
    exact = torch.tensor([0.0]).reshape(1, 1, 1, 1, 1).expand(1, 3, 1, 1, 1)  # 127.5 exactly
    assert media.to_frames(exact).unique().tolist() == [128]
    wild = torch.tensor([-7.0, 7.0, float("-inf"), float("inf")]).reshape(1, 1, 1, 1, 4).expand(1, 3, 1, 1, 4)
    assert media.to_frames(wild)[0, 0, 0, :, 0].tolist() == [0, 255, 0, 255]


def test_to_frames_equals_the_published_postprocessing() -> None:
    video = torch.randn(2, 3, 5, 8, 12, generator=torch.Generator().manual_seed(1))
    theirs = VideoProcessor(vae_scale_factor=8).postprocess_video(video, output_type="np")
    assert np.array_equal(media.to_frames(video).numpy(), (theirs * 255).round().astype(np.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_level_survives_the_way_there_and_back(dtype: torch.dtype) -> None:
    frames = all_levels()
    back = media.to_frames(media.to_model(frames).to(dtype))
    assert torch.equal(back[0], frames)
    assert back.is_contiguous()


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (1, 4, 4, 8, 8)])
def test_to_frames_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="decoded video"):
        media.to_frames(torch.zeros(shape))


def test_to_frames_refuses_nan() -> None:
    video = torch.zeros(1, 3, 2, 4, 4)
    video[0, 1, 1, 2, 2] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        media.to_frames(video)


def test_to_model_refuses_network_layout() -> None:
    with pytest.raises(InputError, match=r"\[f, h, w, 3\], not float32 \[1, 3, 2, 8, 8\]"):
        media.to_model(torch.zeros(1, 3, 2, 8, 8))


# --- frames in memory ------------------------------------------------------------------------------------------------


def test_every_layout_is_the_same_frames() -> None:
    frames = moving(2)
    array = frames.numpy()
    same: list[Any] = [
        frames,
        frames.permute(0, 3, 1, 2),
        array,
        np.moveaxis(array, -1, 1),
        [Image.fromarray(f) for f in array],
        list(frames),
        tuple(f.permute(2, 0, 1) for f in frames),
    ]
    for value in same:
        assert torch.equal(media.as_frames(value), frames)
        assert torch.equal(media.as_frames(value, height=HEIGHT, width=WIDTH), frames)


def test_as_frames_copies() -> None:
    source = moving(1)
    frames = media.as_frames(source)
    source.zero_()
    assert frames.max() > 0


def test_grey_and_alpha() -> None:
    grey = np.full((5, 6), 77, np.uint8)
    assert media.as_frames(grey).unique().tolist() == [77]
    assert media.as_frames(grey[None]).shape == (1, 5, 6, 3)
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, 128
    assert media.as_frames(rgba)[0, 0, 0].tolist() == [100, 0, 0]  # 200 · 128 / 255 = 100.4
    assert media.as_frames(Image.fromarray(rgba)).unique().tolist() == [0, 100]
    floating = media.as_frames(rgba.astype(np.float64) / 255)
    assert floating.dtype == torch.float32
    assert floating[0, 0, 0, 0].item() == pytest.approx(200 / 255 * 128 / 255, rel=1e-6)


def test_pillow_modes_become_rgb() -> None:
    base = Image.fromarray(moving(1)[0].numpy())
    for mode in ("L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA", "RGBa", "La", "PA"):
        step = base.convert("RGBA" if mode in ("RGBa", "PA") else "LA" if mode == "La" else base.mode)
        image = step.convert(mode)
        assert media.as_frames(image).shape == (1, HEIGHT, WIDTH, 3), mode
    deep = Image.fromarray(np.array([[0, 65535], [32768, 257]], np.uint16))
    assert media.as_frames(deep)[0, :, :, 0].tolist() == [[0, 255], [128, 1]]
    with pytest.raises(InputError, match="mode 'F'"):
        media.as_frames(Image.fromarray(np.zeros((4, 4), np.float32)))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "empty list"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no pixels"),
        (np.zeros((5, 6, 7), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((1, 2, 4, 4, 3), np.uint8), "neither a picture nor a video"),
        (np.zeros((4, 4, 3), np.int64), "dtype int64"),
        (np.full((4, 4, 3), -0.5), "from -0.5 to -0.5"),
        (np.full((4, 4, 3), 200.0), "wanted 0 to 1"),
        (np.full((4, 4, 3), np.nan), "wanted 0 to 1"),
        ("cat.png", "builtins.str"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)], "frames differ: 4x4 uint8, 6x4 uint8"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3))], "frames differ"),
    ],
)
def test_as_frames_refuses(value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        media.as_frames(value)
    assert caught.value.fix


@pytest.mark.parametrize(
    "size", [{"height": 8}, {"height": 0, "width": 8}, {"height": 8, "width": 2.5}, {"height": True, "width": 8}]
)
def test_as_frames_refuses_a_size(size: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"width|height"):
        media.as_frames(moving(1), **size)


def test_unknown_fit_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'crop'"):
        media.as_frames(moving(1), height=8, width=8, fit="crops")  # type: ignore[arg-type]


@quick
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["stretch", "crop"]),
    st.booleans(),
)
def test_any_size_becomes_any_size(h: int, w: int, height: int, width: int, fit: media.Fit, floating: bool) -> None:
    plain = torch.tensor([10, 200, 90], dtype=torch.uint8).expand(2, h, w, 3)
    value = plain.float() / 255 if floating else plain
    out = media.as_frames(value, height=height, width=width, fit=fit)
    assert out.shape == (2, height, width, 3)
    assert out.dtype == value.dtype
    assert (out.double() - value[:1, :1, :1].double()).abs().max() <= (1e-6 if floating else 0)


def test_floats_stay_in_range_when_lanczos_rings() -> None:
    edge = torch.zeros(1, 8, 8, 3)
    edge[:, :, 4:] = 1.0
    resized = media.as_frames(edge, height=24, width=24)
    assert (resized.min().item(), resized.max().item()) == (0.0, 1.0)
    bytes_resized = media.as_frames((edge * 255).to(torch.uint8), height=24, width=24)
    assert (resized * 255 - bytes_resized).abs().max() <= 1.0


def test_crop_keeps_the_middle_and_its_shape() -> None:
    wide = torch.zeros(1, 10, 40, 3, dtype=torch.uint8)
    wide[:, :, 15:25] = 255  # a white square in the middle, black at both sides
    assert media.as_frames(wide, height=10, width=10, fit="crop").min() == 255
    assert media.as_frames(wide, height=10, width=10, fit="stretch").min() == 0
    assert media.as_frames(wide.transpose(1, 2), height=10, width=10, fit="crop").min() == 255


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


# --- what people look at ---------------------------------------------------------------------------------------------


def drawn(height: int, width: int) -> np.ndarray:
    """Where the mark is white on a grey frame, and where it is black, as characters [height, width]."""
    marked = media.mark_random(torch.full((1, 1, height, width, 3), 90, dtype=torch.uint8))[0, 0]
    assert torch.equal(marked[..., 0], marked[..., 1])
    assert torch.equal(marked[..., 0], marked[..., 2])
    letters = {0: ".", 255: "#", 90: " "}
    return np.array([[letters[v] for v in row] for row in marked[..., 0].tolist()])


def plate(height: int, width: int) -> list[str]:
    return [text.strip() for text in ("".join(row) for row in drawn(height, width)) if text.strip()]


LARGE_TWO_LINES = [
    "...........................................",
    "....####...###..#...#.####...###..#...#....",
    "....#...#.#...#.##..#.#...#.#...#.##.##....",
    "....#...#.#...#.#.#.#.#...#.#...#.#.#.#....",
    "....####..#####.#..##.#...#.#...#.#.#.#....",
    "....#.#...#...#.#...#.#...#.#...#.#...#....",
    "....#..#..#...#.#...#.#...#.#...#.#...#....",
    "....#...#.#...#.#...#.####...###..#...#....",
    "...........................................",
    ".#...#.#####..###...###..#...#.#####..####.",
    ".#...#.#.......#...#...#.#...#...#...#.....",
    ".#...#.#.......#...#.....#...#...#...#.....",
    ".#.#.#.####....#...#.###.#####...#....###..",
    ".#.#.#.#.......#...#...#.#...#...#.......#.",
    ".##.##.#.......#...#...#.#...#...#.......#.",
    ".#...#.#####..###...###..#...#...#...####..",
    "...........................................",
]


def test_the_mark_in_a_small_frame_letter_by_letter() -> None:
    assert plate(64, 64) == LARGE_TWO_LINES


def test_the_mark_scales_with_the_frame() -> None:
    one_line = plate(64, 96)
    assert (len(one_line), len(one_line[0])) == (9, 85)
    assert plate(384, 640) == ["".join(4 * c for c in row) for row in one_line for _ in range(4)]


def test_the_smallest_frames_carry_the_short_form() -> None:
    assert plate(13, 13) == [
        ".............",
        ".##..##..##..",
        ".#.#.#.#.#.#.",
        ".##..#.#.#.#.",
        ".#.#.#.#.#.#.",
        ".#.#.#.#.##..",
        ".............",
        ".#.#.###..##.",
        ".#.#..#..#...",
        ".###..#...#..",
        ".###..#....#.",
        ".#.#..#..##..",
        ".............",
    ]
    with pytest.raises(InputError, match="12x12 are too small"):
        media.mark_random(torch.zeros(1, 1, 12, 12, 3, dtype=torch.uint8))


@quick
@given(st.integers(13, 150), st.integers(13, 200))
def test_any_frame_is_marked_once_and_nowhere_else(height: int, width: int) -> None:
    image = drawn(height, width)
    rows, columns = np.nonzero(image != " ")
    box = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert " " not in box
    assert (box == "#").sum() >= 50
    assert {*box[0], *box[-1], *box[:, 0], *box[:, -1]} == {"."}


def test_mark_copies_and_marks_every_frame() -> None:
    frames = moving(6, 64, 64).reshape(2, 3, 64, 64, 3)
    before = frames.clone()
    marked = media.mark_random(frames)
    assert torch.equal(frames, before)
    assert torch.equal(marked, media.mark_random(frames))
    changed = (marked != frames).any(-1)
    assert bool(changed.flatten(2).any(-1).all())
    with pytest.raises(InputError, match=r"\[b, f, h, w, 3\]"):
        media.mark_random(frames[0])


def test_the_mark_survives_encoding(tmp_path: Path) -> None:
    marked = media.mark_random(moving(5, 64, 64)[None])[0]
    path = media.SegmentWriter(tmp_path, size=(64, 64)).write(0, marked)
    back = media.read_video(path, height=64, width=64).float().mean(-1)
    rows = slice(round(64 * 0.92) - 17, round(64 * 0.92))
    letters = np.array([[c == "#" for c in line] for line in LARGE_TWO_LINES])
    seen = back[:, rows, 10:53] > 127
    assert bool((seen == torch.from_numpy(letters)).all())


def test_contact_sheet(tmp_path: Path) -> None:
    frames = moving(5, 10, 20)
    path = media.contact_sheet(frames, tmp_path / "sheet.png", columns=3)
    with Image.open(path) as image:
        sheet = torch.from_numpy(np.array(image))
    assert sheet.shape == (22, 64, 3)
    for k, frame in enumerate(frames):
        top, left = k // 3 * 12, k % 3 * 22
        assert torch.equal(sheet[top : top + 10, left : left + 20], frame)
    assert sheet[12:, 44:].unique().tolist() == [128]
    with Image.open(media.contact_sheet(frames, tmp_path / "small.png", tile_width=10)) as image:
        assert image.size == (5 * 12 - 2, 5)


def test_contact_sheet_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"only \.png"):
        media.contact_sheet(moving(1), tmp_path / "sheet.jpg")
    with pytest.raises(InputError, match="at least 1"):
        media.contact_sheet(moving(1), tmp_path / "sheet.png", columns=0)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write"):
        media.contact_sheet(moving(1), tmp_path / "file" / "sheet.png")


def test_exact_conversion_is_not_the_default() -> None:
    """Why reading and writing pass flags: without them swscale darkens by more than half a level on average."""
    picture = moving(1, 64, 96)[0].numpy()
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
        format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", interpolation=reading.exact_conversion()
    )
    exact = frame.reformat(format="rgb24", interpolation=reading.exact_conversion()).to_ndarray()
    careless = frame.reformat(format="rgb24").to_ndarray()
    assert abs(float((exact.astype(float) - picture).mean())) < 0.1
    assert float((picture - careless.astype(float)).mean()) > 0.5
