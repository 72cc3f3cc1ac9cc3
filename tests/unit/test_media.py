"""Frames in memory: the network's range, layouts, sizes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from hypothesis import given
from hypothesis import strategies as st
from media_frames import HEIGHT, WIDTH, moving, quick
from PIL import Image
from torch import Tensor

from helios import media
from helios.errors import InputError


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
