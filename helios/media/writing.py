"""Videos to files: a finished mp4 per chunk, and the whole put together from them without encoding again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from helios.errors import HeliosError, InputError, StateError
from helios.media.frames import require_frames, require_size
from helios.media.reading import exact_conversion, read_metadata
from helios.media.storage import atomic

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer, OutputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

__all__ = ["SegmentWriter", "check_output", "finished_segments", "join"]

SEGMENT_NAME = "segment-{:05d}.mp4"
_SEGMENT = re.compile(r"segment-(\d{5,})\.mp4")

_X264 = {
    "crf": "15",
    "preset": "fast",
    # No B-frames: packets are then in the order of display, so a segment is cut at any frame by leaving packets out.
    "bf": "0",
    # x264 looks ahead in half-size pictures, and there reads memory that nobody has written: about one encode in 50
    # came out with other bytes. Everything that looks there is off; that makes files 1.5 to 2.1 times as large, at
    # 2 dB more (smooth moving frames of 96x64).
    "x264-params": "rc-lookahead=0:mbtree=0:scenecut=0:weightp=0",
}
_KEY_EVERY_SECONDS = 2
_BT709 = 1  # the code point of BT.709 primaries, transfer and matrix alike, in H.264 and in FFmpeg
_LIMITED_RANGE = 1


class SegmentWriter:
    """Writes each finished chunk of frames as its own mp4 in ``folder``, whole or not at all.

    H.264, yuv420p, BT.709, constant quality, one thread: the same frames give the same bytes.

    Args:
        folder: made when it is missing; segments are named by their chunk, ``segment-00007.mp4``.
        size: (height, width) in pixels, both even.
        fps: frames per second, a whole number or a fraction.
        metadata: written into each segment and, by default, into the joined video; ``title`` and ``comment`` are
            shown by players.

    Raises:
        InputError: an odd size, a rate that is not positive.
        HeliosError: this PyAV has no libx264; told before anything is computed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        size: tuple[int, int],
        fps: int | Fraction = 24,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.size = _even(size)
        self.fps = Fraction(fps)
        self.metadata = dict(metadata or {})
        if self.fps <= 0:
            raise InputError(f"{fps} frames per second", "give a positive frame rate, such as 24")
        _require_encoder()

    def write(self, chunk: int, frames: Tensor) -> Path:
        """Encode uint8 ``[f, h, w, 3]`` as the segment of that chunk and return its path; an older one is replaced.

        Raises:
            InputError: another shape, dtype or size; a negative chunk.
            StorageError: the disk is full or cannot be written; no other segment is touched.
        """
        require_frames(frames, 4)
        if tuple(frames.shape[1:3]) != self.size:
            came, wanted = tuple(frames.shape[1:3]), self.size
            raise InputError(f"frames of {came[1]}x{came[0]} for a video of {wanted[1]}x{wanted[0]}")
        if chunk < 0:
            raise InputError(f"chunk {chunk}: chunks are counted from 0")
        path = self.folder / SEGMENT_NAME.format(chunk)
        with atomic(path) as part, _output(part, self.metadata) as container:
            stream = _add_stream(container, self.size, self.fps)
            for index, picture in enumerate(frames.cpu().numpy()):
                container.mux(stream.encode(_video_frame(picture, index, self.fps)))
            container.mux(stream.encode(None))
        return path


def finished_segments(folder: str | os.PathLike[str]) -> list[Path]:
    """The segments of chunk 0, 1, 2 … in ``folder``, up to the first that is missing. Unfinished files do not count."""
    place = Path(folder)
    names = [entry.name for entry in place.iterdir()] if place.is_dir() else []
    numbers = {int(match[1]) for match in map(_SEGMENT.fullmatch, names) if match}
    count = next(k for k in range(len(numbers) + 1) if k not in numbers)
    return [place / SEGMENT_NAME.format(k) for k in range(count)]


def join(
    segments: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    frames: int | None = None,
    metadata: Mapping[str, object] | None = None,
) -> int:
    """Put segments together as one mp4 and return its number of frames. Packets are copied, nothing is encoded again.

    Args:
        segments: files of one :class:`SegmentWriter`, in order.
        out: an ``.mp4`` path; it appears whole, in place of an older one, or not at all.
        frames: keep only the first so many.
        metadata: replaces that of the first segment.

    Raises:
        InputError: no segments, more frames wanted than there are, another file type.
        StateError: a segment is missing, damaged, or from other settings than the first.
        StorageError: the disk is full or cannot be written.
    """
    paths = [Path(segment) for segment in segments]
    target = check_output(out)
    if not paths:
        raise InputError("no finished segment to join", "let at least one chunk finish")
    if frames is not None and frames < 1:
        raise InputError(f"{frames} frames: a video has at least one", "ask for a positive number of frames")
    sources = [_inspect(path) for path in paths]
    _same_settings(sources)
    total = sum(source.frames for source in sources)
    if frames is not None and frames > total:
        raise InputError(f"{frames} frames wanted, the segments hold {total}", "generate more chunks")
    kept = total if frames is None else frames
    tags = read_metadata(paths[0]) if metadata is None else metadata
    with atomic(target) as part, _output(part, tags) as container:
        _remux(sources, container, kept)
    return kept


def check_output(path: str | os.PathLike[str]) -> Path:
    """The path, if a video can be written under that name; made for a check before any computing starts.

    Raises:
        InputError: not an ``.mp4`` name, or a folder.
    """
    target = Path(path)
    if target.suffix.lower() != ".mp4":
        raise InputError(
            f"output {target}: only .mp4 can be written, not {target.suffix or 'a name without ending'}",
            f"name it {target.with_suffix('.mp4')}",
        )
    if target.is_dir():
        raise InputError(f"output {target} is a folder", f"name a file, such as {target / 'video.mp4'}")
    return target


@dataclass(frozen=True, slots=True)
class _Source:
    """What must be the same in all segments, and how many frames this one holds."""

    path: Path
    frames: int
    size: tuple[int, int]
    rate: Fraction
    header: bytes


def _require_encoder() -> None:
    import av

    if "libx264" not in av.codecs_available:
        raise HeliosError(
            f"PyAV {av.__version__} was built without libx264, so no mp4 can be written",
            "pip install --force-reinstall --only-binary av av",
        )


def _even(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    require_size(height, width, "stretch")
    if height % 2 or width % 2:
        near = f"{width + width % 2}x{height + height % 2}"
        raise InputError(f"{width}x{height}: H.264 in yuv420p has even sizes only", f"the next is {near}")
    return height, width


def _output(part: Path, metadata: Mapping[str, object]) -> OutputContainer:
    import av

    options = {"fflags": "+bitexact", "movflags": "+faststart"}
    container = av.open(str(part), "w", format="mp4", options=options)
    tags = {str(key): str(value) for key, value in metadata.items()}
    for shown in ("title", "comment"):
        if shown in tags:
            container.metadata[shown] = tags[shown].replace("\0", "").encode("utf-8", "replace").decode()
    # mp4 has a short list of tags of its own; all of ours travel together in one that it knows.
    container.metadata["description"] = json.dumps(tags, sort_keys=True)
    return container


def _add_stream(container: OutputContainer, size: tuple[int, int], fps: Fraction) -> VideoStream:
    stream = container.add_stream("libx264", rate=fps)
    stream.height, stream.width = size
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / fps
    context.thread_count = 1
    context.gop_size = max(1, round(fps * _KEY_EVERY_SECONDS))
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    context.color_range = _LIMITED_RANGE
    context.options = dict(_X264)
    return stream


def _video_frame(picture: np.ndarray, index: int, fps: Fraction) -> VideoFrame:
    import av

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(
        format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", interpolation=exact_conversion()
    )
    frame.pts, frame.time_base = index, 1 / fps
    return frame


def _inspect(path: Path) -> _Source:
    """Read a whole segment once, so that nothing is wrong with any before the first byte is written."""
    import av

    try:
        with av.open(str(path.absolute())) as container:
            stream = container.streams.video[0]
            packets = list(_packets(container, stream))
            steps = {packet.duration * stream.time_base for packet in packets if packet.duration and stream.time_base}
            header = bytes(stream.codec_context.extradata or b"")
            whole = len(steps) == 1 and len(packets) == stream.frames and not any(p.is_corrupt for p in packets)
            size = (stream.height, stream.width)
    except (av.FFmpegError, OSError, IndexError) as error:
        raise _broken(path, str(error)) from error
    if not whole:
        raise _broken(path, f"{len(packets)} frames of {stream.frames}")
    return _Source(path, len(packets), size, 1 / steps.pop(), header)


def _broken(path: Path, why: str) -> StateError:
    return StateError(f"segment {path} is missing or damaged: {why}", "write it again from the saved latents: --resume")


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """The packets of a stream without the empty one that tells a decoder to finish."""
    return (packet for packet in container.demux(stream) if packet.size)


def _same_settings(sources: Sequence[_Source]) -> None:
    first = sources[0]
    for source in sources[1:]:
        if (source.size, source.rate, source.header) != (first.size, first.rate, first.header):
            raise StateError(
                f"segment {source.path} ({_describe(source)}) is from other settings than {first.path} "
                f"({_describe(first)})",
                "write all of them with one version and one size",
            )


def _describe(source: _Source) -> str:
    return f"{source.size[1]}x{source.size[0]} at {source.rate} fps, encoder header {source.header[:8].hex()}"


def _remux(sources: Sequence[_Source], container: OutputContainer, frames: int) -> None:
    import av

    written, stream = 0, None
    for source in sources:
        with av.open(str(source.path.absolute())) as segment:
            origin = segment.streams.video[0]
            stream = stream or container.add_stream_from_template(origin)
            for packet in _packets(segment, origin):
                if written == frames:
                    return
                # One packet is one frame: counting leaves no rounding that could add up over the segments.
                packet.stream, packet.time_base = stream, 1 / source.rate
                packet.pts = packet.dts = written
                packet.duration = 1
                container.mux(packet)
                written += 1
