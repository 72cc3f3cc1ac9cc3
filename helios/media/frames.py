"""Frames in memory: from whatever the caller holds, to the size that is wanted, to the network's range and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from helios.errors import InputError, unknown_name

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Fit",
    "as_frames",
    "fit_frame",
    "image_to_array",
    "require_frames",
    "require_size",
    "three_channels",
    "to_frames",
    "to_model",
]

Fit = Literal["stretch", "crop"]
"""How a picture of another shape gets its size: ``stretch`` distorts it, ``crop`` covers and cuts the middle out."""

_CHANNELS = (1, 3, 4)
_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")


def as_frames(value: Any, *, height: int | None = None, width: int | None = None, fit: Fit = "stretch") -> Tensor:
    """Frames of one picture or one video that is already in memory.

    Args:
        value: a Pillow image, a numpy array, a torch tensor, or a list of them, a frame each. Arrays are
            ``[h, w]``, ``[h, w, c]``, ``[c, h, w]``, ``[f, h, w, c]`` or ``[f, c, h, w]`` with c = 1 (grey), 3 or
            4 (alpha, laid over black); where both ends could be the channels, the last is. uint8 means 0 to 255,
            floating point 0 to 1.
        height, width: the size wanted, in pixels; both or neither.
        fit: what happens to another aspect ratio (see :data:`Fit`).

    Returns:
        ``[f, h, w, 3]`` on the host, uint8 as uint8 and floating point as float32 in [0, 1], not rounded to 255
        levels. Resizing is Lanczos for both. What already has the size comes back with its values unchanged.

    Raises:
        InputError: empty, another rank, dtype or range, frames of different sizes with no size asked for.
    """
    parts = [_array(part) for part in (value if isinstance(value, list | tuple) else [value])]
    if not parts:
        raise InputError("an empty list holds no frames", "pass at least one frame")
    if (height is None) != (width is None):
        raise InputError(f"height {height} and width {width}: one is missing", "give both or neither")
    if height is not None and width is not None:
        require_size(height, width, fit)
        parts = [_fit_all(part, height, width, fit) for part in parts]
    kinds = sorted({(part.shape[1:3], part.dtype.name) for part in parts})
    if len(kinds) > 1:
        found = ", ".join(f"{w}x{h} {dtype}" for (h, w), dtype in kinds)
        raise InputError(f"the frames differ: {found}", "give height and width, and one dtype for all")
    # A copy, so that nothing the caller does to the array later shows in a run that has started.
    return torch.from_numpy(np.array(np.concatenate(parts), order="C"))


def to_model(frames: Tensor) -> Tensor:
    """Frames as the VAE takes them: ``[f, h, w, 3]`` to float32 ``[1, 3, f, h, w]`` in [-1, 1].

    uint8 v becomes 2·(v / 255) - 1, each step rounded in float32; float32 in [0, 1] becomes 2v - 1. The published
    pipelines use the same order of operations, so the bits are the same.
    """
    require_frames(frames, 4, dtypes=(torch.uint8, torch.float32))
    unit = frames.to(torch.float32) / 255.0 if frames.dtype == torch.uint8 else frames
    return (2.0 * unit - 1.0).permute(3, 0, 1, 2).unsqueeze(0).contiguous()


def to_frames(video: Tensor) -> Tensor:
    """The VAE's output as frames: floating point ``[b, 3, f, h, w]`` to uint8 ``[b, f, h, w, 3]``, same device.

    In float32: clamp(v / 2 + 1/2, 0, 1)·255, rounded half to even.

    Raises:
        InputError: another shape or dtype, or NaN: a picture cannot show that the run has gone wrong.
    """
    if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
        raise InputError(f"{video.dtype} {list(video.shape)} is not a decoded video [b, 3, f, h, w] in floating point")
    unit = video.to(torch.float32) * 0.5 + 0.5
    if bool(torch.isnan(unit).any()):
        raise InputError(
            f"the decoded video {list(video.shape)} holds NaN",
            "check the weights, or run in a wider precision (--precision fp32)",
        )
    levels = unit.clamp_(0.0, 1.0).mul_(255.0).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 4, 1).contiguous()


def require_frames(frames: Tensor, rank: int, dtypes: Sequence[torch.dtype] = (torch.uint8,)) -> None:
    """Raise InputError unless ``frames`` has that rank, ends in [h, w, 3], is not empty and has one of the dtypes."""
    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    axes = "[b, f, h, w, 3]" if rank == 5 else "[f, h, w, 3]"
    if frames.ndim != rank or frames.shape[-1] != 3 or frames.numel() == 0 or frames.dtype not in dtypes:
        found = f"{str(frames.dtype).removeprefix('torch.')} {list(frames.shape)}"
        raise InputError(f"frames are {wanted} {axes}, not {found}", "helios.media.as_frames makes them")


def require_size(height: int, width: int, fit: str) -> None:
    """Raise InputError unless height and width are positive whole numbers and ``fit`` is known."""
    for name, value in (("height", height), ("width", width)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name} {value!r} is not a number of pixels", f"give a positive whole {name}")
    if fit not in get_args(Fit):
        raise InputError(unknown_name("fit", str(fit), get_args(Fit)))


def fit_frame(
    frame: np.ndarray, height: int, width: int, fit: Fit = "stretch", pixel_aspect: float = 1.0
) -> np.ndarray:
    """One frame ``[h, w, 3]``, uint8 or float32, at ``[height, width, 3]`` by Pillow's Lanczos filter.

    ``pixel_aspect`` is the width of one pixel over its height; only ``crop`` needs to know it.
    """
    from PIL import Image

    if frame.shape[:2] == (height, width) and (fit == "stretch" or pixel_aspect == 1.0):
        return frame
    box = _crop_box(frame.shape, height, width, pixel_aspect) if fit == "crop" else None
    if frame.dtype == np.uint8:
        image = Image.fromarray(np.ascontiguousarray(frame))
        return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
    planes = [Image.fromarray(np.ascontiguousarray(frame[:, :, c])) for c in range(3)]
    resized = [np.asarray(plane.resize((width, height), Image.Resampling.LANCZOS, box=box)) for plane in planes]
    # Lanczos rings beyond the range of its input; Pillow clips bytes itself, but not floats.
    clipped: np.ndarray = np.stack(resized, axis=-1).clip(0.0, 1.0)
    return clipped


def image_to_array(image: Image) -> np.ndarray:
    """A Pillow image as uint8 ``[h, w, 3]``: upright (EXIF), alpha over black, grey and palette expanded."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in _DEEP_GREY:
        deep = np.asarray(image).astype(np.uint32)
        return three_channels(((deep * 255 + 32767) // 65535).astype(np.uint8)[:, :, None])
    if image.mode in ("I", "F"):
        raise InputError(f"pixels of mode {image.mode!r} have no fixed range", "save it as an 8-bit PNG or JPEG")
    transparent = "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La")
    if image.mode in ("RGBa", "La"):  # premultiplied: Pillow converts these only to their own straight form
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    return three_channels(np.asarray(image.convert("RGBA" if transparent else "RGB")))


def _array(value: Any) -> np.ndarray:
    """One element of the input as ``[f, h, w, 3]``, uint8 or float32 in [0, 1]."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        array = tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
    elif isinstance(value, np.ndarray):
        array = value
    elif hasattr(value, "getexif"):  # a Pillow image, told without importing Pillow
        array = image_to_array(value)
    else:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise InputError(
            f"{kind} is neither a Pillow image, a numpy array nor a torch tensor",
            "read files with helios.media.read_image or read_video",
        )
    return three_channels(_in_range(_channels_last(array)))


def _channels_last(array: np.ndarray) -> np.ndarray:
    shape = list(array.shape)
    if array.size == 0:
        raise InputError(f"an array of shape {shape} holds no pixels", "pass at least one frame")
    if array.ndim == 2:
        return array[None, :, :, None]
    if array.ndim not in (3, 4):
        raise InputError(f"shape {shape} is neither a picture nor a video", "pass one video at a time: [f, h, w, 3]")
    array = array if array.ndim == 4 else array[None]
    if array.shape[3] in _CHANNELS:
        return array
    if array.shape[1] in _CHANNELS:
        return array.transpose(0, 2, 3, 1)
    raise InputError(f"shape {shape} has no axis of 1, 3 or 4 channels", "wanted [f, h, w, c] or [f, c, h, w]")


def _in_range(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise InputError(f"pixels of dtype {array.dtype}", "uint8 (0 to 255) or floating point (0 to 1)")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0.0 and high <= 1.0):  # so written, NaN is refused too
        raise InputError(
            f"floating-point pixels from {low:g} to {high:g}, wanted 0 to 1",
            "divide 0..255 by 255; turn -1..1 into (x + 1) / 2",
        )
    return array.astype(np.float32)


def three_channels(array: np.ndarray) -> np.ndarray:
    """``[..., c]`` with c of 1 (grey), 3 or 4 (alpha, laid over black) as ``[..., 3]``, same dtype."""
    channels = array.shape[-1]
    if channels == 3:
        return array
    if channels == 1:
        return np.repeat(array, 3, axis=-1)
    colour, alpha = array[..., :3], array[..., 3:]
    if array.dtype == np.uint8:
        return np.asarray((colour.astype(np.uint16) * alpha + 127) // 255, np.uint8)
    return np.asarray(colour * alpha)


def _fit_all(frames: np.ndarray, height: int, width: int, fit: Fit) -> np.ndarray:
    return np.stack([fit_frame(frame, height, width, fit) for frame in frames])


def _crop_box(
    shape: tuple[int, ...], height: int, width: int, pixel_aspect: float
) -> tuple[float, float, float, float]:
    """The largest centred box of the wanted shape, in source pixels: left, top, right, bottom."""
    rows, columns = shape[:2]
    scale = min(columns * pixel_aspect / width, rows / height)
    box_width, box_height = min(width * scale / pixel_aspect, columns), min(height * scale, rows)
    left, top = (columns - box_width) / 2, (rows - box_height) / 2
    return left, top, min(left + box_width, columns), min(top + box_height, rows)
