"""Pictures and videos from files, each mistake told before any of it reaches a model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from helios.errors import InputError
from helios.media.frames import Fit, fit_frame, image_to_array, require_size, three_channels

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = ["exact_conversion", "read_image", "read_metadata", "read_video"]

# What the container says about itself rather than about the video.
_STRUCTURAL = ("major_brand", "minor_version", "compatible_brands", "encoder")


def read_image(path: str | os.PathLike[str], *, height: int, width: int, fit: Fit = "stretch") -> Tensor:
    """A picture as uint8 ``[height, width, 3]``: upright (EXIF), alpha over black, resized by Lanczos.

    Of an animation, the first frame. ``fit`` says what happens to another aspect ratio (see :data:`Fit`).

    Raises:
        InputError: missing, a folder, empty, unreadable, not a picture, or cut off.
    """
    from PIL import Image, UnidentifiedImageError

    require_size(height, width, fit)
    file = _existing_file(path, "image")
    try:
        with Image.open(file) as image:
            array = image_to_array(image)
    except UnidentifiedImageError as error:
        raise InputError(f"image {file}: not a picture that Pillow knows", "a PNG, JPEG or WebP file") from error
    except InputError as error:
        raise InputError(f"image {file}: {error.why}", error.fix) from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"image {file} cannot be read: {error}", "copy or export the file again") from error
    return torch.from_numpy(np.array(fit_frame(array, height, width, fit)))


def read_video(
    path: str | os.PathLike[str],
    *,
    height: int,
    width: int,
    max_frames: int | None = None,
    min_frames: int = 1,
    fit: Fit = "stretch",
) -> Tensor:
    """The frames of a video as uint8 ``[f, height, width, 3]``, each as it is stored, whatever the frame rate.

    Args:
        path: a file in any format that PyAV reads.
        height, width: the size wanted, in pixels; each frame is resized (Lanczos) as soon as it is decoded.
        max_frames: stop after that many; the rest of the file is not looked at.
        min_frames: fewer are an error.
        fit: what happens to another aspect ratio (see :data:`Fit`).

    Raises:
        InputError: missing, a folder, empty, unreadable, not a video, no frames, too few, or damaged (the message
            names the frame: what was decoded before it is not used, since nobody asked for a shorter video).
            Matroska, WebM and transport streams have no list of their frames: cut off, they are shorter videos.
    """
    require_size(height, width, fit)
    if max_frames is not None and max_frames < max(min_frames, 1):
        raise InputError(f"max_frames {max_frames} is below min_frames {min_frames}", "ask for at least one frame")
    frames: list[np.ndarray] = []
    with _opened(path) as container:
        stream = _video_stream(container, Path(path))
        for frame in _decoded(container, stream, Path(path)):
            frames.append(_fitted(frame, stream, height, width, fit))
            if len(frames) == max_frames:
                break
    if len(frames) < max(min_frames, 1):
        raise InputError(
            f"video {path} has {len(frames)} frames, at least {max(min_frames, 1)} are needed",
            "use a longer video" if frames else "export it again: there is no picture in it",
        )
    return torch.from_numpy(np.stack(frames))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a video: of one written here, exactly what was given then; of others, the container's tags.

    Raises:
        InputError: missing, a folder, empty, or not a video.
    """
    with _opened(path) as container:
        tags = {key: value for key, value in container.metadata.items() if key not in _STRUCTURAL}
    try:
        own = json.loads(tags.get("description", ""))
    except ValueError:
        return tags
    if not isinstance(own, dict):
        return tags
    return {str(key): str(value) for key, value in own.items()}


def exact_conversion() -> int:
    """Flags under which swscale rounds colours; its default truncates, and RGB comes out about one level darker."""
    from av.video.reformatter import Interpolation as Flag

    return int(Flag.BICUBIC | Flag.ACCURATE_RND | Flag.FULL_CHR_H_INT | Flag.FULL_CHR_H_INP | Flag.BITEXACT)


def _existing_file(path: str | os.PathLike[str], kind: str) -> Path:
    file = Path(path).absolute()
    if file.is_dir():
        raise InputError(f"{kind} {file} is a folder", f"name one {kind} file in it")
    if not file.exists():
        raise InputError(f"{kind} {file} does not exist", "check the path")
    try:
        with file.open("rb") as handle:
            empty = not handle.read(1)
    except OSError as error:
        raise InputError(f"{kind} {file} cannot be read: {error.strerror}", "check its permissions") from error
    if empty:
        raise InputError(f"{kind} {file} is empty (0 bytes)", "copy or export the file again")
    return file


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[InputContainer]:
    import av

    file = _existing_file(path, "video")
    try:
        # Absolute, so that no name can be taken for one of FFmpeg's protocols.
        container = av.open(str(file), "r", metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(f"video {file}: {_why_unreadable(file)}", "copy or export the file again") from error
    with container:
        yield container


def _why_unreadable(file: Path) -> str:
    with file.open("rb") as handle:
        head = handle.read(12)
    if head[4:8] == b"ftyp":
        return "an mp4 whose index (moov) is missing or damaged: the recording or the download was cut off"
    return "not a video that FFmpeg knows"


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    from av.stream import Disposition

    name = container.format.name
    # FFmpeg shows any text as a video of a terminal, and any picture as a video of one frame.
    if name == "tty":
        raise InputError(f"video {path} is a text file", "name a video, such as an mp4")
    if name.endswith("_pipe") or name == "image2":
        raise InputError(f"video {path} is a still picture ({name.removesuffix('_pipe')})", "give it as the image")
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({s.type for s in container.streams}))
        fix = "name a video, such as an mp4" if kinds else "the file may be cut off: copy or export it again"
        raise InputError(f"video {path} has no video stream; found: {kinds or 'nothing'}", fix)
    return streams[0]


def _decoded(container: InputContainer, stream: VideoStream, path: Path) -> Iterator[VideoFrame]:
    """Each frame in order; InputError at the first that is damaged or missing."""
    import av

    done = 0
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise _damaged(path, done, stream)
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise _damaged(path, done, stream)
                yield frame
                done += 1
    except av.FFmpegError as error:
        raise _damaged(path, done, stream) from error
    # A file that ends exactly between two frames gives no error at all; only its index knows of the others.
    size = path.stat().st_size
    if any(entry.pos + entry.size > size for entry in stream.index_entries):
        raise _damaged(path, done, stream)


def _damaged(path: Path, done: int, stream: VideoStream) -> InputError:
    of = f" of {stream.frames}" if stream.frames else ""
    return InputError(
        f"video {path}: frame {done + 1}{of} is damaged or missing, {done} before it are whole",
        "copy the file again" + (f", or use only its first {done} frames" if done else ""),
    )


def _fitted(frame: VideoFrame, stream: VideoStream, height: int, width: int, fit: Fit) -> np.ndarray:
    alpha = any(component.is_alpha for component in frame.format.components)
    picture = frame.reformat(format="rgba" if alpha else "rgb24", interpolation=exact_conversion()).to_ndarray()
    upright, turned = _upright(three_channels(picture), frame)
    aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    return fit_frame(upright, height, width, fit, 1 / aspect if turned else aspect)


def _upright(picture: np.ndarray, frame: VideoFrame) -> tuple[np.ndarray, bool]:
    """The picture as its display matrix wants it shown (quarter turns and mirrors), and whether its axes swapped.

    The matrix maps (x, y) to (a·x + c·y, b·x + d·y), stored as a b u c d v x y w.
    """
    side_data = cast("Mapping[str, Any]", frame.side_data)  # PyAV's stub calls this mapping a TypedDict
    matrix = side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32, 9)[:5].tolist()
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    if turned:
        picture = picture.swapaxes(0, 1)
    mirror_x, mirror_y = (c < 0, b < 0) if turned else (a < 0, d < 0)
    picture = picture[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]
    return np.ascontiguousarray(picture), turned
