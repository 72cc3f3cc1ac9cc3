"""The checks of single parameters; each raises InputError with what came, what was wanted and what to do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from helios.errors import InputError, unknown_name
from helios.model.config import TransformerConfig, VaeConfig
from helios.pipeline.history import CHUNK_LATENTS
from helios.pipeline.prompts import require_text

T = TypeVar("T", bound=str)


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A whole number in a range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} is {value!r}, wanted a whole number", f"use {low} or more")
    if value < low or (high is not None and value > high):
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise InputError(f"{name} is {value}, wanted a whole number {limit}")
    return value


def at_least(name: str, value: Any, low: float) -> float:
    """A finite number, not below ``low``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < low:
        raise InputError(f"{name} is {value!r}, wanted a number of at least {low:g}")
    return float(value)


def above(name: str, value: Any, low: float) -> float:
    """A finite number above ``low``."""
    if at_least(name, value, low) == low:
        raise InputError(f"{name} is {value!r}, wanted a number above {low:g}")
    return float(value)


def one_of(name: str, value: Any, known: Sequence[T]) -> T:
    """One of the known words."""
    if value not in known:
        raise InputError(unknown_name(name, str(value), known))
    return known[list(known).index(value)]


def texts(prompt: Any) -> tuple[str, ...]:
    """One prompt or several, none of them empty."""
    found = (prompt,) if isinstance(prompt, str) else tuple(prompt) if isinstance(prompt, Sequence) else (prompt,)
    if not found:
        raise InputError("the list of prompts is empty", "give at least one prompt")
    for text in found:
        require_text(text)
    return found


def size_unit(stages: int, transformer: TransformerConfig, vae: VaeConfig) -> int:
    """What height and width must be multiples of: latents of the smallest pyramid stage must fill whole patches."""
    return vae.scale_factor_spatial * math.lcm(*transformer.patch_size[1:]) << (stages - 1)


def size(height: Any, width: Any, unit: int) -> None:
    """Height and width are positive multiples of ``unit`` pixels."""
    for name, value in (("height", height), ("width", width)):
        whole(name, value, 1)
        if value % unit:
            below, next_ = value // unit * unit, (value // unit + 1) * unit
            near = f"{below} or {next_}" if below else str(next_)
            raise InputError(f"{name} is {value}, wanted a multiple of {unit} for this model", f"use {name} {near}")


def steps(value: Any, stages: int) -> tuple[int, ...]:
    """Steps of each stage; one number serves all of them."""
    counts = (value,) * stages if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else (value,)
    if len(counts) != stages:
        example = ",".join(["2"] * stages)
        raise InputError(
            f"steps {','.join(map(str, counts))} are for {len(counts)} stage(s), this model has {stages}",
            f"give {stages} number(s), for example {example}",
        )
    return tuple(whole("steps", count, 1) for count in counts)


def sigmas(value: Any, counts: Sequence[int]) -> tuple[float, ...] | None:
    """Noise levels of Base, one a step, falling from below 1."""
    if value is None:
        return None
    levels = tuple(float(level) for level in value)
    if len(counts) != 1 or len(levels) != counts[0]:
        raise InputError(
            f"{len(levels)} sigmas for steps {','.join(map(str, counts))}: only Base takes them, one a step"
        )
    if not all(a > b for a, b in itertools.pairwise((1.0, *levels, 0.0))):
        raise InputError(f"sigmas {', '.join(f'{s:g}' for s in levels)} do not fall from below 1 to above 0")
    return levels


def embeds(name: str, value: Any, text_dim: int) -> Tensor:
    """Embeddings ``[b, tokens, text_dim]``, finite."""
    if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[-1] != text_dim or 0 in value.shape:
        came = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{name} is {came}, wanted a tensor [prompts, tokens, {text_dim}]")
    if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
        raise InputError(f"{name} holds values that are no finite floating-point numbers", "check how they were made")
    return value.detach().cpu()


def latents(value: Any, batch: int, vae: VaeConfig, height: int, width: int) -> Tensor | None:
    """Given noise for the first chunks."""
    if value is None:
        return None
    factor = vae.scale_factor_spatial
    wanted = f"[{batch}, {vae.z_dim}, {CHUNK_LATENTS}·n, {height // factor}, {width // factor}]"
    shape = list(value.shape) if isinstance(value, Tensor) else []
    fits = len(shape) == 5 and shape[2] > 0 and shape[2] % CHUNK_LATENTS == 0
    if not fits or [*shape[:2], *shape[3:]] != [batch, vae.z_dim, height // factor, width // factor]:
        raise InputError(f"latents are {shape or type(value).__name__}, wanted {wanted} for the first n chunks")
    return torch.as_tensor(value).detach().cpu()


def sigma_range(name: str, value: Any) -> tuple[float, float]:
    """A range of noise levels within 0 … 1."""
    if isinstance(value, Sequence) and len(value) == 2:
        low, high = (at_least(name, bound, 0.0) for bound in value)
        if low <= high <= 1.0:
            return low, high
    raise InputError(f"{name} is {value!r}, wanted two numbers 0 ≤ low ≤ high ≤ 1", "use 0.111 and 0.135, as published")
