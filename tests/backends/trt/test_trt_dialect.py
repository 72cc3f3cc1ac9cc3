"""What TensorRT's parser wants beyond ONNX: fused attention, constant kernels, an older opset. Not run on a device."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import trt_acts
from trt_networks import STAGES, context, error, forwards, loaded, reference, step, tiny
from trt_rig import RecordedTrt, recorded

from helios.errors import UnsupportedNode
from helios.graph import Builder, Graph, Rate
from helios.lower import lower, plan_for
from helios.model.vae_run import decode_graphs
from helios.model.vae_split import Split
from helios.ops.attention import attention
from helios_trt import TrtBackend, dialect, units
from helios_trt.model import written
from helios_trt.units import Unit, units_of


def attends(head: int, dtype: torch.dtype) -> Graph:
    with Builder("attends") as build:
        q, k, v = (build.input(name, (1, 8, 2, head), dtype, Rate.STEP) for name in "qkv")
        build.output("y", attention(q, k, v))
    return build.graph()


def nodes(graph: Graph, *lacks: str) -> list[onnx.NodeProto]:
    model = onnx.load_from_string(written(Unit("x", (graph,), ()), lacks).data)
    return list(model.graph.node)


def attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {a.name: a.i for a in node.attribute}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head", "fused"), [(16, True), (128, True), (256, True), (12, False), (8, False), (264, False)]
)
def test_attention_in_16_bits_is_one_kernel_or_wide(head: int, fused: bool, dtype: torch.dtype) -> None:
    made = nodes(attends(head, dtype))
    (found,) = (node for node in made if node.op_type == "Attention")
    widened = [node for node in made if node.op_type == "Cast" and node.input[0] in "qkv"]
    assert (not widened) == fused
    # Fused, the scale is in the queries, which are rounded once: the parser would round queries and keys by its root.
    assert (onnx.helper.get_attribute_value(next(a for a in found.attribute if a.name == "scale")) == 1) == fused
    assert [node.op_type for node in made].count("Mul") == fused
    # Taken apart in 16 bits, scores would be rounded to 16 bits between product and softmax.
    assert attributes(found).get(dialect.DECOMPOSABLE, 0) == (not fused)


def test_scaled_queries_give_the_same_attention() -> None:
    """In float16, which ONNX Runtime computes; the published heads' scale is no power of two."""
    graph = attends(24, torch.float16)
    generator = torch.Generator().manual_seed(3)
    given = {name: torch.randn(1, 8, 2, 24, generator=generator).half() for name in "qkv"}
    with recorded(11):
        program = lower({"attends": graph}, RecordedTrt())
        program.load(tiny().transformer_weights)
        made = program.run("attends", given)["y"]
    truth = attention(*(x.double() for x in given.values()))
    assert error(made, truth) < 1e-3


def test_attention_in_float32_may_be_taken_apart() -> None:
    (found,) = (node for node in nodes(attends(128, torch.float32)) if node.op_type == "Attention")
    assert attributes(found)[dialect.DECOMPOSABLE] == 1


def test_older_opset_has_no_attention_and_wide_products() -> None:
    made = nodes(attends(128, torch.bfloat16), "Attention")
    assert "Attention" not in {node.op_type for node in made}
    assert [node.op_type for node in made].count("Cast") >= 3


def test_recorder_refuses_what_a_parser_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the marks the same graphs have no engine: so the tests that build with them say something."""
    monkeypatch.setattr("helios_trt.model.adapt", lambda model, lacks: None)
    with recorded(11):
        for graph in (attends(128, torch.float32), attends(12, torch.bfloat16)):
            with pytest.raises(UnsupportedNode, match="no fused kernel for attention"):
                lower({"attends": graph}, RecordedTrt()).load(tiny().transformer_weights)


def test_recorder_refuses_a_kernel_that_is_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "CONVOLUTIONS", ())
    with pytest.raises(UnsupportedNode, match="no initializer"), loaded(11, weights="inputs"):
        pass


@pytest.mark.parametrize("way", ["profiles", "inputs"])
def test_kernels_of_the_vae_are_initializers_of_their_shape(way: str) -> None:
    """Kernels of 1×k×k come as views of ones of k×k: at the same place in the file, in another shape."""
    size = {"batch": 1, "latents": 9, "height": 64, "width": 64}
    graphs = decode_graphs(tiny().vae, **size, dtype=torch.bfloat16, split=Split(9))
    plan = plan_for(graphs, TrtBackend())
    weights = {v.name for graph in plan.graphs.values() for v in graph.inputs_at(Rate.WEIGHTS)}
    reshaped = 0
    for unit in units_of(plan, weights, way):
        model = onnx.load_from_string(written(unit).data)
        known = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Conv":
                assert set(node.input[1:]) <= set(known)
                reshaped += node.input[1] not in weights
        assert len(known) == len(unit.baked)
    assert reshaped


@pytest.mark.parametrize(("lacks", "attention_as_one"), [("RMSNormalization", True), ("RotaryEmbedding", False)])
def test_parser_that_lacks_ops_gets_them_in_smaller_ones(
    lacks: str, attention_as_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(trt_acts.LACKS, lacks)
    with loaded(11, graphs="off") as found:
        assert found.backend.engines.lacks == (lacks,)
        here, wanted = context(found.program), context(reference())
        for entry in STAGES:
            made = found.program.run(entry, step(found.program, entry, 5), here)["velocity"]
            assert error(made, reference().run(entry, step(reference(), entry, 5), wanted)["velocity"]) < 1e-5
        (unit,) = (unit for unit in found.program.units if unit.name == "denoise.0")
        kinds = {node.op_type for node in onnx.load_from_string(written(unit, (lacks,)).data).graph.node}
        assert lacks not in kinds
        assert ("Attention" in kinds) == attention_as_one
        # Asked once: a second start reads the answer.
        again = RecordedTrt(graphs="off")
        before = len(found.strict.calls)
        assert again.engines.lacks == (lacks,)
        assert not [call for call, _ in found.strict.calls[before:] if call == "Builder"]


@pytest.mark.parametrize("text", ["{", '{"lacks": ["Everything"]}', '{"lacks": 3}', "[]"])
def test_answer_that_cannot_be_read_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with recorded(11):
        assert RecordedTrt().engines.lacks == ()
        (kept,) = (tmp_path / "helios" / "trt").glob("parser-*.lacks")
        kept.write_text(text)
        assert RecordedTrt().engines.lacks == ()
        assert RecordedTrt().engines.store.entries() == []  # it is no engine


def test_heads_of_the_published_size_are_fused() -> None:
    from helios.model import presets

    size = presets.size("14b").transformer
    assert size.attention_head_dim == 128
    assert forwards("bf16")  # those of tiny have 12 numbers, and are widened
    assert not all(map(dialect.fused_heads, forwards("bf16")["denoise.0"].nodes))
