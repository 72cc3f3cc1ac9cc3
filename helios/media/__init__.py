"""Pictures and videos in and out.

Frames are ``uint8 [frames, height, width, 3]``, red first, as long as they are pictures; :func:`to_model` and
:func:`to_frames` are the only two places where they turn into the network's ``[batch, 3, frames, height, width]`` in
[-1, 1] and back. Files are read with Pillow and PyAV, both loaded only when a file is touched.

A video is written as one finished mp4 file per chunk (:class:`SegmentWriter`) and put together by :func:`join`
without encoding anything again, so that whatever stops a run, what was finished stays as it is and plays.
"""

from __future__ import annotations

from helios.media.frames import Fit, as_frames, to_frames, to_model
from helios.media.mark import contact_sheet, mark_random
from helios.media.reading import read_image, read_metadata, read_video
from helios.media.storage import need_space
from helios.media.writing import SegmentWriter, check_output, finished_segments, join

__all__ = [
    "Fit",
    "SegmentWriter",
    "as_frames",
    "check_output",
    "contact_sheet",
    "finished_segments",
    "join",
    "mark_random",
    "need_space",
    "read_image",
    "read_metadata",
    "read_video",
    "to_frames",
    "to_model",
]
