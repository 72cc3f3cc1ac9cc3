"""Videos from prompts, images and videos: requests, the chunk loop, and the state between two chunks."""

from __future__ import annotations

from helios.pipeline.pipeline import Pipeline, Result, load
from helios.pipeline.request import FPS, Request, Settings, frames_of_chunks, returned_frames
from helios.pipeline.run import Chunk, Progress
from helios.pipeline.state import RunState

__all__ = [
    "FPS",
    "Chunk",
    "Pipeline",
    "Progress",
    "Request",
    "Result",
    "RunState",
    "Settings",
    "frames_of_chunks",
    "load",
    "returned_frames",
]
