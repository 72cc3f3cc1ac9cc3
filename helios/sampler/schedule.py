"""Noise schedules: which timesteps and noise levels a run visits, as float64 tables on the host.

Two facts of the published samplers shape this file. Pyramid stages share one flow: stage i covers its own part of the
timesteps, but counts its noise level from about 1 to 0 again, local to the stage. And the dynamic shift depends on the
number of noisy tokens, which the published pipelines take *before* the latents are upsampled for the stage, while
training takes it after; ``shift_from`` chooses, and the published way is the default.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from helios.errors import InputError, unknown_name
from helios.sampler import dmd, unipc
from helios.sampler.shift import calculate_shift, dynamic_shift, static_shift

__all__ = ["Schedule", "SchedulerFields", "ShiftFrom", "Stage", "StageTable", "build_schedule", "pyramid_tokens"]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
ShiftFrom = Literal["before_upsampling", "after_upsampling"]
FIRST_SIGMA = 0.999  # noise level where every stage, and the one of Base, starts


class SchedulerFields(Protocol):
    """What a schedule reads of a scheduler's configuration; ``helios.model.config.SchedulerConfig`` has it."""

    @property
    def solver(self) -> str: ...
    @property
    def num_train_timesteps(self) -> int: ...
    @property
    def shift(self) -> float: ...
    @property
    def stages(self) -> int: ...
    @property
    def stage_range(self) -> Sequence[float]: ...
    @property
    def gamma(self) -> float: ...
    @property
    def solver_order(self) -> int: ...
    @property
    def use_dynamic_shifting(self) -> bool: ...
    @property
    def time_shift_type(self) -> str: ...
    @property
    def base_image_seq_len(self) -> int: ...
    @property
    def max_image_seq_len(self) -> int: ...
    @property
    def base_shift(self) -> float: ...
    @property
    def max_shift(self) -> float: ...


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StageTable:
    """The part of the flow that one pyramid stage covers, for all training timesteps.

    Attributes:
        plain_start, start, end: noise levels of the whole flow where the stage begins (before and after the correction
            for upsampling) and ends.
        timesteps: ``num_train_timesteps`` of them, falling.
        sigmas: noise levels local to the stage, 0.999 and falling, as many.
        renoise: ``(α, β)`` that turn the upsampled end of the stage before into the start of this one; None at first.
    """

    plain_start: float
    start: float
    end: float
    timesteps: F64
    sigmas: F64
    renoise: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """The steps of one pyramid stage (Base has one stage). All arrays are read-only.

    Attributes:
        timesteps: float64 ``[n]``.
        model_timesteps: what the model is given: ``timesteps`` itself for Base, truncated to int64 for a pyramid.
        sigmas: noise levels, local to the stage, and a final 0: float64 ``[n + 1]``.
        table: the solver's coefficients, one row a step: float64 ``[n, k]``.
        mu: the dynamic shift that was applied, or None.
        renoise: ``[α, β]`` for ``renoise_upsample`` on entering the stage, float64; None for the first one.
    """

    timesteps: F64
    model_timesteps: F64 | I64
    sigmas: F64
    table: F64
    mu: float | None
    renoise: F64 | None

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.timesteps)

    def coeffs(self, step: int) -> F64:
        """The coefficient vector of one step, for the solver's op."""
        row: F64 = self.table[step]
        return row


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """All steps of one chunk.

    Attributes:
        solver: ``dmd`` (op ``dmd_step``), ``unipc`` (``unipc_step``) or ``euler`` (``euler_step``).
        stages: one of Base, several of a pyramid.
        gamma: strength of the block noise between stages.
    """

    solver: str
    stages: tuple[Stage, ...]
    gamma: float

    def __len__(self) -> int:
        """Number of steps of all stages."""
        return sum(map(len, self.stages))


def pyramid_tokens(
    frames: int, height: int, width: int, stages: int, patch: tuple[int, int, int] = (1, 2, 2)
) -> list[int]:
    """Noisy tokens of each stage, from the smallest: for latents of that many frames, rows and columns at full size.

    >>> pyramid_tokens(9, 48, 80, 3)
    [540, 2160, 8640]
    """
    halvings = range(stages - 1, -1, -1)
    return [frames * (height >> k) * (width >> k) // math.prod(patch) for k in halvings]


def build_schedule(
    config: SchedulerFields,
    steps: Sequence[int],
    tokens: Sequence[int],
    *,
    amplify: bool = False,
    shift_from: ShiftFrom = "before_upsampling",
    sigmas: Sequence[float] | None = None,
) -> Schedule:
    """The schedule of one chunk.

    Args:
        config: the scheduler's configuration, as published with a checkpoint.
        steps: number of steps of each stage; one entry for Base.
        tokens: noisy tokens of each stage, see ``pyramid_tokens``; they matter where the configuration shifts
            dynamically.
        amplify: twice the steps, for the first chunk of a distilled model; other solvers ignore it, as published.
        shift_from: whether a stage's dynamic shift is computed from the tokens of the stage before
            (``before_upsampling``, as published for inference) or from its own (``after_upsampling``, as in training).
        sigmas: noise levels of Base instead of the default, falling, without the final 0; the dynamic shift applies to
            them, a static one does not.

    Raises:
        InputError: numbers of steps, stages and tokens that do not fit each other, or settings without meaning.
    """
    _check(config, steps, tokens, shift_from, sigmas)
    counts = [_count(config, n, amplify) for n in steps]
    tables = stage_tables(config)
    stages = []
    for i, n in enumerate(counts):
        seen = tokens[max(i - 1, 0)] if shift_from == "before_upsampling" else tokens[i]
        mu = _mu(config, seen) if config.use_dynamic_shifting else None
        single = config.stages == 1
        levels = _base_steps(config, n, sigmas, mu) if single else _stage_steps(config, tables[i], n, mu)
        stages.append(_stage(config, *levels, mu, tables[i].renoise))
    return Schedule(config.solver, tuple(stages), config.gamma)


def _check(
    config: SchedulerFields,
    steps: Sequence[int],
    tokens: Sequence[int],
    shift_from: str,
    sigmas: Sequence[float] | None,
) -> None:
    if config.solver not in ("dmd", "unipc", "euler"):
        raise InputError(unknown_name("solver", config.solver, ("dmd", "unipc", "euler")))
    if shift_from not in ("before_upsampling", "after_upsampling"):
        raise InputError(unknown_name("shift_from", shift_from, ("before_upsampling", "after_upsampling")))
    if len(steps) != config.stages or len(tokens) != config.stages:
        raise InputError(
            f"got {len(steps)} numbers of steps and {len(tokens)} of tokens for {config.stages} pyramid stage(s)",
            f"give {config.stages} number(s) of steps, for example {','.join(['2'] * config.stages)}",
        )
    if min(steps) < 1:
        raise InputError(f"each stage needs at least one step, got {list(steps)}")
    if sigmas is not None and (config.stages != 1 or len(sigmas) != steps[0]):
        raise InputError(f"{len(sigmas)} noise levels given for {list(steps)} steps; only Base takes them, one a step")
    if config.use_dynamic_shifting and config.shift != 1.0:
        raise InputError(f"shift {config.shift} and use_dynamic_shifting exclude each other", "set shift to 1.0")


def _mu(config: SchedulerFields, tokens: int) -> float:
    return calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )


def _count(config: SchedulerFields, steps: int, amplify: bool) -> int:
    """Points on the grid: the distilled sampler spreads one more than it uses, and leaves the cleanest out."""
    if config.solver != "dmd":
        return steps
    return (2 * steps if amplify else steps) + 1


def _base_steps(config: SchedulerFields, n: int, given: Sequence[float] | None, mu: float | None) -> tuple[F64, F64]:
    """Timesteps and noise levels of a flow in one stage."""
    if given is not None:
        levels = np.asarray(given, dtype=np.float64)
    else:
        levels = static_shift(np.linspace(FIRST_SIGMA, 0.0, n + 1)[:-1], config.shift)
        levels = levels[:-1] if config.solver == "dmd" else levels
    sigmas = np.append(levels, 0.0)
    if mu is not None:
        sigmas = dynamic_shift(sigmas, mu, config.time_shift_type)
    return sigmas[:-1] * config.num_train_timesteps, sigmas


def _stage_steps(config: SchedulerFields, table: StageTable, n: int, mu: float | None) -> tuple[F64, F64]:
    """Timesteps and noise levels of a pyramid stage, evenly spread over its table, then shifted."""
    timesteps = np.linspace(table.timesteps[0], table.timesteps[-1], n)
    levels = np.linspace(table.sigmas[0], table.sigmas[-1], n)
    if config.solver == "dmd":
        timesteps, levels = timesteps[:-1], levels[:-1]
    sigmas = np.append(levels, 0.0)
    if mu is not None:
        sigmas = dynamic_shift(sigmas, mu, config.time_shift_type)
        low, high = table.timesteps.min(), table.timesteps.max()
        timesteps = low + sigmas[:-1] * (high - low)
    return timesteps, sigmas


def _stage(
    config: SchedulerFields, timesteps: F64, sigmas: F64, mu: float | None, renoise: tuple[float, float] | None
) -> Stage:
    if config.solver == "dmd":
        table = dmd.coefficients(timesteps, sigmas)
    elif config.solver == "unipc":
        table = unipc.coefficients(sigmas, config.solver_order)
    else:
        table = np.diff(sigmas)[:, None]
    fed: F64 | I64 = timesteps if config.stages == 1 else timesteps.astype(np.int64)
    entry = None if renoise is None else np.array(renoise)
    for array in (timesteps, fed, sigmas, table, entry):
        if array is not None:
            array.setflags(write=False)
    return Stage(timesteps, fed, sigmas, table, mu, entry)


def base_sigmas(config: SchedulerFields) -> F64:
    """Noise levels of all training timesteps, falling from just below 1, with the static shift applied."""
    n = config.num_train_timesteps
    rising = 1.0 - np.linspace(1, 1 / n, n + 1)
    return static_shift(rising, config.shift)[::-1][:-1].copy()


def stage_tables(config: SchedulerFields) -> list[StageTable]:
    """The tables of all stages: where each begins and ends in the flow, and its timesteps."""
    n = config.num_train_timesteps
    sigmas = base_sigmas(config)
    begins = [int(r * n) for r in config.stage_range]
    plain = [float(sigmas[b]) for b in begins[:-1]]
    ends = [float(sigmas[b]) if b < n else 0.0 for b in begins[1:]]
    corrections = [_renoise(1.0 - s, config.gamma) if i else None for i, s in enumerate(plain)]
    starts = [s if c is None else 1.0 - c[0] * (1.0 - s) for s, c in zip(plain, corrections, strict=True)]
    spans = _spans([s - e for s, e in zip(starts, ends, strict=True)])
    local = np.linspace(FIRST_SIGMA, 0, n + 1)[:-1]
    return [
        StageTable(plain[i], starts[i], ends[i], _timesteps(sigmas * n, *spans[i]), local, corrections[i])
        for i in range(config.stages)
    ]


def _renoise(signal: float, gamma: float) -> tuple[float, float]:
    """α and β for a stage whose uncorrected start has that much signal.

    α scales the upsampled latents and β the block noise, so that the sum has the covariance of a straight-line sample
    with α·signal of signal: independent pixels again.
    """
    noise = 1.0 - signal
    alpha = 1.0 / (math.sqrt(1.0 + 1.0 / gamma) * noise + signal)
    return alpha, alpha * noise / math.sqrt(gamma)


def _spans(distances: list[float]) -> list[tuple[float, float]]:
    """Each stage's share of the timesteps, as fractions: in proportion to how far the flow moves in it."""
    total = sum(distances)
    edges = [sum(distances[:i]) / total for i in range(len(distances))]
    return list(zip([0.0, *edges[1:]], [*edges[1:], math.nextafter(1.0, 0.0)], strict=True))


def _timesteps(timesteps: F64, first: float, last: float) -> F64:
    n = len(timesteps)
    high = min(float(timesteps[int(first * n)]), 999.0)
    low = float(timesteps[min(int(last * n), n - 1)])
    return np.linspace(high, low, n + 1)[:-1]
