"""Backends that say other than what they do, as far as that can be seen."""

from __future__ import annotations

from helios import op
from helios.backend import Backend, Kernel
from helios.graph import Node
from helios.passes import Plan
from helios.program import Program
from helios_conformance.mutants.mutant import Mutant, backend_with

__all__ = ["MUTANTS"]


class _FallsBack(Backend):
    """Has no kernel for the norms, and lets the reference run in its place although that was not allowed."""

    def supports(self, node: Node) -> str | None:
        return "no kernel" if node.op in ("rms_norm", "layer_norm") else super().supports(node)

    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        return super().compile(plan, fallback="reference")


class _DeclinesOdd(Backend):
    """Declares not to support what it would fail: heads of another size than it was made for."""

    def supports(self, node: Node) -> str | None:
        if node.op == "attention" and node.values[0].shape[-1] % 8:
            return "head size must be a multiple of 8"
        return super().supports(node)


class _ClaimsAll(Backend):
    """Says that it runs everything, and raises when it comes to it."""

    def supports(self, node: Node) -> str | None:
        return None


def _claims_all(backend: Backend) -> Backend:
    kept = {name: kernel for name, kernel in backend.kernels.items() if name != "conv3d"}

    def missing(*operands: object, **attrs: object) -> object:
        raise NotImplementedError("conv3d")

    return backend_with(backend, _ClaimsAll, kernels=kept | {"conv3d": Kernel(missing)}, fusions=())


def _no_kernels(backend: Backend) -> Backend:
    return backend_with(backend, kernels={}, fusions=())


def _crashing(backend: Backend) -> Backend:
    def run(*operands: object, **attrs: object) -> object:
        raise SystemExit(139)

    return backend_with(backend, kernels={**backend.kernels, "attention": Kernel(run)}, fusions=())


def _mutant(name: str, wrong: str, apply: object, *ops: str) -> Mutant:
    return Mutant(name, wrong, "declarations", apply, ops=frozenset(ops))  # type: ignore[arg-type]


MUTANTS: tuple[Mutant, ...] = (
    _mutant(
        "fallback_taken",
        "Norms run by the reference, though no fallback was allowed.",
        lambda b: backend_with(b, _FallsBack, fusions=()),
        "rms_norm",
        "layer_norm",
    ),
    _mutant(
        "hard_cases_declined",
        "Heads that are no multiple of 8 wide are declared unsupported.",
        lambda b: backend_with(b, _DeclinesOdd, fusions=()),
        "attention",
    ),
    _mutant("all_claimed", "Everything is claimed to be supported; convolutions raise.", _claims_all, "conv3d"),
    _mutant("no_kernels", "There is no kernel at all.", _no_kernels, *op.names()),
    _mutant("crashes", "Attention ends the process.", _crashing, "attention"),
    _mutant(
        "emulated",
        "What computes is a simulator, and says so.",
        lambda b: backend_with(b, emulated="a simulator of the device"),
    ),
)
