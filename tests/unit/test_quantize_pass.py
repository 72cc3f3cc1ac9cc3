"""Which products each precision quantises, where their operands are quantised, and what a backend makes of it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re

import pytest
import torch

from helios import op
from helios.backend import ReferenceBackend
from helios.fit.costs import Setting, stage_graphs, stage_shape
from helios.graph import Builder, Graph, Node, Rate
from helios.lower import plan_for
from helios.model import presets
from helios.model.transformer import denoise_graph
from helios.ops.linear import linear
from helios.ops.quantize import E4M3
from helios.passes import Plan, fuse, quantize
from helios.precision import PRECISIONS

QUANTISED = ("fp8", "fp8-attention", "fp8-weights")
E4M3_PRODUCTS = ("fp8", "fp8-attention")
LAYERS = {"tiny": 2, "mini": 4, "14b": 40}
IN_A_BLOCK = {
    *(f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")),
    *("ffn.net.0.proj", "ffn.net.2"),
}
_WEIGHT = re.compile(r"blocks\.(\d+)\.(.+)\.weight")


def setting(size: str, precision: str = "bf16") -> Setting:
    chosen = presets.size(size), presets.variant("distilled")
    return Setting(*chosen, 64, 64, text_tokens=8, precision=PRECISIONS[precision])


@functools.cache
def source(size: str) -> Graph:
    asked = setting(size)
    return denoise_graph(asked.size.transformer, stage_shape(asked, 0), dtype=torch.bfloat16, name="stage0")


@functools.cache
def written(size: str, precision: str) -> Graph:
    graph, changed = quantize(source(size), PRECISIONS[precision])
    assert changed
    return graph


def makers(graph: Graph) -> dict[str, Node]:
    return {value.name: node for node in graph.nodes for value in node.outputs}


def weight_of(node: Node, made: dict[str, Node]) -> str:
    """The name of the weight that a product multiplies with, through what was made of it."""
    (name,) = {v.name for v in node.values[1:] if v.rate == Rate.WEIGHTS and v.name.endswith(".weight")} or {""}
    if name:
        return name
    packed = next(made[v.name] for v in node.values if v.rate == Rate.WEIGHTS and v.name in made)
    return packed.values[0].name if packed.op == "quantize_rows" else made[packed.values[0].name].values[0].name


def quantised_products(graph: Graph) -> set[tuple[int, str]]:
    """Block and part of the products with a quantised weight."""
    made = makers(graph)
    found = set()
    for node in graph.nodes:
        if node.op == "scaled_linear" or (node.op == "linear" and node.values[1].name in made):
            match = _WEIGHT.fullmatch(weight_of(node, made))
            assert match is not None, f"{node}: of no block"
            found.add((int(match[1]), match[2]))
    return found


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("size", LAYERS)
def test_all_products_of_the_blocks_but_the_first_and_last(size: str, precision: str) -> None:
    layers = LAYERS[size]
    inside = range(layers) if layers == 2 else range(1, layers - 1)
    graph = written(size, precision)
    assert quantised_products(graph) == {(i, part) for i in inside for part in IN_A_BLOCK}
    count = collections.Counter(node.op for node in graph.nodes)
    before = collections.Counter(node.op for node in source(size).nodes)
    assert count["linear"] + count["scaled_linear"] == before["linear"]
    assert count["scaled_linear"] == (len(inside) * 10 if precision in E4M3_PRODUCTS else 0)


def test_one_block_more_than_is_kept_is_quantised() -> None:
    """Of three blocks the middle one; of two both, as none would be left."""
    for layers, wanted in ((1, {0}), (2, {0, 1}), (3, {1}), (5, {1, 2, 3})):
        asked = setting("tiny")
        config = dataclasses.replace(asked.size.transformer, num_layers=layers)
        graph = denoise_graph(config, stage_shape(asked, 0), dtype=torch.bfloat16)
        quantised, _ = quantize(graph, PRECISIONS["fp8"])
        assert {block for block, _ in quantised_products(quantised)} == wanted


@pytest.mark.parametrize("size", ["tiny", "mini"])
def test_self_attention_only_where_asked(size: str) -> None:
    layers = LAYERS[size]
    inside = layers if layers == 2 else layers - 2
    for precision, scaled in (("fp8", 0), ("fp8-attention", inside), ("fp8-weights", 0)):
        count = collections.Counter(node.op for node in written(size, precision).nodes)
        assert count["scaled_attention"] == scaled
        assert count["scaled_attention"] + count["attention"] == 2 * layers
    graph = written(size, "fp8-attention")
    made = makers(graph)
    for node in graph.nodes:
        if node.op == "scaled_attention":
            assert [made[v.name].op for v in node.values] == ["quantize_rows"] * 6
            assert node.values[2].shape[1] != 8, "keys of the text"
            assert dict(node.attrs)["dtype"] == torch.bfloat16


@pytest.mark.parametrize("precision", E4M3_PRODUCTS)
@pytest.mark.parametrize("size", ["tiny", "mini"])
def test_an_activation_is_quantised_once_and_right_behind_its_producer(size: str, precision: str) -> None:
    graph = written(size, precision)
    place = {value.name: at for at, node in enumerate(graph.nodes) for value in node.outputs}
    seen: collections.Counter[str] = collections.Counter()
    for at, node in enumerate(graph.nodes):
        if node.op != "quantize_rows" or node.values[0].rate == Rate.WEIGHTS:
            continue
        (x,) = node.values
        seen[x.name] += 1
        if len(x.shape) == 3:  # of a product; queries, keys and values are quantised where they meet
            between = graph.nodes[place[x.name] + 1 : at]
            assert {n.op for n in between} <= {"quantize_rows"}
            assert {n.values[0].name for n in between} <= {v.name for v in graph.nodes[place[x.name]].outputs}
    assert seen
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_weight_is_quantised_right_before_its_product(precision: str) -> None:
    graph = written("mini", precision)
    widened = precision == "fp8-weights"
    for at, node in enumerate(graph.nodes):
        if node.op == "quantize_rows" and node.values[0].rate == Rate.WEIGHTS:
            after = [n.op for n in graph.nodes[at + 1 : at + 3]]
            assert after[: 1 + widened] == (["dequantize_rows", "linear"] if widened else ["scaled_linear"])
            numbers, scale = node.outputs
            assert (numbers.dtype, scale.dtype) == (E4M3, torch.float32)
            assert (numbers.shape, scale.shape) == (node.values[0].shape, (node.values[0].shape[0], 1))


@pytest.mark.parametrize("precision", E4M3_PRODUCTS)
def test_the_text_is_quantised_once_for_the_keys_and_values_of_all_blocks(precision: str) -> None:
    graph = written("mini", precision)
    made = makers(graph)
    rows = {
        node.values[0].name
        for node in graph.nodes
        if node.op == "scaled_linear" and re.search(r"attn2\.to_[kv]\.", weight_of(node, made))
    }
    assert len(rows) == 1
    text = made[made[rows.pop()].values[0].name]
    assert text.outputs[0].rate == Rate.PROMPT
    assert text.values[1].name == "condition_embedder.text_embedder.linear_2.weight"


@pytest.mark.parametrize("size", ["tiny", "mini"])
@pytest.mark.parametrize("precision", QUANTISED)
def test_nothing_else_changes(size: str, precision: str) -> None:
    """Every other node is there as often as before, and inputs and outputs have their names and types."""
    old, new = source(size), written(size, precision)
    assert new.inputs == old.inputs
    assert [(name, value.type) for name, value in new.outputs] == [(name, value.type) for name, value in old.outputs]
    mine = {"linear", "attention", "quantize_rows", "dequantize_rows", "scaled_linear", "scaled_attention"}
    kept = [collections.Counter(n.op for n in graph.nodes if n.op not in mine) for graph in (old, new)]
    assert kept[0] == kept[1]
    op.verify(new)


def test_what_has_no_blocks_or_is_not_quantised_is_handed_back() -> None:
    with Builder("plain") as build:
        x = build.input("x", (2, 8), torch.bfloat16, Rate.STEP)
        weight = build.input("proj_out.weight", (4, 8), torch.bfloat16, Rate.WEIGHTS)
        build.output("y", linear(x, weight, None))
    plain = build.graph()
    for precision in QUANTISED:
        graph, changed = quantize(plain, PRECISIONS[precision])
        assert graph is plain
        assert not changed
    graph, changed = quantize(source("tiny"), PRECISIONS["bf16"])
    assert graph is source("tiny")
    assert not changed


def test_the_result_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Graph] = []
    monkeypatch.setattr(op, "verify", checked.append)
    graph, _ = quantize(source("tiny"), PRECISIONS["fp8"])
    assert checked == [graph]


# --- the plan ---


class All(ReferenceBackend):
    """A backend that wants every fused op."""

    fusions = tuple(name for name in op.names() if op.get(name).kind == "fused")


def plan(size: str, precision: str, backend: ReferenceBackend) -> Plan:
    return plan_for(stage_graphs(setting(size, precision), [0]), backend)


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("size", ["tiny", "mini"])
def test_quantised_weights_are_held_and_the_originals_read_by_nobody_later(size: str, precision: str) -> None:
    made = plan(size, precision, ReferenceBackend())
    wanted = {f"blocks.{block}.{part}.weight" for block, part in quantised_products(written(size, precision))}
    load = made.phases[Rate.WEIGHTS]
    assert wanted <= {v.name for v in load.inputs}
    held = [value.type for _, value in load.outputs]
    assert sum(t.dtype == E4M3 for t in held) == len(wanted)
    assert sum(t.dtype == torch.float32 and t.shape[-1] == 1 for t in held) == len(wanted)
    assert not [node for node in load.nodes if node.op == "dequantize_rows"], "held wide it would be held in vain"
    for name, graph in made.graphs.items():
        if name != Rate.WEIGHTS.label:
            assert not wanted & {v.name for v in graph.inputs}, name


@pytest.mark.parametrize("size", ["tiny", "mini"])
@pytest.mark.parametrize("precision", QUANTISED)
def test_what_a_backend_with_every_fused_op_is_left_with(size: str, precision: str) -> None:
    """No product and no attention in core ops; rows are quantised by themselves only behind what fuses with nothing."""
    made = plan(size, precision, All())
    nodes = [node for graph in made.graphs.values() for node in graph.nodes]
    left = {node.op for node in nodes}
    assert not left & {"scaled_linear", "scaled_attention", "dequantize_rows"}
    assert ("packed_linear" in left) == (precision == "fp8-weights")
    assert ("quantized_attention" in left) == (precision == "fp8-attention")
    by = {v.name: node.op for node in nodes for v in node.outputs}
    alone = collections.Counter(by[node.values[0].name] for node in nodes if node.op == "quantize_rows")
    blocks = 2
    # Heads that are joined after an attention, twice a block; the text, once.
    wanted = {"reshape": 2 * blocks, "linear": 1}
    if size == "tiny":  # its last block is quantised, too: its queries are of fewer tokens than its keys
        wanted |= {"gated_add_adaln": 1, "narrow": 1}
    assert alone == ({} if precision == "fp8-weights" else wanted)


def test_a_fused_op_that_is_refused_stays_written_out() -> None:
    graph = written("tiny", "fp8")
    fused, _ = fuse(graph, All.fusions, lambda node: "no" if node.op == "quantized_linear" else None)
    count = collections.Counter(node.op for node in fused.nodes)
    assert count["quantized_linear"] == 0
    assert count["scaled_linear"] > 0
    assert count["gelu_quantize"] == 2
