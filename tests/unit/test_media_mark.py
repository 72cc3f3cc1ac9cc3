"""What people look at: the mark of random weights, the contact sheet, and exact conversion on request."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from media_frames import moving, quick
from PIL import Image

from helios import media
from helios.errors import InputError, StorageError
from helios.media import reading

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
