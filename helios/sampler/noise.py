"""Where every random number of a run comes from.

``Noise`` names each draw of a pipeline once, with its shape. ``CounterNoise`` answers from a counter-based generator
keyed by what the draw is for, so that no draw depends on the order of calls, on the batch, or on how a run is cut into
sessions. ``DiffusersNoise`` answers from one ``torch.Generator`` in the order of the published pipelines; there the
order of calls is everything.
"""

from __future__ import annotations

import enum
import math
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from helios.errors import InputError, StateError
from helios.sampler.normal import inverse_normal, unit_open

__all__ = ["CounterNoise", "DiffusersNoise", "Noise", "Purpose"]

Shape = tuple[int, ...]
Range = tuple[float, float]
F32 = torch.float32


class Purpose(enum.IntEnum):
    """What a draw is for: half of a counter-based key. Numbers are part of what a seed means; never reuse one."""

    LATENTS = 0
    BLOCK = 1
    IMAGE_SAMPLE = 2
    FAKE_IMAGE_SAMPLE = 3
    VIDEO_FIRST_SAMPLE = 4
    VIDEO_SAMPLE = 5
    IMAGE_SIGMA = 6
    IMAGE_NOISE = 7
    FAKE_IMAGE_SIGMA = 8
    FAKE_IMAGE_NOISE = 9
    VIDEO_SIGMAS = 10
    VIDEO_NOISE = 11


class Noise(Protocol):
    """The draws of a pipeline, in the order in which the published pipelines make them.

    Shapes start with the batch b. Results are CPU tensors, float32 unless said otherwise. Ranges are (low, high).

    =====================================  ====================================================================
    image to video                         ``image_sample, fake_image_sample, image_sigma, image_noise,
                                           fake_image_sigma, fake_image_noise``
    video to video                         ``video_first_sample, video_sample`` of each section, ``image_sigma,
                                           image_noise``, then of each section ``video_sigmas, video_noise``
    each chunk                             ``latents``, then ``block`` on entering each further pyramid stage
    =====================================  ====================================================================

    A section is 33 frames of a given video, counted from 0.
    """

    def latents(self, chunk: int, shape: Shape) -> Tensor:
        """Normals ``[b, c, t, h, w]`` at full resolution, where the chunk starts."""
        ...

    def block(self, chunk: int, stage: int, shape: Shape) -> Tensor:
        """Normals ``[b, c, t, h/2, w/2, 4]`` for ``renoise_upsample`` into that stage (1, 2 …) of size h × w."""
        ...

    def image_sample(self, shape: Shape, dtype: torch.dtype = F32) -> Tensor:
        """Normals ``[b, c, 1, h, w]`` for the posterior of the encoded image; dtype is the encoder's."""
        ...

    def fake_image_sample(self, shape: Shape, dtype: torch.dtype = F32) -> Tensor:
        """Normals ``[b, c, t, h, w]`` for the posterior of the image repeated as a video."""
        ...

    def video_first_sample(self, shape: Shape, dtype: torch.dtype = F32) -> Tensor:
        """Normals ``[b, c, 1, h, w]`` for the posterior of the first frame of a given video."""
        ...

    def video_sample(self, section: int, shape: Shape, dtype: torch.dtype = F32) -> Tensor:
        """Normals ``[b, c, t, h, w]`` for the posterior of one section of a given video."""
        ...

    def image_sigma(self, batch: int, between: Range) -> Tensor:
        """Noise level of the anchor frame, uniform in the range: ``[b, 1, 1, 1, 1]``."""
        ...

    def image_noise(self, shape: Shape) -> Tensor:
        """Normals that are mixed into the anchor frame: ``[b, c, 1, h, w]``."""
        ...

    def fake_image_sigma(self, batch: int, between: Range) -> Tensor:
        """Noise level of the newest history frame made from an image: ``[b, 1, 1, 1, 1]``."""
        ...

    def fake_image_noise(self, shape: Shape) -> Tensor:
        """Normals that are mixed into that frame: ``[b, c, 1, h, w]``."""
        ...

    def video_sigmas(self, section: int, batch: int, frames: int, between: Range) -> Tensor:
        """Noise levels of the latent frames of a section: ``[b, 1, frames, 1, 1]``."""
        ...

    def video_noise(self, section: int, shape: Shape) -> Tensor:
        """Normals that are mixed into a section of a given video: ``[b, c, t, h, w]``."""
        ...

    def state(self) -> Tensor:
        """What must be saved with a run so that it continues to the same bits: uint8 ``[n]``."""
        ...

    def restore(self, state: Tensor) -> None:
        """Continue from a saved ``state``. Raises StateError where it is of another kind."""
        ...


class CounterNoise:
    """Draws keyed by (seed, purpose, chunk, stage or section, video): the same bits on every host, in any order.

    The generator is Philox 4×64 with ten rounds (Salmon et al. 2011), integer arithmetic only; normals come from
    ``helios.sampler.normal``. Video j of a batch is drawn by itself as video ``first_video + j``: it does not depend on
    how many others are made beside it.

    Args:
        seed: 0 … 2⁶⁴ − 1.
        first_video: number of the first video of the batch.

    Raises:
        InputError: the seed is out of range.
    """

    def __init__(self, seed: int, first_video: int = 0) -> None:
        if not 0 <= seed < 2**64:
            raise InputError(f"seed {seed} is out of range", f"use a whole number from 0 to {2**64 - 1}")
        self.seed = seed
        self.first_video = first_video

    def latents(self, chunk: int, shape: Shape) -> Tensor:
        return self._normal(Purpose.LATENTS, shape, chunk)

    def block(self, chunk: int, stage: int, shape: Shape) -> Tensor:
        return self._normal(Purpose.BLOCK, shape, chunk, stage)

    def image_sample(self, shape: Shape, dtype: torch.dtype = F32) -> Tensor:
        return self._normal(Purpose.IMAGE_SAMPLE, shape).to(dtype)

    def fake_image_sample(self, shape: Shape, dtype: torch.dtype = F32) -> Tensor:
        return self._normal(Purpose.FAKE_IMAGE_SAMPLE, shape).to(dtype)

    def video_first_sample(self, shape: Shape, dtype: torch.dtype = F32) -> Tensor:
        return self._normal(Purpose.VIDEO_FIRST_SAMPLE, shape).to(dtype)

    def video_sample(self, section: int, shape: Shape, dtype: torch.dtype = F32) -> Tensor:
        return self._normal(Purpose.VIDEO_SAMPLE, shape, 0, section).to(dtype)

    def image_sigma(self, batch: int, between: Range) -> Tensor:
        return self._uniform(Purpose.IMAGE_SIGMA, batch, 1, between)

    def image_noise(self, shape: Shape) -> Tensor:
        return self._normal(Purpose.IMAGE_NOISE, shape)

    def fake_image_sigma(self, batch: int, between: Range) -> Tensor:
        return self._uniform(Purpose.FAKE_IMAGE_SIGMA, batch, 1, between)

    def fake_image_noise(self, shape: Shape) -> Tensor:
        return self._normal(Purpose.FAKE_IMAGE_NOISE, shape)

    def video_sigmas(self, section: int, batch: int, frames: int, between: Range) -> Tensor:
        return self._uniform(Purpose.VIDEO_SIGMAS, batch, frames, between, section)

    def video_noise(self, section: int, shape: Shape) -> Tensor:
        return self._normal(Purpose.VIDEO_NOISE, shape, 0, section)

    def state(self) -> Tensor:
        """Nothing: each draw says by itself which one it is."""
        return torch.empty(0, dtype=torch.uint8)

    def restore(self, state: Tensor) -> None:
        if state.numel():
            raise StateError(
                "the saved random state belongs to rng='diffusers'", "resume with the rng of the saved run"
            )

    def _units(self, purpose: Purpose, video: int, count: int, chunk: int, part: int) -> npt.NDArray[np.float64]:
        # The lowest word of the counter runs; the others and the key say which stream it is.
        stream = np.random.Philox(
            key=np.array([self.seed, int(purpose)], np.uint64),
            counter=np.array([0, self.first_video + video, part, chunk], np.uint64),
        )
        return unit_open(stream.random_raw(count))

    def _normal(self, purpose: Purpose, shape: Shape, chunk: int = 0, part: int = 0) -> Tensor:
        count = math.prod(shape[1:])
        out = np.empty((shape[0], count), np.float32)
        for video in range(shape[0]):
            out[video] = inverse_normal(self._units(purpose, video, count, chunk, part))
        return torch.from_numpy(out).reshape(shape)

    def _uniform(self, purpose: Purpose, batch: int, frames: int, between: Range, part: int = 0) -> Tensor:
        low, high = between
        units = np.stack([self._units(purpose, video, frames, 0, part) for video in range(batch)])
        return torch.from_numpy((low + units * (high - low)).astype(np.float32)).reshape(batch, 1, frames, 1, 1)


class DiffusersNoise:
    """Draws in the order, shapes and dtypes of the diffusers pipelines, from one CPU generator.

    Call the methods in the order that ``Noise`` lists. One noise level serves the whole batch, as published.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def latents(self, chunk: int, shape: Shape) -> Tensor:
        return self._normal(shape)

    def block(self, chunk: int, stage: int, shape: Shape) -> Tensor:
        # One row of four for each patch, in the order b, c, t, row, column: torch's stream depends on the number of
        # elements, not on their shape.
        return self._normal(shape)

    def image_sample(self, shape: Shape, dtype: torch.dtype = F32) -> Tensor:
        return self._normal(shape, dtype)

    def fake_image_sample(self, shape: Shape, dtype: torch.dtype = F32) -> Tensor:
        return self._normal(shape, dtype)

    def video_first_sample(self, shape: Shape, dtype: torch.dtype = F32) -> Tensor:
        return self._normal(shape, dtype)

    def video_sample(self, section: int, shape: Shape, dtype: torch.dtype = F32) -> Tensor:
        return self._normal(shape, dtype)

    def image_sigma(self, batch: int, between: Range) -> Tensor:
        return self._uniform(batch, 1, between)

    def image_noise(self, shape: Shape) -> Tensor:
        return self._normal(shape)

    def fake_image_sigma(self, batch: int, between: Range) -> Tensor:
        return self._uniform(batch, 1, between)

    def fake_image_noise(self, shape: Shape) -> Tensor:
        return self._normal(shape)

    def video_sigmas(self, section: int, batch: int, frames: int, between: Range) -> Tensor:
        return self._uniform(batch, frames, between)

    def video_noise(self, section: int, shape: Shape) -> Tensor:
        return self._normal(shape)

    def state(self) -> Tensor:
        return self.generator.get_state()

    def restore(self, state: Tensor) -> None:
        try:
            self.generator.set_state(state)
        except (RuntimeError, TypeError) as error:
            raise StateError(
                "the saved random state is not one of a torch generator", "resume with the rng of the saved run"
            ) from error

    def _normal(self, shape: Shape, dtype: torch.dtype = F32) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=dtype)

    def _uniform(self, batch: int, frames: int, between: Range) -> Tensor:
        low, high = between
        levels = torch.rand(frames, generator=self.generator) * (high - low) + low
        return levels.view(1, 1, frames, 1, 1).expand(batch, 1, frames, 1, 1)
