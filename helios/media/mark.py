"""What is drawn for people: the mark on frames of random weights, and a sheet of frames to look at."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from helios.errors import InputError
from helios.media.frames import fit_frame, require_frames
from helios.media.storage import atomic

__all__ = ["contact_sheet", "mark_random"]

Font = dict[str, tuple[int, ...]]

# Letters of our own: a font that depends on the Pillow build would give other bytes on other machines.
# A row is a number, its highest bit the leftmost pixel.
_LARGE: Font = {
    "A": (14, 17, 17, 31, 17, 17, 17),
    "D": (30, 17, 17, 17, 17, 17, 30),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "G": (14, 17, 16, 23, 17, 17, 14),
    "H": (17, 17, 17, 31, 17, 17, 17),
    "I": (14, 4, 4, 4, 4, 4, 14),
    "M": (17, 27, 21, 21, 17, 17, 17),
    "N": (17, 25, 21, 19, 17, 17, 17),
    "O": (14, 17, 17, 17, 17, 17, 14),
    "R": (30, 17, 17, 30, 20, 18, 17),
    "S": (15, 16, 16, 14, 1, 1, 30),
    "T": (31, 4, 4, 4, 4, 4, 4),
    "W": (17, 17, 17, 21, 21, 27, 17),
    " ": (0, 0, 0, 0, 0, 0, 0),
}
_SMALL: Font = {
    "A": (2, 5, 7, 5, 5),
    "D": (6, 5, 5, 5, 6),
    "E": (7, 4, 6, 4, 7),
    "G": (3, 4, 5, 5, 3),
    "H": (5, 5, 7, 5, 5),
    "I": (7, 2, 2, 2, 7),
    "M": (5, 7, 7, 5, 5),
    "N": (6, 5, 5, 5, 5),
    "O": (2, 5, 5, 5, 2),
    "R": (6, 5, 6, 5, 5),
    "S": (3, 4, 2, 1, 6),
    "T": (7, 2, 2, 2, 2),
    "W": (5, 5, 7, 7, 5),
}
# The first that fits is drawn; the last one is for frames too small for any whole word.
_LAYOUTS = (
    (_LARGE, 5, ("RANDOM WEIGHTS",)),
    (_LARGE, 5, ("RANDOM", "WEIGHTS")),
    (_SMALL, 3, ("RANDOM", "WEIGHTS")),
    (_SMALL, 3, ("RND", "WTS")),
)


def mark_random(frames: Tensor) -> Tensor:
    """A copy of uint8 ``[b, f, h, w, 3]`` with RANDOM WEIGHTS on each frame, white on a black plate, low in the middle.

    One line where it fits, two in narrow frames, ``RND WTS`` below 29 pixels. The same bytes on every machine.

    Raises:
        InputError: another shape or dtype; frames smaller than 13x13 pixels, which cannot be marked.
    """
    require_frames(frames, 5)
    height, width = int(frames.shape[2]), int(frames.shape[3])
    plate = torch.from_numpy(_plate(height, width)).to(frames.device)
    rows, columns = plate.shape
    top, left = max(0, min(height - rows, round(height * 0.92) - rows)), (width - columns) // 2
    marked = frames.clone()
    marked[:, :, top : top + rows, left : left + columns, :] = plate[:, :, None]
    return marked


def contact_sheet(
    frames: Tensor, out: str | os.PathLike[str], *, columns: int = 8, tile_width: int | None = None
) -> Path:
    """Write uint8 ``[f, h, w, 3]`` as one PNG, row by row, 2 pixels apart, and return its path.

    ``tile_width`` resizes each frame to that many pixels, keeping its shape; default: as it is.

    Raises:
        InputError: another shape or dtype, not a ``.png`` name, columns or tile_width below 1.
        StorageError: the file cannot be written.
    """
    from PIL import Image

    require_frames(frames, 4)
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise InputError(f"contact sheet {path}: only .png can be written", f"name it {path.with_suffix('.png')}")
    if columns < 1 or (tile_width is not None and tile_width < 1):
        raise InputError(f"{columns} columns of width {tile_width}", "both are at least 1")
    tiles = list(frames.cpu().numpy())
    if tile_width is not None:
        tile_height = max(1, round(frames.shape[1] * tile_width / frames.shape[2]))
        tiles = [fit_frame(tile, tile_height, tile_width) for tile in tiles]
    with atomic(path) as part:
        Image.fromarray(_grid(tiles, min(columns, len(tiles)))).save(part, format="PNG")
    return path


def _grid(tiles: list[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    height, width = tiles[0].shape[:2]
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 128, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def _plate(height: int, width: int) -> np.ndarray:
    """The mark as uint8 [rows, columns], about three fifths of the width and at most a fifth of the height."""
    for font, columns, lines in _LAYOUTS:
        text = np.pad(_text(font, columns, lines), 1)
        rows, cells = text.shape
        if rows <= height and cells <= width:
            scale = max(1, min(int(width * 0.6) // cells, int(height * 0.2) // rows))
            return np.kron(text, np.full((scale, scale), 255, np.uint8))
    raise InputError(f"frames of {width}x{height} are too small to carry RANDOM WEIGHTS", "use at least 13x13 pixels")


def _text(font: Font, columns: int, lines: tuple[str, ...]) -> np.ndarray:
    """Centred lines of letters as uint8 of 0 and 1, one pixel between letters and between lines."""
    drawn = [np.concatenate([_letter(font[char], columns) for char in line], axis=1)[:, :-1] for line in lines]
    width = max(line.shape[1] for line in drawn)
    padded = []
    for line in drawn:
        free = width - line.shape[1]
        padded.append(np.pad(line, ((0, 1), (free // 2, free - free // 2))))
    return np.concatenate(padded)[:-1]


def _letter(rows: tuple[int, ...], columns: int) -> np.ndarray:
    bits = [[row >> (columns - 1 - x) & 1 for x in range(columns)] + [0] for row in rows]
    return np.array(bits, np.uint8)
