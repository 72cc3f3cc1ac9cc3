"""Passes: pruning, fusing, and splitting into phases; none of them changes a bit of any result."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helios import op as ops
from helios.backend import ReferenceBackend
from helios.errors import GraphError
from helios.fit.costs import Setting, phase_costs, stage_graphs
from helios.graph import Builder, Graph, Node, Rate, Value
from helios.lower import lower
from helios.model.presets import SIZES, VARIANTS
from helios.op import Arg, Sample
from helios.ops.layout import concat, expand, full, narrow, reshape, unbind
from helios.ops.linear import linear
from helios.ops.norm import layer_norm, modulate, rms_norm
from helios.ops.pointwise import add, cast, gelu, silu
from helios.ops.rope import rope_table
from helios.passes import Plan, build_plan, fuse, prune

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
FUSIONS = ("adaln", "gated_add_adaln", "linear_gelu", "qk_norm_rope", "qkv_linear")
LAYERS = 2
TINY = Setting(SIZES["tiny"], VARIANTS["distilled"], height=64, width=64, text_tokens=7)


@functools.cache
def stages() -> Mapping[str, Graph]:
    return stage_graphs(TINY)


@functools.cache
def plan() -> Plan:
    return build_plan(stages())


def count(graph: Graph) -> collections.Counter[str]:
    return collections.Counter(node.op for node in graph.nodes)


def draw(graph: Graph, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {v.name: torch.randn(v.shape, generator=generator, dtype=F64).to(v.dtype) for v in graph.inputs}


def straight(graph: Graph, env: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs, node by node with the op bodies."""
    known: dict[str, Any] = dict(env)
    for node in graph.nodes:
        operands = [[known[v.name] for v in x] if isinstance(x, tuple) else x and known[x.name] for x in node.inputs]
        result = ops.get(node.op).fn(*operands, **node.attributes)
        results = result if isinstance(result, tuple) else (result,)
        known.update({v.name: t for v, t in zip(node.outputs, results, strict=True)})
    return {name: known[value.name] for name, value in graph.outputs}


class Reader:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def in_phases(graph: Graph, env: Mapping[str, Tensor]) -> dict[str, Tensor]:
    program = lower({"main": graph}, ReferenceBackend())
    program.load(Reader(env))
    context: Any = None
    for rate in (Rate.PROMPT, Rate.CHUNK):
        inputs = {name: env[name] for name in program.input_names(rate)}
        if inputs:
            bound = program.bind(inputs) if context is None else program.bind(inputs, context)
            context = bound if context is None else context | bound
    inputs = {name: env[name] for name in program.input_names(Rate.STEP)}
    return program.run("main", inputs) if context is None else program.run("main", inputs, context)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equal bits: NaN equals itself, and -0.0 is not 0.0."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and bytes_of(a[k]) == bytes_of(b[k]) and a[k].shape == b[k].shape for k in a
    )


def bytes_of(x: Tensor) -> bytes:
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""


# prune


def test_prune_drops_what_nobody_reads() -> None:
    with Builder("g") as build:
        x = build.input("x", (2, 3), F32, Rate.STEP)
        build.input("unused", (2, 3), F32, Rate.STEP)
        dead = build.input("dead", (2, 3), F32, Rate.STEP)
        silu(gelu(dead))
        a, b = unbind(x, dim=0)
        build.output("y", silu(b))
    graph, changed = prune(build.graph())
    assert changed
    assert [v.name for v in graph.inputs] == ["x"]
    assert [n.op for n in graph.nodes] == ["unbind", "silu"]
    assert prune(graph) == (graph, False)
    assert a.name != b.name


# fuse


@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2"])
def test_each_composition_of_the_network_is_found(stage: str) -> None:
    graph, changed = fuse(stages()[stage], FUSIONS)
    assert changed
    found = count(graph)
    assert found["qk_norm_rope"] == LAYERS  # of the last block too, where there are fewer queries than keys
    assert found["qkv_linear"] == LAYERS - 1  # in the last block queries are made of the noisy rows alone
    assert found["linear_gelu"] == LAYERS + 1  # the feed-forwards, and the text embedder
    assert found["gated_add_adaln"] == 2 * LAYERS - 1  # before each feed-forward and before each block but the first
    assert found["adaln"] == 2  # before the first block, and in the head
    assert found["modulate"] == found["rope"] == found["gelu"] == 0
    assert found["rms_norm"] == 2 * LAYERS  # of the cross-attentions


def test_without_history_the_last_block_is_like_the_others() -> None:
    shape = dataclasses.replace(shape_of("stage2"), history=None)
    graph = denoise(shape)
    assert count(fuse(graph, FUSIONS)[0])["qkv_linear"] == LAYERS


def shape_of(stage: str) -> Any:
    from helios.fit.costs import stage_shape

    return stage_shape(TINY, int(stage[-1]))


def denoise(shape: Any, dtype: torch.dtype = BF16) -> Graph:
    from helios.model.transformer import denoise_graph

    return denoise_graph(TINY.size.transformer, shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_fusing_changes_no_bit_on_the_reference(dtype: torch.dtype) -> None:
    graph = denoise(shape_of("stage1"), dtype)
    fused, _ = fuse(graph, FUSIONS)
    env = {k: t * 0.3 for k, t in draw(graph).items()}
    assert same(straight(graph, env), straight(fused, env))


def test_what_is_refused_stays_as_it_was() -> None:
    graph = stages()["stage0"]
    assert fuse(graph, FUSIONS, lambda node: "too big")[0].nodes == graph.nodes
    refused: list[Node] = []

    def accept(node: Node) -> str | None:
        if node.op != "gated_add_adaln":
            return None
        refused.append(node)
        return "not this one"

    found = count(fuse(graph, FUSIONS, accept)[0])
    assert len(refused) == 2 * LAYERS - 1
    assert found["gated_add_adaln"] == 0
    assert found["adaln"] == 2 * LAYERS + 1  # the part of it that is a fused op itself
    assert found["linear_gelu"] == LAYERS + 1


def test_nothing_is_fused_unasked() -> None:
    graph = stages()["stage0"]
    assert fuse(graph, ()) == (graph, False)
    assert set(count(fuse(graph, ("adaln",))[0])) - set(count(graph)) == {"adaln"}


def normed(build: Builder, eps: float = 1e-6, dtype: torch.dtype = F32) -> tuple[Value, Value]:
    x = build.input("x", (1, 4, 8), BF16, Rate.STEP)
    row = build.input("row", (1, 2, 8), F32, Rate.STEP)
    inner = layer_norm(x, eps=eps, dtype=dtype)
    return inner, modulate(inner, row, row, split=1, dtype=BF16)


@pytest.mark.parametrize("fusions", [("linear_gelu", "linear_gelu_silu"), ("linear_gelu_silu", "linear_gelu")])
def test_the_longest_composition_wins(monkeypatch: pytest.MonkeyPatch, fusions: tuple[str, str]) -> None:
    monkeypatch.setattr(ops, "_registry", dict(ops._registry))

    sample = Sample("small", (Arg((2, 4)), Arg((4, 4)), Arg((4,))))

    @ops.op(dims="..., o i, o -> ...", kind="fused", samples=lambda: [sample])
    def linear_gelu_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return silu(gelu(linear(x, weight, bias)))

    with Builder("g") as build:
        x, w = build.input("x", (2, 4), F32, Rate.STEP), build.input("w", (4, 4), F32, Rate.WEIGHTS)
        build.output("y", silu(gelu(linear(x, w, build.input("b", (4,), F32, Rate.WEIGHTS)))))
    assert [node.op for node in fuse(build.graph(), fusions)[0].nodes] == [linear_gelu_silu.name]


def test_attributes_are_carried_over() -> None:
    with Builder("g") as build:
        build.output("y", normed(build, eps=1e-3)[1])
    (node,) = fuse(build.graph(), FUSIONS)[0].nodes
    assert node.op == "adaln"
    assert node.attributes == {"eps": 1e-3, "split": 1}


@pytest.mark.parametrize("bias", [False, True])
def test_with_and_without_optional_operands(bias: bool) -> None:
    with Builder("g") as build:
        x = build.input("x", (1, 2, 4), F32, Rate.STEP)
        w = build.input("w", (4, 4), F32, Rate.WEIGHTS)
        b = build.input("b", (4,), F32, Rate.WEIGHTS) if bias else None
        build.output("y", gelu(linear(x, w, b)))
        for i in range(3):
            build.output(str(i), linear(x, w, b))
    assert [node.op for node in fuse(build.graph(), FUSIONS)[0].nodes] == ["linear_gelu", "qkv_linear"]


def test_not_where_an_intermediate_is_used_elsewhere() -> None:
    with Builder("g") as build:
        inner, out = normed(build)
        build.output("y", out)
        build.output("z", inner)
    assert not fuse(build.graph(), FUSIONS)[1]
    with Builder("g") as build:
        inner, out = normed(build)
        build.output("y", add(out, inner))
    assert not fuse(build.graph(), FUSIONS)[1]


def test_not_where_the_composition_would_be_another() -> None:
    """A rounding between the parts that the fused op does not have."""
    with Builder("g") as build:
        build.output("y", normed(build, dtype=BF16)[1])
    assert not fuse(build.graph(), FUSIONS)[1]


def test_not_where_other_operands_stand() -> None:
    """Three linears are one only of one input."""
    with Builder("g") as build:
        x, z = (build.input(n, (1, 4, 8), F32, Rate.STEP) for n in "xz")
        w, b = build.input("w", (8, 8), F32, Rate.WEIGHTS), build.input("b", (8,), F32, Rate.WEIGHTS)
        for i, operand in enumerate((x, x, z)):
            build.output(str(i), linear(operand, w, b))
    assert not fuse(build.graph(), FUSIONS)[1]


# phases


def inputs_at(graph: Graph, rate: Rate) -> set[str]:
    return {v.name for v in graph.inputs_at(rate)}


def test_what_is_hoisted() -> None:
    weights, prompt, chunk = (plan().phases[rate] for rate in (Rate.WEIGHTS, Rate.PROMPT, Rate.CHUNK))
    assert count(weights)["rope_table"] == 6  # three of history, and one for each stage
    assert count(weights)["timestep_embedding"] == 1  # of t = 0
    assert count(prompt) == {
        "linear": 2 + 2 * LAYERS,
        "gelu": 1,
        "cast": 1,
        "rms_norm": LAYERS,
        "split_heads": 2 * LAYERS,
    }
    assert count(chunk) == {"patch_embed": 3, "cast": 3, "concat": 1}
    assert inputs_at(prompt, Rate.PROMPT) == {"text"}
    assert inputs_at(chunk, Rate.CHUNK) == {"history_long", "history_mid", "history_short"}


def test_what_is_shared_by_the_stages_is_computed_and_held_once() -> None:
    held = {name for name, _ in plan().phases[Rate.PROMPT].outputs}
    assert len(held) == 2 * LAYERS  # keys and values of the text, of all layers
    for step in plan().steps.values():
        assert inputs_at(step, Rate.PROMPT) == held
        assert inputs_at(step, Rate.CHUNK) == {name for name, _ in plan().phases[Rate.CHUNK].outputs}
    assert len(plan().phases[Rate.CHUNK].outputs) == 1
    alone = build_plan({"stage0": stages()["stage0"]})
    assert alone.phases[Rate.PROMPT] == plan().phases[Rate.PROMPT]
    assert alone.phases[Rate.CHUNK] == plan().phases[Rate.CHUNK]


def test_nothing_trivial_is_held() -> None:
    """No cast or view of an input, and no broadcast: each held value is made by arithmetic, or joins what is."""
    for graph in plan().phases.values():
        made = {v.name: node for node in graph.nodes for v in node.outputs}
        for name, value in graph.outputs:
            node = made[value.name]
            moves = node.op in {"cast", "expand", "reshape", "unbind"}
            assert not moves or any(v.name in made for v in node.values)
            assert name == value.name
    with Builder("g") as build:
        x = build.input("x", (4, 8), F32, Rate.STEP)
        w = build.input("w", (1, 8), BF16, Rate.WEIGHTS)
        zeros: Any = full(shape=(1, 8), value=0.0, dtype=F32)
        build.output("y", add(add(x, expand(cast(w, dtype=F32), shape=(4, 8))), expand(zeros, shape=(4, 8))))
    small = build_plan({"g": build.graph()})
    assert {v.shape for _, v in small.phases[Rate.WEIGHTS].outputs} == {(1, 8)}
    assert count(small.steps["g"]) == {"cast": 1, "expand": 2, "add": 2}


def test_every_node_runs_at_its_own_rate_unless_it_only_moves() -> None:
    for graph in plan().steps.values():
        for node in graph.nodes:
            assert node.outputs[0].rate == Rate.STEP or ops.get(node.op).kind == "move"
    for rate, graph in plan().phases.items():
        assert all(v.rate <= rate for node in graph.nodes for v in node.outputs)


def test_flops_by_phase_add_up() -> None:
    """What phases save is what they compute once instead of once a step."""
    costs = {cost.name: cost for cost in phase_costs(plan())}
    # Tokens of history: 16 frames in cells of 4 × 8 × 8, 2 in 2 × 4 × 4, 2 in 1 × 2 × 2, of 8 × 8 latents.
    long, mid, short = 4 * 1 * 1, 1 * 2 * 2, 2 * 4 * 4
    width, text = 24, 32
    assert costs["chunk"].flops == 2 * 16 * width * (long * 4 * 8 * 8 + mid * 2 * 4 * 4 + short * 2 * 2)
    assert costs["prompt"].flops == 2 * 7 * width * (text + width + LAYERS * 2 * width)
    for name, graph in stages().items():
        whole = sum(ops.cost(node).flops for node in graph.nodes)
        assert whole == sum(costs[phase].flops for phase in ("weights", "prompt", "chunk", name))


def test_inputs_of_one_name_must_agree() -> None:
    graphs = {}
    for rows in (2, 3):
        with Builder("g") as build:
            x = build.input("text", (rows, 4), F32, Rate.PROMPT)
            build.output("y", add(silu(x), build.input("z", (rows, 4), F32, Rate.STEP)))
        graphs[f"r{rows}"] = build.graph()
    with pytest.raises(GraphError, match=r"%text is float32\[2,4\] in one graph and float32\[3,4\] in another"):
        build_plan(graphs)


def test_the_digest_knows_every_attribute() -> None:
    def one(eps: float) -> Plan:
        with Builder("g") as build:
            build.output("y", rms_norm(build.input("x", (1, 2, 4), F32, Rate.STEP), eps=eps))
        return build_plan({"g": build.graph()})

    assert one(1e-6).digest == one(1e-6).digest != one(1e-5).digest


def test_values_of_other_attributes_are_not_shared() -> None:
    with Builder("g") as build:
        x = build.input("x", (2, 4), F32, Rate.STEP)
        tables: list[Any] = [
            rope_table(frames=(0, 1), height=1, width=1, dims=(2, 2, 0), theta=theta, dtype=F32)
            for theta in (1e4, 1e3, 1e4)
        ]
        flat = [reshape(t, shape=(2, 4)) for t in tables]
        build.output("y", add(add(x, flat[0]), add(flat[1], flat[2])))
    made = build_plan({"g": build.graph()})
    assert count(made.phases[Rate.WEIGHTS])["rope_table"] == 2


# random graphs

SHAPE = (2, 3, 4)


@st.composite
def graphs(draw: Any) -> Graph:
    """Small graphs over values of one shape and inputs of every rate, with several outputs and dead nodes."""
    with Builder("random") as build:
        pool = [build.input(f"{r.label}{i}", SHAPE, F32, r) for r in Rate for i in range(draw(st.integers(0, 2)))]
        pool = pool or [build.input("step0", SHAPE, F32, Rate.STEP)]
        square = build.input("square", (4, 4), F32, Rate.WEIGHTS)
        for kind in draw(st.lists(st.sampled_from(sorted(MAKERS)), min_size=1, max_size=14)):
            operands = [pool[draw(st.integers(0, len(pool) - 1))] for _ in range(3)]
            pool += MAKERS[kind](square, *operands)
        for i, at in enumerate(draw(st.lists(st.integers(0, len(pool) - 1), min_size=1, max_size=4))):
            build.output(f"y{i}", pool[at])
    return build.graph()


def _halves(x: Value) -> list[Value]:
    rows = unbind(x, dim=1)
    return [reshape(concat([rows[i], rows[j], rows[0]], dim=1), shape=SHAPE) for i, j in ((0, 1), (2, 1))]


def two(x: Value, start: int) -> Value:
    rows: Value = narrow(x, dim=1, start=start, length=2)
    return rows


MAKERS: dict[str, Any] = {
    "add": lambda w, x, y, z: [add(x, y)],
    "adaln": lambda w, x, y, z: [
        modulate(
            layer_norm(x, dtype=F32), narrow(y, dim=1, start=0, length=2), narrow(z, dim=1, start=1, length=2), split=1
        )
    ],
    "constant": lambda w, x, y, z: [expand(full(shape=(1, 3, 4), value=0.5, dtype=F32), shape=SHAPE)],
    "gelu": lambda w, x, y, z: [gelu(linear(x, w))],
    "linear": lambda w, x, y, z: [linear(x, w)],
    "qkv": lambda w, x, y, z: [linear(x, w), linear(x, w), linear(x, w)],
    "round": lambda w, x, y, z: [cast(cast(x, dtype=BF16), dtype=F32)],
    "rows": lambda w, x, y, z: _halves(x),
    "silu": lambda w, x, y, z: [silu(x)],
    "tail": lambda w, x, y, z: [concat([two(x, 1), narrow(y, dim=1, start=0, length=1)], dim=1)],
}


@given(graphs())
@settings(max_examples=150)
def test_phases_change_no_bit(graph: Graph) -> None:
    env = draw_inputs(graph)
    assert same(in_phases(graph, env), straight(graph, env))


@given(graphs())
@settings(max_examples=100)
def test_pruning_and_fusing_change_no_bit(graph: Graph) -> None:
    env = draw_inputs(graph)
    pruned, _ = prune(graph)
    fused, _ = fuse(pruned, FUSIONS)
    assert same(straight(fused, env), straight(graph, env))


def draw_inputs(graph: Graph) -> dict[str, Tensor]:
    return draw(graph, seed=len(graph.nodes))
