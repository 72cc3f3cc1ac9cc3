"""Graphs and a backend give a program: fuse to what the backend wants, split into phases, resolve each node."""

from __future__ import annotations

from collections.abc import Mapping

from helios import op
from helios.backend import Backend, Kernel
from helios.errors import InputError, UnsupportedNode
from helios.graph import Graph, Node
from helios.kernel_program import KernelProgram, Resolved
from helios.passes import Plan, build_plan, expand, fuse, prune
from helios.program import Coverage, Program

__all__ = ["compile_kernels", "lower", "plan_for"]

FALLBACKS = ("error", "reference")


def lower(graphs: Mapping[str, Graph], backend: Backend, *, fallback: str = "error") -> Program:
    """A program with one entry for each graph.

    Args:
        graphs: by entry name, of core ops.
        backend: to run them.
        fallback: ``error`` refuses a node without kernel; ``reference`` runs the op's body instead, and counts it.

    Raises:
        UnsupportedNode: names op, shapes, dtypes and the reason.
    """
    if fallback not in FALLBACKS:
        raise InputError(f"unknown fallback {fallback!r}", fix=f"choose one of {', '.join(FALLBACKS)}")
    return backend.compile(plan_for(graphs, backend), fallback=fallback)


def plan_for(graphs: Mapping[str, Graph], backend: Backend) -> Plan:
    """The plan as this backend will see it: of core ops, and of the fused ops that it lists and supports."""

    def wanted(node: Node) -> bool:
        return node.op in backend.fusions and backend.supports(node) is None

    fused = {}
    for name, graph in graphs.items():
        written_out, _ = expand(prune(graph)[0], wanted)
        fused[name], _ = fuse(written_out, backend.fusions, backend.supports)
    return build_plan(fused)


def compile_kernels(
    plan: Plan, backend: Backend, *, fallback: str = "error", program: type[KernelProgram] = KernelProgram
) -> Program:
    """A program that calls one kernel a node; a backend may give its own kind of it."""
    coverage = Coverage()
    resolved = {
        name: [_resolve(node, backend, fallback, coverage) for node in graph.nodes]
        for name, graph in plan.graphs.items()
    }
    return program(plan, backend, resolved, coverage)


def _resolve(node: Node, backend: Backend, fallback: str, coverage: Coverage) -> Resolved:
    record = op.get(node.op)
    if not node.inputs:
        return Resolved(node, Kernel(record.fn), "constant")
    reason = backend.supports(node)
    if reason is None:
        kind = "fused" if record.kind == "fused" else "native"
        coverage.count(node.op, kind)
        return Resolved(node, backend.kernels[node.op], kind)
    if fallback == "error":
        raise UnsupportedNode(
            f"backend {backend.name!r} cannot run: {node}\n  reason: {reason}",
            fix="`--fallback reference` (or HELIOS_FALLBACK=reference) runs such nodes by torch's ops, and counts them",
        )
    coverage.count(node.op, "fallback", reason)
    return Resolved(node, Kernel(record.fn), "fallback")
