"""Choosing by measurement among several right ways to compute the same: once a shape, recorded, replayed.

Ways differ in their last bits, so what was chosen is part of a run's plan: ``Choices.record`` is JSON, and ``replay``
takes it back. Nothing is measured where there is no device, or while a CUDA graph is captured: then the first way that
is there runs, and nothing is recorded.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from helios.errors import BackendError

__all__ = ["CHOICES", "Choices", "Clock", "Variant", "device_clock"]

Clock = Callable[[Callable[[], object]], float]
"""Seconds that one call takes on the device."""


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute.

    Args:
        name: in records.
        run: computes.
        there: takes what ``run`` takes and says why it cannot run here on that; ``""`` where it can. Looks at shapes,
            dtypes and installed libraries, never at values.
    """

    name: str
    run: Callable[..., Any]
    there: Callable[..., str] = lambda *_, **__: ""


class Choices:
    """What was chosen so far, by key. Each entry of ``record`` has the name of the ``variant``, the ``seconds`` of all
    that were measured, and for each other the reason ``why_not``."""

    def __init__(self) -> None:
        self.record: dict[str, dict[str, Any]] = {}

    def replay(self, record: Mapping[str, Mapping[str, Any]]) -> None:
        """Take what was chosen before; of other keys nothing is forgotten."""
        self.record |= {key: dict(entry) for key, entry in record.items()}

    def run(self, key: str, variants: Sequence[Variant], *args: Any, **attrs: Any) -> Any:
        """Compute with the chosen way; choose first where nobody did.

        Args:
            key: all that may decide: op, shapes, dtype.
            variants: the first serves where nothing can be measured, so it must be there always.
            args, attrs: for ``Variant.run`` and ``Variant.there``; the first tensor among the args says which device.
        """
        by_name = {variant.name: variant for variant in variants}
        name = self.chosen(key) or self._decide(key, variants, args, attrs)
        if name not in by_name or (why := by_name[name].there(*args, **attrs)):
            raise BackendError(
                f"the plan has {name!r} for {key}: " + (why if name in by_name else f"known are {', '.join(by_name)}"),
                fix="install what the plan was made with, or start a new run",
            )
        return by_name[name].run(*args, **attrs)

    def chosen(self, key: str) -> str:
        """The name of the variant for this key, or ``""``."""
        entry = self.record.get(key)
        return str(entry["variant"]) if entry else ""

    def choose(
        self, key: str, variants: Sequence[Variant], make_inputs: Callable[[], tuple[Any, ...]], clock: Clock
    ) -> str:
        """Measure all variants that are there, record, and give the name of the fastest.

        Args:
            make_inputs: operands like those to come, made once and shared by all variants.
            clock: see ``Clock``.

        Raises:
            BackendError: none of them could run.
        """
        inputs = make_inputs()
        seconds: dict[str, float] = {}
        why_not: dict[str, str] = {}
        for variant in variants:
            if why := variant.there(*inputs):
                why_not[variant.name] = why
                continue
            try:
                seconds[variant.name] = clock(lambda run=variant.run: run(*inputs))  # type: ignore[misc]
            except RuntimeError as error:  # out of memory, or a library that refuses the shape
                why_not[variant.name] = str(error).strip().splitlines()[0][:200]
        if not seconds:
            reasons = "; ".join(f"{name}: {why}" for name, why in why_not.items())
            raise BackendError(f"no way to compute {key} runs here: {reasons}")
        best = min(seconds, key=lambda name: seconds[name])
        self.record[key] = {"variant": best, "seconds": seconds, "why_not": why_not}
        return best

    def _decide(self, key: str, variants: Sequence[Variant], args: tuple[Any, ...], attrs: Mapping[str, Any]) -> str:
        bound = [
            Variant(v.name, functools.partial(v.run, **attrs), functools.partial(v.there, **attrs)) for v in variants
        ]
        possible = [v.name for v in bound if not v.there(*args)]
        device = next(x.device for x in args if isinstance(x, torch.Tensor))
        if len(possible) == 1 or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return possible[0]
        return self.choose(key, bound, lambda: args, device_clock)


def device_clock(call: Callable[[], object], *, repeats: int = 5, budget: float = 0.5) -> float:
    """The median of a few calls between CUDA events on the current stream, after one to warm up.

    Args:
        repeats: at most.
        budget: seconds after which no further call starts.
    """
    call()
    torch.cuda.current_stream().synchronize()
    taken: list[float] = []
    while len(taken) < repeats and math.fsum(taken) < budget:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(taken)


CHOICES = Choices()
"""Of this process: a plan records and replays them."""
