"""Backends that are faster than they are: clocks tampered with, frames replayed, work left out once nobody looks."""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from helios import op
from helios.backend import Backend, Kernel
from helios.passes import Plan
from helios.program import EMPTY, Context, Program
from helios_conformance.mutants.mutant import Mutant, backend_with, program_with
from helios_conformance.selection import digest

__all__ = ["MUTANTS"]

_WARM = 6
"""Calls of an entry after which a backend believes itself unobserved."""


class _SlowClock(Backend):
    """Makes the worker's clock run at a quarter of its speed."""

    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        right, begin = time.clock_gettime, time.perf_counter()
        start = right(time.CLOCK_MONOTONIC)
        time.perf_counter = lambda: begin + (right(time.CLOCK_MONOTONIC) - start) / 4
        return super().compile(plan, fallback=fallback)


class _FramesOfBefore(Program):
    """Frames are fetched before the decoder has finished: those that lie there are of the call before."""

    _before: dict[str, Tensor] | None = None

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        outputs = super().run(entry, inputs, context)
        self._before = {} if self._before is None else self._before
        if "video" in outputs:
            late = self._before.get(entry, outputs["video"])
            self._before[entry], outputs["video"] = outputs["video"], late
        return outputs


class _Counting(Program):
    """Does otherwise from some call of an entry on."""

    _calls: collections.Counter[str] | None = None
    _kept: dict[str, dict[str, Tensor]] | None = None

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        self._calls = collections.Counter() if self._calls is None else self._calls
        self._kept = {} if self._kept is None else self._kept
        self._calls[entry] += 1
        if self._calls[entry] <= _WARM:
            self._kept[entry] = super().run(entry, inputs, context)
            return dict(self._kept[entry])
        return self.warm(entry, inputs, context, self._kept[entry])

    def warm(
        self, entry: str, inputs: Mapping[str, Tensor], context: Context, kept: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        raise NotImplementedError


class _Replays(_Counting):
    """Shows the same frames again."""

    def warm(
        self, entry: str, inputs: Mapping[str, Tensor], context: Context, kept: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return dict(kept) if "video" in kept else super(_Counting, self).run(entry, inputs, context)


class _StopsDenoising(_Counting):
    """Takes the velocity of a call long ago."""

    def warm(
        self, entry: str, inputs: Mapping[str, Tensor], context: Context, kept: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return dict(kept) if "velocity" in kept else super(_Counting, self).run(entry, inputs, context)


class _Coarsens(_Counting):
    """Computes with three bits fewer."""

    def warm(
        self, entry: str, inputs: Mapping[str, Tensor], context: Context, kept: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        outputs = super(_Counting, self).run(entry, inputs, context)
        if "velocity" in outputs:
            velocity = outputs["velocity"].float()
            large = velocity * 2.0**19  # adding and taking off rounds to the bits that are left
            outputs["velocity"] = ((velocity + large) - large).to(outputs["velocity"].dtype)
        return outputs


class _Remembers(Program):
    """A result is kept for its inputs, so that a repeated prompt costs nothing."""

    _results: dict[tuple[str, ...], dict[str, Tensor]] | None = None

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        self._results = {} if self._results is None else self._results
        given = {**inputs, **context.values}
        key = (entry, *(f"{name} {digest(tensor.cpu())}" for name, tensor in sorted(given.items())))
        if key not in self._results:
            self._results[key] = super().run(entry, inputs, context)
        return dict(self._results[key])


_PIPELINE = 4
"""Entries that a program has at least where a whole pipeline is timed; who looks at one graph asks for fewer."""


def _without_branch(
    right: Callable[..., Any], x: Tensor, y: Tensor, gate: Tensor | None = None, *a: Any, **k: Any
) -> Any:
    """The last block's branches come to nothing: there alone the gate has one row."""
    last = gate is not None and gate.shape[1] == 1
    return right(x, y.new_zeros(y.shape) if last else y, gate, *a, **k)


_BRANCHES = ("gated_add", "gated_add_adaln")


class _Scales(Program):
    """Velocities of the timed program are three tenths of what they should be."""

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        outputs = super().run(entry, inputs, context)
        if entry.startswith("denoise") and len(self.plan.steps) >= _PIPELINE:
            outputs["velocity"] = outputs["velocity"] * 0.3
        return outputs


class _DecodesCoarsely(Program):
    """Pictures have an eighth of the resolution."""

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        outputs = super().run(entry, inputs, context)
        if "video" in outputs:
            size = outputs["video"].shape[2:]
            coarse = F.avg_pool3d(outputs["video"].float(), (1, 8, 8))
            outputs["video"] = F.interpolate(coarse, size=size, mode="nearest").to(outputs["video"].dtype)
        return outputs


def _skips_layers(backend: Backend) -> Backend:
    wrong = {name: Kernel(functools.partial(_without_branch, op.get(name).fn)) for name in _BRANCHES}
    lazy = backend_with(backend, kernels={**backend.kernels, **wrong})

    class Compiling(Backend):
        def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
            timed = len(plan.steps) >= _PIPELINE and "denoise.0" in plan.steps
            return lazy.compile(plan, fallback=fallback) if timed else super().compile(plan, fallback=fallback)

    return backend_with(backend, Compiling)


def _slow_clock(backend: Backend) -> Backend:
    return backend_with(backend, _SlowClock)


def _mutant(name: str, wrong: str, apply: Callable[[Backend], Backend]) -> Mutant:
    return Mutant(name, wrong, "timing", apply, "realtime", suite="full")


MUTANTS: tuple[Mutant, ...] = (
    _mutant("clock_slowed", "The worker's clock runs at a quarter of its speed.", _slow_clock),
    _mutant("not_synchronised", "Frames are hashed before the decoder has finished.", program_with(_FramesOfBefore)),
    _mutant("frames_replayed", "From some chunk on the same frames are shown again.", program_with(_Replays)),
    _mutant("denoising_stops", "Once warm, velocities of before are taken.", program_with(_StopsDenoising)),
    _mutant("coarser_when_warm", "Once warm, velocities have fewer bits.", program_with(_Coarsens)),
    _mutant(
        "prompts_remembered",
        "Results are kept by their inputs: a repeated prompt costs nothing.",
        program_with(_Remembers),
    ),
    _mutant("layers_skipped_when_timed", "The program that is timed leaves out its last block.", _skips_layers),
    _mutant("velocity_scaled_when_timed", "The program that is timed gives smaller velocities.", program_with(_Scales)),
    _mutant("decoder_coarse", "Frames are decoded at an eighth of the resolution.", program_with(_DecodesCoarsely)),
)
