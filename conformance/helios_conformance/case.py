"""What the suite runs and what it says: cases, observations, verdicts.

A *case* is data: an id that pastes back as a filter, and the parameters from which, with the root of the run, all else
follows. A *check* knows how to run cases of its kind on a device (``observe``) and how to judge what came back
(``judge``). The two meet only in an ``Observation``, which is what the bundle keeps: judging needs no device.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from helios_conformance.budget import Errors

if TYPE_CHECKING:
    from helios_conformance.draws import Root
    from helios_conformance.references import References
    from helios_conformance.session import Session

__all__ = [
    "LEVELS",
    "PRECISIONS",
    "SUITES",
    "Case",
    "Check",
    "Judged",
    "Kept",
    "Level",
    "Observation",
    "State",
    "Suite",
    "Verdict",
]

Level = Literal["ops", "blocks", "model", "pipeline", "realtime"]
LEVELS: tuple[Level, ...] = ("ops", "blocks", "model", "pipeline", "realtime")
"""Each needs the one before it."""

Suite = Literal["quick", "full"]
SUITES: tuple[Suite, ...] = ("quick", "full")

PRECISIONS = ("bf16", "fp16", "fp32", "fp8", "fp8-attention", "fp8-weights")
"""What can be certified: float64 is the oracle's own dtype, so nothing could judge it."""

State = Literal["pass", "fail", "unsupported", "not_run"]
"""``unsupported``: the backend said beforehand, with its reason, that it does not run this. ``not_run``: the suite did
not, with the reason. Neither is green where the case is required."""

_ID = re.compile(r"[a-z0-9_.]+\[[a-z0-9_.,+-]+\]")


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One thing that is judged.

    Attributes:
        id: ``name[precision,detail,…]``, unique in the suite.
        level: where it belongs.
        check: name of the check that runs and judges it.
        precision: one of ``PRECISIONS``.
        params: JSON values; with the root all that the check needs.
        suite: the smallest suite that runs it: ``full`` contains ``quick``.
        required: whether a certificate needs it to pass.
        timeout: seconds after which the worker is taken for hung (scaled by ``--timeout-factor``).
    """

    id: str
    level: Level
    check: str
    precision: str
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    suite: Suite = "quick"
    required: bool = True
    timeout: float = 120.0

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise ValueError(f"{self.id!r} is not a case id such as attention[bf16,stage2]")


def is_diagnostic(kind: str, level: str) -> bool:
    """Whether cases of a level decide nothing for a backend of this kind: an engine runs graphs whole, and what it
    makes of a single op tells where to look and no more."""
    return kind == "engine" and level == "ops"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What is kept of one output: the elements that are judged.

    Attributes:
        values: 1-D, host, in the dtype that the device gave; in the order of ``selection.selected``.
        shape, dtype: of the whole output; the dtype by name.
        digest: SHA-256 of the whole output's bytes, contiguous. It decides which elements are kept, so nobody knows
            before the output exists.
        finite: whether every element of the whole output is finite.
    """

    values: Tensor
    shape: tuple[int, ...]
    dtype: str
    digest: str
    finite: bool

    def misfit(self, shape: Sequence[int], dtype: torch.dtype) -> str:
        """What came and what was wanted, where the output is not of this shape and dtype; "" where it is."""
        wanted, kept = (str(d).removeprefix("torch.") for d in (dtype, self.values.dtype))
        if tuple(self.shape) == tuple(shape) and self.dtype == kept == wanted:
            return ""
        note = "" if self.dtype == kept else f" (kept as {kept})"
        return f"{self.dtype}{list(self.shape)}{note}, wanted {wanted}{list(shape)}"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """What came back from the device for one case.

    Attributes:
        outputs: by name.
        facts: JSON values that the check's ``judge`` reads: ``inputs_unchanged``, ``guards_intact`` …
            They are attested by the machine that ran the device; the outputs are judged anew by anyone.
        coverage: rows of op, native, fused, fallback, reason.
        unsupported: the backend's own reason, where it declared before running that it does not run this.
    """

    outputs: Mapping[str, Kept] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    coverage: Sequence[tuple[str, int, int, int, str]] = ()
    unsupported: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Judged:
    """The numbers of one output: measured, allowed, and what the reference in the working dtype does."""

    errors: Errors
    bounds: Errors
    reference: Errors | None


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one case. ``reason`` is one or more sentences, empty for ``pass``."""

    state: State
    reason: str = ""
    judged: Mapping[str, Judged] = dataclasses.field(default_factory=dict)


class Check(Protocol):
    """How cases of one kind are listed, run and judged. Stateless; one instance in ``checks.CHECKS``."""

    name: str

    def cases(self, precision: str) -> Iterator[Case]:
        """All cases of the full suite in this precision; those with ``suite='quick'`` make the quick one."""
        ...

    def observe(self, case: Case, session: Session) -> Observation:
        """Run it on the device. What the backend raises is caught by the caller and is a failure."""
        ...

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        """Judge without the device, on any host."""
        ...

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        """The errors of the reference in the working dtype on this host, by output; {} where nothing is numeric."""
        ...
