"""Decoded frames against the oracle's decoding of the same latents, in whichever arithmetic the VAE decodes.

A VAE in float32 errs by far less than a level, so there the frames themselves are almost exact: one level, seldom.
In 16 bits most of what a right VAE errs is the rounding of its own results, and how much of that is seen depends on the
latents. So beside the oracle the same latents are decoded by *exact operations whose results are rounded* to the dtype,
once each (``golden.RoundingInterpreter``): no device and no arithmetic of a host is in that. What comes out errs as a
right VAE must, and the device's frames may err as much with the allowances of every other composition of ops.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from helios.backend import PRECISIONS, ReferenceBackend
from helios.graph import Graph
from helios.media import to_frames
from helios.model.config import VaeConfig
from helios.model.vae_precision import VAE_DTYPES, published_vae_precision, vae_name
from helios.model.vae_run import VaeRunner, decode_graphs
from helios.model.vae_split import Split
from helios.op import accumulator
from helios.pipeline.codec import Codec
from helios.program import WeightReader
from helios_conformance import budget
from helios_conformance.budget import Errors
from helios_conformance.case import Judged
from helios_conformance.golden import Call, RoundingInterpreter

__all__ = ["FLIPS", "Right", "allowed_in", "decode_rounded", "is_narrow", "judge", "levels", "right_frames"]

FLIPS = 1e-3
"""Part of the frames' values that may be one level off. Float32 decoding errs by about 4e-7 of a video that spans 2,
that is by 5e-5 of a level, and so often does a value cross the border between two levels (measured: 1e-5 to 5e-5).
TF32 errs a thousandfold."""

GROWN = 1.2
"""By how much the frames of a VAE in 16 bits may err more than those of rounded operations. Some sixty roundings make
up that error, one op of which (attention) may err 1.4 times as much as a rounding: together 1 %. Measured, over 24
draws each: 0.97 to 1.04 for right decoders; 1.26 to 1.40 where convolutions truncate, 1.44 where they sum in
bfloat16."""

MIDDLE = 127.5
"""The level of a video's zero."""


def allowed_in(precision: str) -> tuple[str, ...]:
    """What a pipeline of that precision may decode in: as published, or in its working dtype.

    >>> allowed_in("bf16"), allowed_in("fp32")
    (('fp32', 'bf16'), ('fp32',))
    """
    return tuple(dict.fromkeys((published_vae_precision(precision), vae_name(PRECISIONS[precision]))))


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether frames in that arithmetic are judged beside rounded operations."""
    return accumulator(dtype) != dtype


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Right:
    """What frames are held against, each of the shape of the frames or of the elements that are kept of them.

    Attributes:
        exact: levels of the oracle before they are whole, float64, 0 … 255.
        rounded: frames of exact operations whose results are rounded; None where the VAE is not narrow.
    """

    exact: Tensor
    rounded: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Right:
        """Both, changed alike."""
        return Right(change(self.exact), None if self.rounded is None else change(self.rounded))


def levels(video: Tensor) -> Tensor:
    """``to_frames`` without rounding to whole levels: float64 ``[b, 3, f, h, w]`` to ``[b, f, h, w, 3]``, 0 … 255."""
    return ((video * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).permute(0, 2, 3, 4, 1).contiguous()


def decode_rounded(
    config: VaeConfig, weights: WeightReader, latents: Tensor, split: Split, dtype: torch.dtype
) -> Tensor:
    """A video ``[b, 3, f, h, w]`` in ``dtype``: every operation in float64, its results rounded once."""
    batch, _, count, h, w = latents.shape
    size = {"height": h * config.scale_factor_spatial, "width": w * config.scale_factor_spatial}
    graphs = decode_graphs(config, batch=batch, latents=count, dtype=dtype, split=split, **size)
    interpreter = RoundingInterpreter(graphs, weights)

    def run(graph: Graph, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return interpreter.run(Call(graph.name, graph.name, inputs))

    return VaeRunner(config, run, dtype=dtype, split=split).decode(latents)


def right_frames(config: VaeConfig, weights: WeightReader, latents: Tensor, split: Split, vae: str) -> Right:
    """What frames of these latents are held against.

    Args:
        latents: as the device has them, ``[b, z, t, h, w]``.
        split: groups and tiles; groups matter only where operations are rounded, and there hardly.
        vae: what they were decoded in, by name.
    """
    codec = Codec(config, weights, ReferenceBackend(), torch.float64)
    exact = levels(codec.decode(latents.double(), split))
    dtype = VAE_DTYPES[vae]
    return Right(exact, to_frames(decode_rounded(config, weights, latents, split, dtype)) if is_narrow(dtype) else None)


def judge(kept: Tensor, chosen: Right, whole: Right, vae: str) -> Judged:
    """The numbers of frames.

    Args:
        kept: their uint8 values, 1-D.
        chosen: the same elements of what is right.
        whole: all of that, where the worst that rounding does is to be seen.
        vae: what they were decoded in, by name.
    """
    shown = chosen.exact.round()
    if chosen.rounded is None or whole.rounded is None:
        errors = budget.measure(kept, shown)
        one = float(1.0 / shown.square().mean().sqrt().clamp_min(1e-9))
        return Judged(errors, Errors(math.inf, one * 1.000001, math.inf, FLIPS + 4 / errors.count, errors.count), None)
    errors, known = (_centred(frames, chosen.exact) for frames in (kept, chosen.rounded))
    known = dataclasses.replace(known, worst=_centred(whole.rounded, whole.exact).worst)
    return Judged(errors, _bounds(known, chosen.exact - MIDDLE, VAE_DTYPES[vae]), known)


def _centred(frames: Tensor, exact: Tensor) -> Errors:
    """Errors of levels around the middle one, so that a video of half the contrast has a gain of −1/2."""
    errors = budget.measure(frames.double() - MIDDLE, exact - MIDDLE)
    return dataclasses.replace(errors, misrounded=float((frames.double() != exact.round()).double().mean()))


def _bounds(known: Errors, exact: Tensor, dtype: torch.dtype) -> Errors:
    """As of every composition of ops, but for the norm and for the part of values that are another level. What noise
    takes from a video's contrast is of the order of its square."""
    top = float(exact.abs().max()) / float(exact.square().mean().sqrt().clamp_min(1e-9))
    grown = dataclasses.replace(known, norm=known.norm * GROWN / 1.5, gain=known.gain * GROWN**2)  # the norm half more
    bounds = budget.bounds("fused", dtype, 4, known.count, grown, budget.directions(exact), top)
    off = GROWN * known.misrounded
    off += 3 * math.sqrt(off * max(1.0 - off, 0.0) / known.count) + 4 / known.count
    return dataclasses.replace(bounds, misrounded=min(off, 1.0))
