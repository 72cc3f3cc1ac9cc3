"""Choosing by measurement among several ways to compute the same: once a form, recorded, replayed.

Ways differ in their last bits, so what was chosen is part of a run's plan: ``Choices.record`` is JSON values, and
``replay`` takes them back. Nothing is measured inside a program: ``choose`` is called where the forms of a plan are
known, and a form that nobody chose for takes the first way, and is recorded with it.

A way may also be wrong: libraries have had shapes for which they gave other numbers. So each result is compared with
that of the first way, which must be one that is ours to vouch for, before its time counts.
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

__all__ = ["RESUME", "Choices", "Clock", "Variant", "device_clock", "elapsed", "fastest", "reason"]

Clock = Callable[[Callable[[], object]], float]
"""Seconds that one call takes on the device."""
RESUME = "install what the plan was made with and continue on the same kind of device, or start a new run"
DRAW = 1.02
"""Of two times within this factor the earlier in the list wins, so that noise does not decide."""


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute.

    Args:
        name: in records.
        run: computes.
        there: takes what ``run`` takes and says why it cannot run here on that; ``""`` where it can. Looks at shapes,
            dtypes and installed libraries, never at values.
        version: of what it stands on; a plan made with another one is refused.
    """

    name: str
    run: Callable[..., Any]
    there: Callable[..., str] = lambda *_, **__: ""
    version: Callable[[], str] = lambda: ""


class Choices:
    """What was chosen so far among the same variants for many forms. Not for two threads at once.

    Args:
        variants: the first serves where nobody chose, so it must be there always, and right.

    Attributes:
        record: by form: ``variant`` and its ``version``, ``device``, ``seconds`` of all that were measured, and
            ``why_not`` for each other.
    """

    def __init__(self, variants: Sequence[Variant]) -> None:
        self.variants = {variant.name: variant for variant in variants}
        self.first = variants[0].name
        self.record: dict[str, dict[str, Any]] = {}

    def replay(self, record: Mapping[str, Mapping[str, Any]], device: str) -> None:
        """Take what was chosen before; of other forms nothing is forgotten.

        Args:
            record: as this object had it.
            device: as ``choose`` would be told now.

        Raises:
            BackendError: a variant of the record is not there in that version, or the device is another one.
        """
        for key, entry in record.items():
            name = str(entry["variant"])
            if name not in self.variants:
                raise BackendError(f"the plan has {name!r} for {key}; known are {', '.join(self.variants)}", RESUME)
            version = self.variants[name].version()
            if entry["version"] != version:
                raise BackendError(f"the plan has {name} {entry['version']} for {key}; here it is {version}", RESUME)
            if entry["device"] not in ("", device):  # none was needed where nothing was measured
                raise BackendError(f"the plan chose for {key} on {entry['device']}; this is {device}", RESUME)
        self.record |= {key: dict(entry) for key, entry in record.items()}

    def run(self, key: str, *args: Any, **attrs: Any) -> Any:
        """Compute by what was chosen for the form ``key``; never measures.

        Raises:
            BackendError: that cannot run here.
        """
        entry = self.record.get(key)
        if entry is None:
            entry = self.record[key] = self._entry(self.first, "", {}, {})
        variant = self.variants[entry["variant"]]
        if why := variant.there(*args, **attrs):
            raise BackendError(f"the plan has {variant.name} for {key}: {why}", RESUME)
        return variant.run(*args, **attrs)

    def choose(
        self,
        key: str,
        make_inputs: Callable[[], tuple[Any, ...]],
        clock: Clock,
        alike: Callable[[Any, Any], str],
        device: str = "",
    ) -> str:
        """Measure all variants that are there, record, and give the name of the fastest that is right; the first where
        even that cannot be measured.

        Args:
            key: all that may decide: shapes, dtype, attributes.
            make_inputs: operands like those to come, made once and shared by all variants.
            clock: see ``Clock``.
            alike: takes a result and that of the first variant; says how they differ too much, or ``""``.
            device: as plans name it.
        """
        inputs = make_inputs()
        seconds: dict[str, float] = {}
        why_not: dict[str, str] = {}
        wanted: Any = None
        for name, variant in self.variants.items():
            why = variant.there(*inputs)
            try:
                if not why and name == self.first:
                    wanted = variant.run(*inputs)
                elif not why:
                    why = alike(variant.run(*inputs), wanted)
                if not why:
                    seconds[name] = clock(functools.partial(variant.run, *inputs))
            except RuntimeError as error:  # out of memory, or a library that refuses the shape
                why = reason(error)
            if why:
                why_not[name] = why
            if why and name == self.first:  # a measurement takes more memory than one call: nothing to compare with
                break
        best = fastest(seconds) if seconds else self.first
        self.record[key] = self._entry(best, device, seconds, why_not)
        return best

    def _entry(
        self, name: str, device: str, seconds: Mapping[str, float], why_not: Mapping[str, str]
    ) -> dict[str, Any]:
        version = self.variants[name].version()
        return {
            "variant": name,
            "version": version,
            "device": device,
            "seconds": dict(seconds),
            "why_not": dict(why_not),
        }


def fastest(times: Mapping[str, float]) -> str:
    """The first whose time is that of the quickest, or a draw with it."""
    bar = DRAW * min(times.values())
    return next(name for name, taken in times.items() if taken <= bar)


def reason(error: Exception) -> str:
    """What a record says of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def elapsed(call: Callable[[], object]) -> float:
    """Seconds of one call, between two events on the current stream."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def device_clock(call: Callable[[], object], *, repeats: int = 5, budget: float = 0.2) -> float:
    """The median of a few calls between CUDA events on the current stream, after one to warm up.

    Args:
        repeats: at most.
        budget: seconds after which no further call starts.
    """
    call()
    torch.cuda.current_stream().synchronize()
    taken: list[float] = []
    while len(taken) < repeats and math.fsum(taken) < budget:
        taken.append(elapsed(call))
    return statistics.median(taken)
