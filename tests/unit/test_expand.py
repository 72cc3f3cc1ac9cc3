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
from helios.passes import Plan, expand
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
    fusions: tuple[str, ...] = ("gated_add_adaln",)
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


class Everything(Listing):
    name = "everything"
    fusions = (
        "adaln",
        "gated_add_adaln",
        "linear_gelu",
        "qk_norm_rope",
        "qkv_linear",
        "renoise_upsample",
        "unipc_step",
    )


def pipeline_plan(variant: str, backend: Backend) -> Plan:
    sizes, sampling = presets.size("tiny"), presets.variant(variant)
    layout = Layout(1, 16, 16, 8, Window())
    return plan_for(denoise_graphs(sizes.transformer, sampling.scheduler, sampling.pipeline, layout, F32), backend)


VARIANTS = ("base", "mid", "distilled")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_backend_with_core_ops_alone_runs_every_entry_of_a_pipeline(variant: str) -> None:
    plan = pipeline_plan(variant, ReferenceBackend())
    assert {op.get(name).kind for graph in plan.graphs.values() for name in ops(graph)} == {"move", "round", "reduce"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_networks_stand_in_the_order_of_the_fused_ops(variant: str) -> None:
    """Fusion looks at consecutive nodes: a network in another order would stay unfused, and nobody would notice."""
    plan = pipeline_plan(variant, Everything())
    found = {name for graph in plan.graphs.values() for name in ops(graph)}
    assert not found & {"modulate", "gelu", "rope", "blend", "unipc_predict"}
    layers, text = 2, 2  # of ``tiny``; a block normalises and multiplies text keys by themselves
    for name, graph in plan.steps.items():
        if name.startswith("denoise"):
            counts = {fused: ops(graph).count(fused) for fused in Everything.fusions[:5]}
            assert counts["qk_norm_rope"] == counts["linear_gelu"] == layers
            assert counts["qkv_linear"] == layers - 1  # the last block takes fewer queries than keys
            assert counts["adaln"] + counts["gated_add_adaln"] == 2 * layers + 1
            assert ops(graph).count("rms_norm") == text


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_fused_op_draws_work_out_of_a_slower_phase(variant: str) -> None:
    plan = pipeline_plan(variant, Everything())
    nodes = [node for graph in plan.graphs.values() for node in graph.nodes if op.get(node.op).kind == "fused"]
    inner = [(node, part) for node in nodes for part in op.expand(node).nodes]
    late = {part.op for node, part in inner if part.outputs[0].rate < node.outputs[0].rate}
    assert all(op.get(name).kind == "move" for name in late)


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
