"""Sizes that are polynomials, and graphs of several sizes made into one: right at sizes that nobody showed it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.errors import GraphError
from helios.export.dynamic import Attribute, Dim, Symbol, Unified, unify
from helios.graph import Attr, Builder, Graph, Rate, TensorType, Value
from helios.model.config import SchedulerConfig
from helios.model.presets import SIZES, VARIANTS
from helios.model.transformer import DenoiseShape, HistoryShape, denoise_graph
from helios.model.vae import decode_graph, encode_graph
from helios.ops.layout import concat, narrow, reshape
from helios.ops.linear import linear
from helios.ops.pointwise import add, silu
from helios.passes import build_plan, quantize
from helios.pipeline.denoise import Layout, denoise_graphs
from helios.pipeline.history import Window
from helios.precision import PRECISIONS

F32, BF16 = torch.float32, torch.bfloat16
H, W, L = (("sample", 3), ("sample", 4), ("text", 1))
h, w = Dim.symbol(*H), Dim.symbol(*W)

# --- unseen sizes ----------------------------------------------------------------------------------------------------

# Height, width and text length vary independently: none is a function of the others.
SHOWN = ((8, 16, 7), (16, 8, 9), (24, 40, 21), (48, 16, 5), (40, 8, 33), (8, 8, 11), (32, 24, 6))
HELD = re.compile(r"(weights|prompt|chunk)\.[0-9a-f]{16}(\.\d+)?")


def plain(graph: Graph) -> str:
    """A graph's text without its own name, and with values that are named by content told by their place."""
    made = itertools.chain(graph.inputs, (v for node in graph.nodes for v in node.outputs))
    names = {v.name: f"held{i}" for i, v in enumerate(made) if HELD.fullmatch(v.name)}
    _, _, text = str(graph).partition("\n")
    for name, place in names.items():
        text = re.sub(rf"%{re.escape(name)}(?![\w.])", f"%{place}", text)
    return re.sub(r"output (weights|prompt|chunk)\.[0-9a-f.]+ =", "output =", text)


def assert_gives(unified: Unified, graph: Graph) -> None:
    """Evaluated where the inputs have this graph's shapes, it is this graph."""
    bindings = unified.bindings([v.shape for v in graph.inputs])
    assert plain(unified.at(bindings)) == plain(graph)


@functools.lru_cache(maxsize=256)
def denoiser(
    size: str, stage: int, height: int, width: int, text: int, batch: int, history: bool, dtype: torch.dtype = F32
) -> Graph:
    """Stage 0, 1 or 2 of a video whose latents have this size."""
    shrink = 4 >> stage
    past = HistoryShape(height, width) if history else None
    shape = DenoiseShape(height // shrink, width // shrink, text_tokens=text, history=past, batch=batch)
    return denoise_graph(SIZES[size].transformer, shape, dtype=dtype)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("stage", [0, 1, 2])
@settings(max_examples=4)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 600))
def test_the_transformer_at_an_unseen_size(batch: int, history: bool, stage: int, a: int, b: int, text: int) -> None:
    make = functools.partial(denoiser, "tiny", stage, batch=batch, history=history)
    unified = unify([make(*shown) for shown in SHOWN])
    assert unified.symbols == (H, W, L)
    assert_gives(unified, make(8 * a, 8 * b, text))


def test_the_samples_themselves_come_back() -> None:
    graphs = [denoiser("tiny", 0, *shown, 1, True) for shown in SHOWN]
    unified = unify(graphs)
    for sample, graph in zip(unified.samples, graphs, strict=True):
        assert unified.at(sample) == graph
    assert unified.graph is graphs[0]
    assert unified.samples[2] == {H: 6, W: 10, L: 21}


def test_history_is_a_multiple_of_the_stage_and_tokens_a_product() -> None:
    unified = unify([denoiser("tiny", 0, *shown, 1, True) for shown in SHOWN])
    assert unified.sizes["history_long"] == (1, 16, 16, 4 * h, 4 * w)
    dims = {str(size) for sizes in unified.sizes.values() for size in sizes if isinstance(size, Dim)}
    assert {"49/4·sample.3·sample.4", "10·sample.3·sample.4", "9/4·sample.3·sample.4", "text.1"} <= dims
    assert all(isinstance(size, int) for size in unified.sizes["patch_long.weight"])


@pytest.mark.parametrize("size", ["mini", "14b"])
def test_larger_transformers(size: str) -> None:
    make = functools.partial(denoiser, size, batch=1, history=True, dtype=BF16)
    for stage in (0, 2):
        unified = unify([make(stage, *shown) for shown in SHOWN[:6]])
        assert_gives(unified, make(stage, 64, 104, 512))


def test_a_quantised_transformer() -> None:
    def make(a: int, b: int, text: int) -> Graph:
        return quantize(denoiser("mini", 1, a, b, text, 1, True, BF16), PRECISIONS["fp8"])[0]

    unified = unify([make(*shown) for shown in SHOWN])
    assert any(node.op.startswith("quantize") for node in unified.graph.nodes)
    assert_gives(unified, make(40, 72, 100))


def test_the_batch_as_a_symbol() -> None:
    sizes = [(8, 16, 2), (16, 8, 5), (24, 40, 3), (48, 16, 2), (40, 8, 4), (32, 24, 7)]
    unified = unify([denoiser("tiny", 2, a, b, 9, batch, True) for a, b, batch in sizes])
    assert unified.sizes["timestep"] == (Dim.symbol("sample", 0),)
    assert_gives(unified, denoiser("tiny", 2, 56, 24, 9, 6, True))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_decoder_at_unseen_sizes(first: bool, batch: int) -> None:
    def make(height: int, width: int) -> Graph:
        return decode_graph(
            SIZES["tiny"].vae, batch=batch, latents=3, height=height, width=width, dtype=F32, first=first
        )

    unified = unify([make(64, 64), make(64, 128), make(128, 72), make(192, 320), make(72, 64)])
    assert unified.symbols == (("latents", 3), ("latents", 4))
    for size in ((256, 128), (8, 8), (384, 640), (72, 1000)):
        assert_gives(unified, make(*size))


def test_the_decoder_with_batch_and_latents() -> None:
    shown = ((64, 64, 9, 1), (64, 128, 3, 2), (128, 64, 4, 5), (192, 320, 2, 3), (64, 256, 7, 2), (256, 192, 5, 4))

    def make(height: int, width: int, latents: int, batch: int) -> Graph:
        return decode_graph(
            SIZES["tiny"].vae, batch=batch, latents=latents, height=height, width=width, dtype=F32, caches=False
        )

    unified = unify([make(*s) for s in shown])
    assert len(unified.symbols) == 4
    assert_gives(unified, make(80, 176, 11, 6))


def test_the_encoder_at_unseen_sizes() -> None:
    def make(height: int, width: int) -> Graph:
        return encode_graph(SIZES["tiny"].vae, batch=1, frames=9, height=height, width=width, dtype=F32)

    unified = unify([make(64, 64), make(64, 128), make(128, 72), make(192, 320), make(72, 64)])
    assert_gives(unified, make(104, 168))


# --- plans -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def planned(size: str, height: int, width: int, text: int, batch: int = 1, local: bool = False) -> Mapping[str, Graph]:
    """Every graph of a whole program's plan; latents of this size at full resolution."""
    variant = VARIANTS["distilled"]
    scheduler: SchedulerConfig = variant.scheduler
    layout = Layout(batch, height, width, text, Window())
    graphs = denoise_graphs(SIZES[size].transformer, scheduler, variant.pipeline, layout, F32)
    return build_plan(graphs, local_constants=local).graphs


STEPS = ("denoise.0", "denoise.1", "denoise.2", "guide.1", "step.2", "enter.1", "shrink")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["prompt", "chunk", *STEPS])
def test_phases_of_a_plan_at_an_unseen_size(name: str, batch: int) -> None:
    unified = unify([planned("tiny", *shown, batch)[name] for shown in SHOWN])
    for size in ((56, 64, 40), (64, 8, 1)):
        assert_gives(unified, planned("tiny", *size, batch)[name])


@pytest.mark.parametrize("name", ["weights", "prompt", "chunk", *STEPS])
def test_phases_with_constants_where_they_are_read(name: str) -> None:
    unified = unify([planned("tiny", *shown, 1, True)[name] for shown in SHOWN])
    assert_gives(unified, planned("tiny", 56, 64, 40, 1, True)[name])


def test_held_values_follow_from_what_each_step_is_fed() -> None:
    unified = unify([planned("tiny", *shown)["denoise.0"] for shown in SHOWN])
    (text,) = (s for s in unified.symbols if s not in (H, W))
    assert text[0].startswith("prompt.")
    held = [unified.sizes[v.name] for v in unified.graph.inputs if v.rate == Rate.CHUNK]
    assert held == [(1, 10 * h * w, 24)]
    table = [unified.sizes[v.name] for v in unified.graph.inputs if v.name.startswith("weights.") and v.ndim == 3]
    assert (49 * h * w // 4, 6, 2) in table


def test_constants_in_a_phase_without_inputs_depend_on_nothing_that_is_there() -> None:
    with pytest.raises(GraphError, match=r"node 0 \(rope_table\), height: .* no dimension of an input varies"):
        unify([planned("tiny", *shown)["weights"] for shown in SHOWN])


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize(("height", "width"), [(48, 80), (32, 32), (8, 24)])
def test_three_stages_of_one_plan_are_one_graph(height: int, width: int, local: bool) -> None:
    graphs = [planned("tiny", height, width, 9, 1, local)[f"denoise.{i}"] for i in range(3)]
    unified = unify(graphs)
    assert unified.symbols == (H,)
    assert unified.sizes["sample"] == (1, 16, 9, h, h * width // height)
    for graph in graphs:
        assert_gives(unified, graph)


def test_all_stages_of_all_sizes_are_one_graph() -> None:
    graphs = [planned("tiny", *shown)[f"denoise.{i}"] for shown in SHOWN for i in range(3)]
    unified = unify(graphs)
    assert len(unified.symbols) == 4, "rows, columns, text and tokens of history"
    (history,) = (s for s in unified.symbols if s[0].startswith("chunk."))
    tokens = 9 * h * w // 4 + Dim.symbol(*history)
    assert any(tokens in sizes for sizes in unified.sizes.values())
    for i in range(3):
        assert_gives(unified, planned("tiny", 56, 64, 40)[f"denoise.{i}"])


# --- graphs made by hand ---------------------------------------------------------------------------------------------


def mixer(rows: int, *, width: int = 4, text: int = 5, nodes: Callable[[Value, Value], Any] | None = None) -> Graph:
    """``y = join(x, text) · weight``: rows of x and of the text together."""
    with Builder("mixer") as build:
        x = build.input("x", (1, rows, width), F32, Rate.STEP)
        past = build.input("text", (1, text, width), F32, Rate.PROMPT)
        joined: Any = concat([x, past], dim=1) if nodes is None else nodes(x, past)
        weight = build.input("weight", (3, width), F32, Rate.WEIGHTS)
        build.output("y", linear(joined, weight))
    return build.graph()


def edited(graph: Graph, op: str, **attrs: Attr) -> Graph:
    """With other attributes in the nodes of one op."""
    nodes = tuple(
        dataclasses.replace(n, attrs=tuple(sorted((n.attributes | attrs).items()))) if n.op == op else n
        for n in graph.nodes
    )
    return dataclasses.replace(graph, nodes=nodes)


def test_a_small_graph_reads_as_expected() -> None:
    unified = unify([mixer(2), mixer(6, text=7), mixer(9, text=5), mixer(4, text=3)])
    x, text = Dim.symbol("x", 1), Dim.symbol("text", 1)
    assert unified.sizes == {
        "x": (1, x, 4),
        "text": (1, text, 4),
        "weight": (3, 4),
        "0": (1, x + text, 4),
        "1": (1, x + text, 3),
    }
    assert unified.attributes == ({"dim": 1}, {})
    assert unified.samples[1] == {("x", 1): 6, ("text", 1): 7}


def test_same_sizes_have_no_symbols() -> None:
    unified = unify([mixer(2), mixer(2)])
    assert unified.symbols == ()
    assert unified.at({}) == mixer(2)


def held(*rows: tuple[int, int], name: str = "chunk.0123456789abcdef") -> Unified:
    """Rows of an input behind rows of a value held from a slower phase, which is declared first."""

    def make(fed: int, kept: int) -> Graph:
        with Builder("held") as build:
            past = build.input(name, (kept, 2), F32, Rate.CHUNK)
            x = build.input("x", (fed, 2), F32, Rate.STEP)
            build.output("y", concat([past, x], dim=0))
        return build.graph()

    return unify([make(*pair) for pair in rows])


def test_what_each_step_is_fed_says_the_size() -> None:
    x = Dim.symbol("x", 0)
    assert held((2, 4), (3, 6)).sizes["chunk.0123456789abcdef"] == (2 * x, 2)
    assert held((2, 4), (3, 6), name="past").sizes["past"] == (2 * x, 2)


def test_a_held_value_follows_only_where_a_sample_confirms_it() -> None:
    x = Dim.symbol("x", 0)
    assert held((2, 7), (3, 11), (4, 15)).sizes["chunk.0123456789abcdef"] == (4 * x - 1, 2)
    kept = ("chunk.0123456789abcdef", 0)
    for rows in (((2, 7), (3, 11)), ((2, 7), (3, 11), (3, 11)), ((2, 7), (3, 11), (4, 16))):
        assert held(*rows).symbols == (("x", 0), kept)
    assert held((2, 7), (3, 11), (4, 16), (9, 8)).sizes["0"] == (x + Dim.symbol(*kept), 2)


def test_a_fed_value_follows_only_as_a_multiple() -> None:
    assert held((2, 7), (3, 11), (4, 15), name="past").symbols == (("x", 0), ("past", 0))


def test_attributes_inside_tuples_vary() -> None:
    def half(x: Value, past: Value) -> Any:
        folded = reshape(x, shape=(1, x.shape[1] // 2, 2 * x.shape[2]))
        return concat([narrow(reshape(folded, shape=x.shape), dim=1, start=x.shape[1] - 1, length=1), past], dim=1)

    unified = unify([mixer(n, nodes=half) for n in (2, 6, 8, 10)])
    x = Dim.symbol("x", 1)
    wanted: tuple[Mapping[str, Attribute], ...] = (
        {"shape": (1, x // 2, 8)},
        {"shape": (1, x, 4)},
        {"dim": 1, "start": x - 1, "length": 1},
    )
    assert unified.attributes[:3] == wanted
    assert unified.at({("x", 1): 44}) == mixer(44, nodes=half)
    with pytest.raises(GraphError, match=r"is 7/2 at x\.1 = 7"):
        unified.at({("x", 1): 7})


def test_bindings_are_checked() -> None:
    unified = unify([mixer(2, text=4), mixer(6, text=12), mixer(9, text=18)])
    x: Symbol = ("x", 1)
    assert unified.symbols == (x,)
    assert unified.at({x: 5, ("text", 1): 10, ("weight", 0): 3}) == mixer(5, text=10)
    assert unified.bindings([(1, 5, 4), (1, 10, 4), (3, 4)]) == {x: 5}
    for bindings, why in [
        ({}, r"x\.1 is not given"),
        ({x: 5, ("text", 1): 11}, r"text\.1 is 11, but must be 2·x\.1, here 10"),
        ({x: 5, ("weight", 0): 4}, r"weight\.0 is 4, but must be 3$"),
        ({x: 0}, r"x\.1 is 0, but must be 1 at least"),
        ({x: 5, ("x", 3): 4}, r"no input dimension x\.3"),
        ({x: 5, ("y", 0): 4}, r"no input dimension y\.0"),
    ]:
        with pytest.raises(GraphError, match=why):
            unified.at(bindings)
    with pytest.raises(GraphError, match=r"2 shapes \[1, 5, 4\], \[1, 10, 4\], but its 3 inputs are %x \[1, x\.1, 4\]"):
        unified.bindings([(1, 5, 4), (1, 10, 4)])
    with pytest.raises(GraphError, match=r"text\.2 is 5, but must be 4"):
        unified.bindings([(1, 5, 4), (1, 10, 5), (3, 4)])


def test_what_two_samples_cannot_know_is_found_out_by_the_ops() -> None:
    """Where a wrong polynomial got through, the graph at an unseen size contradicts itself, and is refused."""
    unified = unify([mixer(2), mixer(6)])
    wrong = dataclasses.replace(unified, sizes={**unified.sizes, "0": (1, 3 * Dim.symbol("x", 1), 4)})
    with pytest.raises(GraphError, match=r"its op gives float32\[1,15,4\]"):
        wrong.at({("x", 1): 10})


def test_nan_and_signed_zero_are_themselves() -> None:
    def scaled(rows: int, value: float) -> Graph:
        graph = mixer(rows, nodes=lambda x, past: silu(x))
        return dataclasses.replace(
            graph, nodes=(dataclasses.replace(graph.nodes[0], attrs=(("v", value),)), graph.nodes[1])
        )

    assert unify([scaled(2, float("nan")), scaled(3, float("nan"))]).attributes[0].keys() == {"v"}
    with pytest.raises(GraphError, match=r"0\.0 in sample 0; -0\.0 in sample 1"):
        unify([scaled(2, 0.0), scaled(3, -0.0)])


# --- refusals --------------------------------------------------------------------------------------------------------


def test_one_graph_shows_nothing() -> None:
    with pytest.raises(GraphError, match="two or more sizes"):
        unify([mixer(2)])


def test_a_weight_of_several_shapes() -> None:
    with pytest.raises(GraphError, match=r"weight %weight has several shapes: \(3, 4\) in samples 0, 2; \(3, 8\) in"):
        unify([mixer(2), mixer(2, width=8), mixer(3)])


def test_another_op_or_operand_or_number_of_nodes() -> None:
    def turned(x: Value, past: Value) -> Any:
        return concat([past, x], dim=1)

    def more(x: Value, past: Value) -> Any:
        return silu(concat([x, past], dim=1))

    for nodes, why in [
        (turned, r"node 0 \(concat\) is .*concat\(\[input 0, input 1\]\).* in sample 0, but .*\[input 1, input 0\]"),
        (more, r"node 1 \(linear\) is .*in sample 0, but .*silu\(node 0\) .* in sample 2"),
    ]:
        with pytest.raises(GraphError, match=why):
            unify([mixer(2), mixer(3), mixer(5, nodes=nodes)])
    longer = dataclasses.replace(mixer(2), outputs=(*mixer(2).outputs, ("z", mixer(2).nodes[0].outputs[0])))
    for graphs in ([mixer(2), longer], [longer, mixer(2)]):
        with pytest.raises(GraphError, match=r"nothing"):
            unify(graphs)
    renamed = dataclasses.replace(mixer(3), outputs=(("z", mixer(3).outputs[0][1]),))
    with pytest.raises(GraphError, match=r"output 0 is y = node 1 in sample 0, but z = node 1 in sample 1"):
        unify([mixer(2), renamed])


def test_another_name_dtype_rate_or_rank_of_an_input() -> None:
    graph = mixer(3)
    for change, why in [
        ({"name": "z"}, r"input 0 is x: float32 of rank 3 @step in sample 0, but z: "),
        ({"type": TensorType((1, 3, 4), BF16)}, r"but x: bfloat16 of rank 3"),
        ({"rate": Rate.CHUNK}, r"but x: float32 of rank 3 @chunk"),
        ({"type": TensorType((3, 4), F32)}, r"but x: float32 of rank 2"),
    ]:
        x = dataclasses.replace(graph.inputs[0], **change)  # type: ignore[arg-type]
        nodes = tuple(node.renamed({"x": x}) for node in graph.nodes)
        other = Graph("mixer", (x, *graph.inputs[1:]), nodes, graph.outputs)
        with pytest.raises(GraphError, match=why):
            unify([mixer(2), other])


@pytest.mark.parametrize(
    ("attrs", "why"),
    [
        ({"axis": 1}, r"\{dim\} in sample 0, but .* \{axis, dim\} in sample 1"),
        ({"dim": 1.0}, r"node 0 \(concat\), dim differs in more than whole numbers: 1 in sample 0; 1\.0 in sample 1"),
        ({"dim": True}, r"1 in sample 0; True in sample 1"),
        ({"dim": (1,)}, r"1 in sample 0; \[1\] in sample 1"),
        ({"dim": None}, r"1 in sample 0; None in sample 1"),
    ],
)
def test_attributes_that_differ_in_more_than_numbers(attrs: dict[str, Attr], why: str) -> None:
    with pytest.raises(GraphError, match=why):
        unify([mixer(2), edited(mixer(3), "concat", **attrs)])


def test_tuples_of_another_length_texts_and_dtypes() -> None:
    for have, other in [((1, 2), (1, 2, 3)), ("a", "b"), (F32, BF16), ((1, 0.5), (1, 0.25)), (False, True)]:
        with pytest.raises(GraphError, match="differs in more than whole numbers"):
            unify([edited(mixer(n), "concat", dim=d) for n, d in ((2, have), (3, other))])  # type: ignore[arg-type]


def test_a_number_that_no_polynomial_gives() -> None:
    rows, seen = (2, 3, 4, 6), (8, 27, 64, 216)
    graphs = [edited(mixer(n), "concat", dim=d) for n, d in zip(rows, seen, strict=True)]
    why = r"node 0 \(concat\), dim: \[8, 27, 64, 216\] in the samples, no polynomial .* x\.1 = \[2, 3, 4, 6\]"
    with pytest.raises(GraphError, match=why):
        unify(graphs)


def test_sizes_that_do_not_decide_an_attribute() -> None:
    with pytest.raises(GraphError, match="no polynomial"):
        unify([edited(mixer(n), "concat", dim=d) for n, d in ((2, 0), (2, 1), (5, 0), (7, 0))])


def test_padding_is_seen() -> None:
    """Latents of 4 rows too few for a coarse patch are padded: other nodes, so another network."""
    with pytest.raises(GraphError, match="pad_replicate"):
        unify([denoiser("tiny", 2, 16, 16, 5, 1, True), denoiser("tiny", 2, 12, 16, 5, 1, True)])


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_sums_of_many_inputs(seed: int) -> None:
    """Rows of up to three inputs one behind another, in any order and as often as they like."""
    draw = random.Random(seed)
    order = [draw.randrange(3) for _ in range(4)]

    def make(*rows: int) -> Graph:
        with Builder("joined") as build:
            xs = [build.input(f"x{i}", (n, 2), F32, Rate.STEP) for i, n in enumerate(rows)]
            joined = concat([xs[i] for i in order], dim=0)
            build.output("y", add(joined, joined))
        return build.graph()

    shown = [tuple(draw.randrange(1, 99) for _ in range(3)) for _ in range(8)]
    assert_gives(unify([make(*rows) for rows in shown]), make(5, 11, 2))
