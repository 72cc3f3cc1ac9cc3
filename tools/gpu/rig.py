"""What every measurement here shares: the device, its figures, random inputs, and the check of what comes out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from results import NotThereError, Record
from timing import Call, measure, rotations
from torch import Tensor

from helios.fit.devices import recognise

__all__ = ["BOUNDS", "Rig", "Trial", "error_of", "spread_of", "take"]

BOUNDS = {
    "float64": 1e-10,
    "float32": 1e-4,  # thousands of terms, in any order
    "tf32": 2e-3,
    "float16": 2e-3,
    "bfloat16": 1e-2,
    "float8_e4m3fn": 3e-2,  # against the product of the quantised values: what is left is the accumulation's
}
"""Largest ‖out − ref‖ / ‖ref‖ that is called right, by what multiplies."""

RATES = {"bfloat16": 1.0, "float16": 1.0, "float8_e4m3fn": 2.0, "tf32": 0.5}
"""Peak of a dtype over that of bfloat16."""


@dataclasses.dataclass(frozen=True)
class Rig:
    """One device as it is measured.

    Attributes:
        device: ``cuda`` or ``cpu``.
        tiny: shapes so small that only the plumbing is tested.
        name: what the driver calls it.
        cache: bytes of the last-level cache.
        seconds: to spend on the repeats of one measurement.
    """

    device: torch.device
    tiny: bool
    name: str = "cpu"
    cache: int = 0
    seconds: float = 0.25

    @classmethod
    def on(cls, device: str, tiny: bool) -> Rig:
        """The machine's own. Raises RuntimeError where torch finds no such device."""
        if device == "cpu":
            return cls(torch.device("cpu"), tiny, seconds=0.002 if tiny else 0.25)
        properties: Any = torch.cuda.get_device_properties(0)
        return cls(torch.device("cuda", 0), tiny, properties.name, properties.L2_cache_size, 0.05 if tiny else 0.25)

    @property
    def cuda(self) -> bool:
        """Whether it is an NVIDIA (or ROCm) device."""
        return self.device.type == "cuda"

    def need_cuda(self, what: str) -> None:
        """Raises NotThereError elsewhere."""
        if not self.cuda:
            raise NotThereError(f"{what} needs a GPU")

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        """Normal numbers. Zeros would run faster than real data: the chip draws less power on them."""
        return torch.randn(shape, device=self.device, dtype=dtype).mul_(scale)

    def sets(self, make: Callable[[], Sequence[Tensor]]) -> list[Sequence[Tensor]]:
        """Input sets enough that none is still in the cache when its turn comes again."""
        first = make()
        nbytes = sum(x.nbytes for x in first)
        return [first, *(make() for _ in range(rotations(nbytes, self.cache) - 1))]

    def share(self, tflops: float | None, gbps: float | None, rate: str) -> str:
        """How that compares with the data sheet, where the device is known."""
        known = recognise(self.name)
        if known is None:
            return ""
        if gbps is not None:
            return f"{gbps * 1e9 / known.bandwidth:.2f} of {known.bandwidth / 1e9:.0f} GB/s, data sheet"
        if tflops is None or rate not in RATES:
            return ""
        peak = RATES[rate] * known.peak / 1e12
        return f"{tflops / peak:.2f} of {peak:.0f} TFLOP/s, data sheet"


@dataclasses.dataclass
class Trial:
    """Calls that do the same work on different inputs, what that work is, and how to judge the first one's result.

    Attributes:
        calls: each returns what ``check`` takes.
        flops: of one call, counted from shapes.
        nbytes: that one call must move, counted from shapes; the rate is in bytes where there are no FLOPs.
        check: relative error of a result; None where there is nothing to compute.
        bound: of that error.
        rate: the name in ``RATES`` of what multiplies.
    """

    calls: Sequence[Call]
    flops: int = 0
    nbytes: int = 0
    check: Callable[[Any], float] | None = None
    bound: float = 0.0
    rate: str = "bfloat16"


def take(rig: Rig, trial: Trial) -> Record:
    """Check the first call's result, then time them all: the fields of a record."""
    error = None if trial.check is None else trial.check(trial.calls[0]())
    timing = measure(trial.calls, rig.device, rig.seconds)
    tflops = trial.flops / timing.median / 1e9 if trial.flops else None
    gbps = trial.nbytes / timing.median / 1e6 if trial.nbytes and not trial.flops else None
    record: Record = {**timing.record(), "flops": trial.flops, "bytes": trial.nbytes, "tflops": tflops, "gbps": gbps}
    if error is not None:
        # `not >` would let a NaN pass; JSON has no NaN either.
        record |= {"error": error if math.isfinite(error) else str(error), "correct": error <= trial.bound}
    return {**record, "share_of_peak_note": rig.share(tflops, gbps, trial.rate)}


def error_of(out: Tensor, ref: Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ in float64.

    >>> error_of(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    0.0
    """
    if out.shape != ref.shape:
        raise ValueError(f"result {list(out.shape)}, reference {list(ref.shape)}")
    wide = ref.double()
    return float((out.double() - wide).norm() / wide.norm())


def spread_of(length: int, count: int = 8) -> list[int]:
    """A few indices of ``length``, spread from the first to the last: a check of some rows.

    >>> spread_of(100, 3), spread_of(2, 8)
    ([0, 49, 99], [0, 1])
    """
    count = min(count, length)
    return [i * (length - 1) // max(count - 1, 1) for i in range(count)]
