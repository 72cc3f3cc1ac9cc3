"""Frames that move, videos of exact pixels, and how near two pictures are: for the tests of ``helios.media``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from helios import media

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


def three_segments(folder: Path) -> tuple[media.SegmentWriter, list[Path]]:
    """A writer with three finished segments of 9, 1 and 5 frames."""
    writer = media.SegmentWriter(folder, size=(HEIGHT, WIDTH), metadata={"title": "T", "seed": 7})
    return writer, [writer.write(k, moving(n, shift=20 * k)) for k, n in enumerate((9, 1, 5))]
