"""Plans whose constants stand where they are read: nothing that is held depends on the size of a video."""

from __future__ import annotations

import pytest
import torch

from helios.backend import ReferenceBackend
from helios.graph import Builder, Graph, Rate
from helios.model.presets import SIZES, VARIANTS
from helios.model.random_weights import RandomWeights
from helios.model.shapes import transformer_shapes
from helios.ops.layout import full
from helios.passes import Plan, build_plan
from helios.pipeline.denoise import Layout, denoise_graphs
from helios.pipeline.history import Window
from helios.program import Program

SIZE, VARIANT = SIZES["tiny"], VARIANTS["distilled"]


def graphs(height: int = 8, tokens: int = 7) -> dict[str, Graph]:
    layout = Layout(1, height, 8, tokens, Window())
    return denoise_graphs(SIZE.transformer, VARIANT.scheduler, VARIANT.pipeline, layout, torch.float32)


def held(plan: Plan, rate: Rate) -> int:
    return len(plan.phases[rate].outputs)


def test_what_is_held_from_loading_is_the_same_at_every_size() -> None:
    small, large = (build_plan(graphs(*size), local_constants=True) for size in ((8, 7), (16, 9)))
    assert str(small.phases[Rate.WEIGHTS]) == str(large.phases[Rate.WEIGHTS])
    assert held(small, Rate.WEIGHTS) == 1  # the modulation of timestep 0
    usual = [build_plan(graphs(*size)) for size in ((8, 7), (16, 9))]
    assert str(usual[0].phases[Rate.WEIGHTS]) != str(usual[1].phases[Rate.WEIGHTS])


@pytest.mark.parametrize("rate", [Rate.PROMPT, Rate.CHUNK])
def test_what_is_computed_of_inputs_is_held_as_before(rate: Rate) -> None:
    local, usual = build_plan(graphs(), local_constants=True), build_plan(graphs())
    assert held(local, rate) == held(usual, rate) > 0


def test_the_results_keep_their_bits() -> None:
    backend = ReferenceBackend()
    results = []
    for local in (False, True):
        plan = build_plan(graphs(), local_constants=local)
        program: Program = backend.compile(plan)
        program.load(RandomWeights(transformer_shapes(SIZE.transformer), seed=0))
        generator = torch.Generator().manual_seed(1)
        inputs = {
            v.name: torch.randn(v.shape, generator=generator)
            for v in sorted(graphs()["denoise.2"].inputs, key=lambda v: v.name)
            if v.rate != Rate.WEIGHTS
        }
        context = program.bind({"text": inputs.pop("text")})
        history = {name: inputs.pop(name) for name in list(inputs) if name.startswith("history")}
        results.append(program.run("denoise.2", inputs, context | program.bind(history))["velocity"])
    assert torch.equal(*results)


def test_a_constant_that_is_an_output_stands_in_its_step() -> None:

    with Builder("constant") as build:
        build.input("x", (1,), torch.float32, Rate.STEP)
        made: object = full(shape=(2,), value=1.0, dtype=torch.float32)
        build.output("y", made)  # type: ignore[arg-type]
    plan = build_plan({"constant": build.graph()}, local_constants=True)
    assert not plan.phases[Rate.WEIGHTS].nodes
    assert [node.op for node in plan.steps["constant"].nodes] == ["full"]
