"""What a mutant is, and how a right backend is made wrong.

A backend is altered without being touched: its copy gets a class of its own, so that kernels, methods and the programs
that it compiles can be replaced one by one.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from helios import op
from helios.backend import Backend, Kernel
from helios.passes import Plan, expand
from helios.program import Program
from helios_conformance.case import Level, Suite
from helios_conformance.one_node import OneNode, types_of

__all__ = [
    "BF16",
    "BOTH",
    "FP32",
    "Mutant",
    "Wrong",
    "backend_with",
    "of_family",
    "program_with",
    "touched",
    "wide",
    "wrong_kernels",
]

BOTH: tuple[str, ...] = ("bf16", "fp32")
BF16: tuple[str, ...] = ("bf16",)
FP32: tuple[str, ...] = ("fp32",)

Wrong = Callable[..., Any]
"""A wrong kernel: the right one, the op's operands in order, and its attributes by keyword."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mutant:
    """A wrong backend, and what must find it.

    Attributes:
        name: unique.
        wrong: what is wrong, in one sentence.
        family: of mistakes.
        apply: the wrong backend of a right one, which stays as it is.
        level: at which, or below which, a case must fail.
        precisions: in each of which that must happen.
        suite: the smaller suite that must do it.
        repeats: runs of a kernel that it takes to see a mistake of chance, with a probability of 99.9%.
        ops: ops whose cases are the likeliest to fail; they are tried first.
    """

    name: str
    wrong: str
    family: str
    apply: Callable[[Backend], Backend]
    level: Level = "ops"
    precisions: tuple[str, ...] = BOTH
    suite: Suite = "quick"
    repeats: int = 1
    ops: frozenset[str] = frozenset()


def wrong_kernels(name: str, wrong: str, family: str, kernels: Mapping[str, Wrong], **told: Any) -> Mutant:
    """A mutant with some kernels wrong.

    Args:
        kernels: wrong ones by op name; ``right`` is the op's body, which runs wherever torch does.
        told: other attributes of the mutant.
    """
    return Mutant(name, wrong, family, lambda b: _with_kernels(b, kernels), ops=touched(kernels), **told)


def of_family(family: str) -> Callable[..., Mutant]:
    """The maker of a family's mutants, ``(name, wrong, kernel, *ops, **told)``: one wrong kernel for all these ops."""

    def make(name: str, wrong: str, kernel: Wrong, *ops: str, **told: Any) -> Mutant:
        return wrong_kernels(name, wrong, family, dict.fromkeys(ops, kernel), **told)

    return make


def _with_kernels(backend: Backend, kernels: Mapping[str, Wrong]) -> Backend:
    made = {name: Kernel(functools.partial(wrong, op.get(name).fn)) for name, wrong in kernels.items()}
    # A fused kernel of the right backend would hide what is wrong in an op that it contains.
    kept = tuple(name for name in backend.fusions if name not in kernels and not _parts(name) & set(kernels))
    fused = tuple(name for name in kernels if op.get(name).kind == "fused")
    return backend_with(backend, kernels={**backend.kernels, **made}, fusions=kept + fused)


def backend_with(backend: Backend, mixin: type[Backend] | None = None, **attributes: Any) -> Backend:
    """A copy of a backend with methods from ``mixin`` (its ``super()`` is the right one) and with other attributes."""
    twin = copy.copy(backend)
    for name in attributes:
        vars(twin).pop(name, None)
    bases = (type(backend),) if mixin is None else (mixin, type(backend))
    twin.__class__ = type(type(backend).__name__, bases, attributes)
    return twin


def program_with(mixin: type[Program]) -> Callable[[Backend], Backend]:
    """Backends whose programs have methods from ``mixin``."""

    class Compiling(Backend):
        def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
            program = super().compile(plan, fallback=fallback)
            program.__class__ = type(type(program).__name__, (mixin, type(program)), {})
            return program

    return lambda backend: backend_with(backend, Compiling)


@functools.cache
def _parts(fused: str) -> frozenset[str]:
    """The core ops that an op is written out as."""
    record = op.get(fused)
    if record.kind != "fused":
        return frozenset({fused})
    sample = record.samples()[0]
    with torch.device("meta"):
        types = types_of(sample.make(torch.float32))
    graph, _ = expand(OneNode.of(fused, types, sample.attrs).graph, lambda node: False)
    return frozenset(node.op for node in graph.nodes)


def touched(changed: Iterable[str]) -> frozenset[str]:
    """Ops that compute with any of these: themselves, and the fused ones that contain them."""
    changed = set(changed)
    return frozenset(name for name in op.names() if name in changed or _parts(name) & changed)


def wide(x: Any) -> Any:
    """An operand in float32 where it is narrower."""
    if isinstance(x, list | tuple):
        return [wide(t) for t in x]
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() and x.element_size() < 4 else x
