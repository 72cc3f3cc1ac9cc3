"""Fused ops written out: only what a backend asked for stays fused, and the arithmetic stays the same."""

from __future__ import annotations

import pytest
import torch

from helios import op
from helios.backend import Backend, ReferenceBackend
from helios.graph import Builder, Graph, Rate
from helios.lower import lower, plan_for
from helios.model import presets
from helios.ops.norm import gated_add_adaln
from helios.ops.pointwise import add
from helios.ops.sampler import unipc_step
from helios.passes import expand
from helios.pipeline.denoise import Layout, denoise_graphs
from helios.pipeline.history import Window

F32 = torch.float32


def residual() -> Graph:
    """A fused op with two outputs, of which the first changes once a chunk and the second with each step."""
    with Builder("residual") as build:
        x, y = (build.input(name, (1, 3, 4), F32, Rate.CHUNK) for name in "xy")
        scale, shift = (build.input(name, (1, 1, 4), F32, Rate.STEP) for name in ("scale", "shift"))
        total, normed = gated_add_adaln(x, y, None, scale, shift)
        build.output("total", total)
        build.output("out", add(normed, total))
    return build.graph()


class Listing(Backend):
    name = "listing"
    fusions = ("gated_add_adaln",)
    kernels = ReferenceBackend().kernels


class Refusing(Listing):
    def supports(self, node: object) -> str | None:
        return "not this one" if getattr(node, "op", "") == "gated_add_adaln" else None


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def test_a_composition_takes_the_place_of_the_fused_op() -> None:
    graph, changed = expand(residual())
    assert changed
    assert ops(graph) == ["gated_add", "layer_norm", "modulate", "add"]
    assert dict(graph.outputs)["total"].rate == Rate.CHUNK  # the fused op could only say STEP
    assert expand(graph) == (graph, False)


def test_what_is_kept_stays() -> None:
    graph = residual()
    assert expand(graph, lambda node: node.op == "gated_add_adaln") == (graph, False)


def test_inputs_that_are_named_like_values_do_no_harm() -> None:
    with Builder("numbers") as build:
        values = [build.input(str(i), (1, 2, 1, 2, 2), F32, Rate.STEP) for i in range(5)]
        coeffs = build.input("coeffs", (9,), F32, Rate.STEP)
        for name, value in zip("abc", unipc_step(*values, coeffs), strict=True):
            build.output(name, value)
    graph, _ = expand(build.graph())
    assert ops(graph) == ["velocity_to_x0", "unipc_correct", "unipc_predict"]


@pytest.mark.parametrize(("backend", "fused"), [(Listing(), 1), (Refusing(), 0), (ReferenceBackend(), 0)])
def test_only_what_a_backend_lists_and_supports_stays_fused(backend: Backend, fused: int) -> None:
    plan = plan_for({"residual": residual()}, backend)
    found = [name for graph in plan.graphs.values() for name in ops(graph)]
    assert found.count("gated_add_adaln") == fused


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_a_backend_with_core_ops_alone_runs_every_entry_of_a_pipeline(variant: str) -> None:
    sizes, sampling = presets.size("tiny"), presets.variant(variant)
    layout = Layout(1, 16, 16, 8, Window())
    graphs = denoise_graphs(sizes.transformer, sampling.scheduler, sampling.pipeline, layout, F32)
    plan = plan_for(graphs, ReferenceBackend())
    assert {op.get(name).kind for graph in plan.graphs.values() for name in ops(graph)} == {"move", "round", "reduce"}


def test_the_arithmetic_stays_the_same() -> None:
    graph = residual()
    generator = torch.Generator().manual_seed(0)
    inputs = {v.name: torch.randn(v.shape, generator=generator) for v in graph.inputs}
    results = []
    for backend in (Listing(), ReferenceBackend()):
        program = lower({"residual": graph}, backend)
        program.load({})  # type: ignore[arg-type]
        chunk = program.bind({name: inputs[name] for name in "xy"})
        results.append(program.run("residual", {name: inputs[name] for name in ("scale", "shift")}, chunk))
    assert all(torch.equal(results[0][name], results[1][name]) for name in ("total", "out"))
