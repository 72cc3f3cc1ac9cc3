"""A whole-graph engine supplies ``evaluate`` alone; what the base class does for it, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from helios import op
from helios.backend import Backend, ReferenceBackend
from helios.errors import GraphError, InputError
from helios.graph import Graph, Rate
from helios.lower import lower
from helios.model import presets
from helios.model.random_weights import RandomWeights
from helios.model.shapes import transformer_shapes
from helios.passes import Plan
from helios.pipeline.denoise import Layout, denoise_graphs
from helios.pipeline.history import Window
from helios.program import Coverage, Program, WeightReader

F32 = torch.float32


class Whole(Program):
    """Runs a graph as one piece, and notes what it is given."""

    def __init__(self, plan: Plan, backend: Backend) -> None:
        super().__init__(plan, backend, Coverage())
        self.seen: list[tuple[str, set[str]]] = []
        self.baked: dict[str, Tensor] = {}

    def evaluate(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        self.seen.append((graph, set(inputs)))
        return interpret(self.plan.graphs[graph], {**self.baked, **inputs})


class Baked(Whole):
    """Takes the weights into its engines and frees them."""

    def load(self, weights: WeightReader) -> None:
        super().load(weights)
        self.baked, self.weights = self.weights, {}

    def wanted(self, graph: str) -> Iterable[str]:
        loading = graph == Rate.WEIGHTS.label
        return (v.name for v in self.plan.graphs[graph].inputs if loading or v.rate != Rate.WEIGHTS)


def interpret(graph: Graph, env: dict[str, Any]) -> dict[str, Tensor]:
    for node in graph.nodes:
        operands = [[env[v.name] for v in x] if isinstance(x, tuple) else x and env[x.name] for x in node.inputs]
        result = op.get(node.op).fn(*operands, **node.attributes)
        results = result if isinstance(result, tuple) else (result,)
        env.update(zip((v.name for v in node.outputs), results, strict=True))
    return {name: env[value.name] for name, value in graph.outputs}


class WholeBackend(Backend):
    name = "whole"

    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        return Whole(plan, self)


class BakedBackend(Backend):
    name = "baked"

    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        return Baked(plan, self)


SIZES, SAMPLING = presets.size("tiny"), presets.variant("distilled")


def graphs() -> dict[str, Graph]:
    layout = Layout(1, 16, 16, 8, Window())
    return denoise_graphs(SIZES.transformer, SAMPLING.scheduler, SAMPLING.pipeline, layout, F32)


def program(backend: Backend) -> Any:
    made = lower(graphs(), backend)
    made.load(RandomWeights(transformer_shapes(SIZES.transformer), seed=0))
    return made


def inputs(rate: Rate, entry: str = "denoise.2", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = sorted(graphs()[entry].inputs_at(rate), key=lambda v: v.name)
    return {v.name: torch.randn(v.shape, generator=generator) for v in values}


@pytest.mark.parametrize("backend", [WholeBackend(), BakedBackend()], ids=lambda backend: backend.name)
def test_an_engine_gives_what_kernels_give(backend: Backend) -> None:
    engine, kernels = program(backend), program(ReferenceBackend())
    contexts = [p.bind(inputs(Rate.PROMPT)) | p.bind(inputs(Rate.CHUNK)) for p in (engine, kernels)]
    assert contexts[0].values.keys() == contexts[1].values.keys()
    for entry in graphs():
        given = inputs(Rate.STEP, entry)
        ours, theirs = (p.run(entry, given, c) for p, c in zip((engine, kernels), contexts, strict=True))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert engine.evaluations == kernels.evaluations == {Rate.WEIGHTS: 1, Rate.PROMPT: 1, Rate.CHUNK: 1}


def test_an_engine_is_given_exactly_the_inputs_of_its_graph() -> None:
    engine = program(WholeBackend())
    context = engine.bind(inputs(Rate.PROMPT)) | engine.bind(inputs(Rate.CHUNK))
    engine.run("denoise.2", inputs(Rate.STEP), context)
    assert [name for name, _ in engine.seen] == ["weights", "prompt", "chunk", "denoise.2"]
    for name, given in engine.seen:
        assert given == {v.name for v in engine.plan.graphs[name].inputs}


def test_what_only_the_weights_phase_reads_is_let_go() -> None:
    engine = program(WholeBackend())
    read = {v.name for name, g in engine.plan.graphs.items() if name != "weights" for v in g.inputs}
    assert set(engine.weights) <= read
    assert engine.profile("denoise.2", inputs(Rate.STEP)) == []


def test_two_prompts_live_side_by_side() -> None:
    engine = program(WholeBackend())
    history = engine.bind(inputs(Rate.CHUNK))
    a, b = (engine.bind(inputs(Rate.PROMPT, seed=seed)) | history for seed in (1, 2))
    first, other, again = (engine.run("denoise.0", inputs(Rate.STEP, "denoise.0"), c)["velocity"] for c in (a, b, a))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class Narrow(WholeBackend):
    """A device without float64, which nothing must reach it in."""

    @property
    def device(self) -> torch.device:
        return torch.device("meta")


def test_a_tensor_is_converted_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Whole(lower(graphs(), ReferenceBackend()).plan, Narrow())
    value = next(v for v in graphs()["denoise.2"].inputs if v.name == "sample")
    sent: list[torch.dtype] = []
    real = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(args[0], torch.device):
            sent.append(self.dtype)
            assert len(args) == 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)
    placed = made.place(torch.zeros(value.shape, dtype=torch.float64), value)
    assert sent == [F32]
    assert (placed.dtype, placed.device.type) == (F32, "meta")


def test_what_does_not_fit_is_refused() -> None:
    engine = program(WholeBackend())
    context = engine.bind(inputs(Rate.PROMPT)) | engine.bind(inputs(Rate.CHUNK))
    step = inputs(Rate.STEP)
    with pytest.raises(GraphError, match=r"no entry 'denoise\.9'; it has denoise\.0"):
        engine.run("denoise.9", step, context)
    with pytest.raises(InputError, match=r"has no input 'noise'; it has sample, timestep"):
        engine.run("denoise.2", step | {"noise": step["sample"]}, context)
    with pytest.raises(InputError, match=r"input 'timestep' has shape \[2\], denoise\.2 takes \[1\]"):
        engine.run("denoise.2", step | {"timestep": torch.zeros(2)}, context)
    with pytest.raises(InputError, match=r"'denoise\.2' lacks sample\n"):
        engine.run("denoise.2", {"timestep": step["timestep"]}, context)
    with pytest.raises(InputError, match=r"'denoise\.2' lacks chunk\."):
        engine.run("denoise.2", step, engine.bind(inputs(Rate.PROMPT)))
    with pytest.raises(InputError, match="bind takes all inputs of one phase"):
        engine.bind({"text": inputs(Rate.PROMPT)["text"], "history_mid": step["sample"]})


@pytest.mark.parametrize("backend", [WholeBackend(), ReferenceBackend()], ids=lambda backend: backend.name)
def test_nothing_runs_before_the_weights_are_loaded(backend: Backend) -> None:
    made = lower(graphs(), backend)
    for call in (lambda: made.bind(inputs(Rate.PROMPT)), lambda: made.run("denoise.2", inputs(Rate.STEP))):
        with pytest.raises(GraphError, match="no weights yet"):
            call()
