"""Plans as sessions: the numbers of the reference, torch's memory on both sides, and what is counted."""

from __future__ import annotations

import dataclasses
import functools
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import onnxruntime
import pytest
import torch
from torch import Tensor

from helios.backend import ReferenceBackend
from helios.errors import BackendError, UnsupportedNode
from helios.graph import Builder, Graph, Node, Rate
from helios.lower import lower
from helios.model import presets
from helios.model.random_weights import RandomWeights
from helios.model.shapes import transformer_shapes
from helios.op import get
from helios.pipeline.denoise import Layout, denoise_graphs
from helios.pipeline.history import Window
from helios.program import Program
from helios_ort import OrtBackend, dialect, sessions
from helios_ort.pieces import in_pieces
from helios_ort.program import OrtProgram
from helios_ort.providers import Provider
from helios_ort.sessions import Misplaced, Refused, Session

F32 = torch.float32
SIZES, SAMPLING = presets.size("tiny"), presets.variant("distilled")
DENOISE = ("denoise.0", "denoise.1", "denoise.2")


@functools.cache
def graphs() -> dict[str, Graph]:
    layout = Layout(1, 16, 16, 8, Window())
    return denoise_graphs(SIZES.transformer, SAMPLING.scheduler, SAMPLING.pipeline, layout, F32)


def loaded(backend: Any, **options: Any) -> Any:
    program = lower(graphs(), backend, **options)
    program.load(RandomWeights(transformer_shapes(SIZES.transformer), seed=0))
    return program


@functools.cache
def reference() -> Program:
    return cast(Program, loaded(ReferenceBackend()))


def inputs(rate: Rate, entry: str = "denoise.2") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = sorted(graphs()[entry].inputs_at(rate), key=lambda v: v.name)
    return {v.name: torch.randn(v.shape, generator=generator) for v in values}


def context(program: Program) -> Any:
    return program.bind(inputs(Rate.PROMPT)) | program.bind(inputs(Rate.CHUNK))


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def one_node(name: str, *shapes: tuple[int, ...], rate: Rate = Rate.STEP) -> Graph:
    with Builder(name) as build:
        operands = [build.input(f"x{i}", shape, F32, rate) for i, shape in enumerate(shapes)]
        build.output("y", get(name)(*operands))
    return build.graph()


class Given:
    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


# --- numbers ---


@pytest.mark.parametrize("weights", ["shared", "packed"])
def test_every_graph_of_a_plan_is_the_references(weights: str) -> None:
    program = loaded(OrtBackend(weights=weights))
    contexts = context(program), context(reference())
    held = contexts[1].values
    assert contexts[0].values.keys() == held.keys()
    assert max(distance(contexts[0].values[name], held[name]) for name in held) < 1e-5
    for entry in graphs():
        given = inputs(Rate.STEP, entry)
        ours, theirs = program.run(entry, given, contexts[0]), reference().run(entry, given, contexts[1])
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name].shape, ours[name].dtype) == (tensor.shape, tensor.dtype)
            assert distance(ours[name], tensor) < 1e-5, (entry, name)


def test_all_nodes_are_counted_as_native() -> None:
    program = lower(graphs(), OrtBackend())
    nodes = [node for graph in program.plan.graphs.values() for node in graph.nodes if node.inputs]
    assert sum(native for _, native, *_ in program.coverage.rows()) == len(nodes)
    assert program.coverage.fallbacks == 0
    assert {name for name, *_ in program.coverage.rows()} == {node.op for node in nodes}


# --- memory ---


def test_shared_weights_are_read_where_torch_has_them() -> None:
    with Builder("main") as build:
        x = build.input("x", (2, 3, 8), F32, Rate.STEP)
        w = build.input("w", (5, 8), F32, Rate.WEIGHTS)
        build.output("y", get("linear")(x, w))
    program = lower({"main": build.graph()}, OrtBackend())
    program.load(Given(w=torch.randn(5, 8)))
    x_ = torch.randn(2, 3, 8)
    first = program.run("main", {"x": x_})["y"]
    assert torch.allclose(first, x_ @ program.weights["w"].T, atol=1e-5)
    program.weights["w"].zero_()
    assert not program.run("main", {"x": x_})["y"].any()
    assert first.any(), "an output was written to after it was returned"


def test_packed_weights_are_kept_by_the_sessions_alone_and_once_for_all_stages() -> None:
    program = loaded(OrtBackend(weights="packed"))
    assert isinstance(program, OrtProgram)
    assert len({id(program._sessions[f"{name}.0"].runs) for name in DENOISE}) == 1
    assert not {name for name in program.weights if name.endswith("weight")}
    assert {name for name in loaded(OrtBackend()).weights if name.endswith("weight")}


def test_outputs_are_nobodys_but_the_callers() -> None:
    program = loaded(OrtBackend())
    held = context(program)
    before = {name: tensor.clone() for name, tensor in held.values.items()}
    given = inputs(Rate.STEP)
    kept = {name: tensor.clone() for name, tensor in given.items()}
    first = program.run("denoise.2", given, held)["velocity"]
    copy = first.clone()
    other = program.run("denoise.2", {**given, "sample": given["sample"] + 1}, held)["velocity"]
    assert first.data_ptr() != other.data_ptr()
    assert torch.equal(first, copy)
    assert not torch.equal(first, other)
    assert all(torch.equal(given[name], kept[name]) for name in given)
    assert all(torch.equal(held.values[name], before[name]) for name in before)


def test_strided_and_misaligned_inputs() -> None:
    program = lower({"main": one_node("silu", (3, 4))}, OrtBackend())
    program.load(Given())
    for x in (
        torch.randn(4, 3).T,
        torch.randn(3, 8)[:, ::2],
        torch.randn(13)[1:].view(3, 4),
        torch.randn(4).expand(3, 4),
    ):
        assert torch.allclose(program.run("main", {"x0": x})["y"], torch.nn.functional.silu(x), atol=1e-6)


def test_an_input_that_is_an_output_is_passed_on() -> None:
    with Builder("main") as build:
        x = build.input("x", (4,), F32, Rate.STEP)
        y = get("silu")(x)
        for name, value in (("same", x), ("y", y), ("again", y)):
            build.output(name, value)
    program = lower({"main": build.graph()}, OrtBackend())
    program.load(Given())
    given = torch.randn(4)
    out = program.run("main", {"x": given})
    assert list(out) == ["same", "y", "again"]
    assert torch.equal(out["same"], given)
    assert torch.equal(out["y"], out["again"])


# --- sessions ---


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the graphs for which sessions are built from here on; none is kept from before."""
    names: list[str] = []
    real = sessions.build

    def build(graph: Any, *args: Any, **kwargs: Any) -> Session:
        names.append(graph.name)
        return real(graph, *args, **kwargs)

    monkeypatch.setattr(sessions, "build", build)
    monkeypatch.setattr(sessions, "_recent", type(sessions._recent)())
    monkeypatch.setattr(sessions, "_alive", type(sessions._alive)())
    return names


def test_a_plan_that_is_compiled_again_builds_no_session(built: list[str]) -> None:
    lower(graphs(), OrtBackend())
    assert sorted(built) == sorted(f"{name}.0" for name in (*graphs(), "weights", "prompt", "chunk"))
    lower(graphs(), OrtBackend())
    assert len(built) == len(set(built))


def test_another_number_of_threads_is_another_session(built: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in (1, 2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        program = cast(Any, lower({"main": one_node("silu", (2,))}, OrtBackend()))
        session = program._sessions["main.0"]
        assert session.runs.get_session_options().intra_op_num_threads == threads
    assert len(built) == 2


def test_only_so_many_sessions_are_kept(built: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "KEPT", 2)
    for size in (1, 2, 3, 3, 1):
        lower({"main": one_node("silu", (size,))}, OrtBackend())
    assert len(built) == 4
    assert len(sessions._recent) == 2


def test_sessions_beyond_the_cpu_live_as_long_as_a_program_has_them(
    built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "CPU", "OtherExecutionProvider")
    first = lower({"main": one_node("silu", (7,))}, OrtBackend())
    lower({"main": one_node("silu", (7,))}, OrtBackend())
    assert len(built) == 1
    del first
    gc.collect()
    lower({"main": one_node("silu", (7,))}, OrtBackend())
    assert len(built) == 2


# --- nodes that do not run ---


class NoGelu(OrtBackend):
    def supports(self, node: Node) -> str | None:
        return "no kernel for it" if node.op == "gelu" else super().supports(node)


def test_one_op_by_its_body_and_the_rest_in_sessions() -> None:
    with pytest.raises(UnsupportedNode, match=r"backend 'ort' cannot run: .* = gelu\(.*\n  reason: no kernel for it"):
        lower(graphs(), NoGelu())
    program = loaded(NoGelu(), fallback="reference")
    rows = {name: (native, fused, fallback, why) for name, native, fused, fallback, why in program.coverage.rows()}
    assert rows["gelu"] == (0, 0, program.coverage.fallbacks, "no kernel for it")
    assert rows["linear"][0] > 0
    assert program.coverage.fallbacks > 0
    given = inputs(Rate.STEP)
    ours = program.run("denoise.2", given, context(program))["velocity"]
    theirs = reference().run("denoise.2", given, context(reference()))["velocity"]
    assert distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("weights", ["shared", "packed"])
def test_pieces_take_weights_both_ways(weights: str) -> None:
    program = loaded(NoGelu(weights=weights), fallback="reference")
    given = inputs(Rate.STEP)
    ours = program.run("denoise.0", inputs(Rate.STEP, "denoise.0"), context(program))["velocity"]
    theirs = reference().run("denoise.0", inputs(Rate.STEP, "denoise.0"), context(reference()))["velocity"]
    assert given
    assert distance(ours, theirs) < 1e-5


def test_a_graph_is_cut_where_it_must_be_and_nowhere_else() -> None:
    with Builder("main") as build:
        x = build.input("x", (4,), F32, Rate.STEP)
        a = get("silu")(x)
        b = get("gelu")(a)
        c = get("add")(get("full")(shape=(4,), value=1.0, dtype=F32), b)
        build.output("y", get("add")(c, a))
    pieces = in_pieces(build.graph(), lambda node: node.op != "gelu")
    assert [(piece.native, [node.op for node in piece.graph.nodes]) for piece in pieces] == [
        (True, ["silu"]),
        (False, ["gelu", "full"]),
        (True, ["add", "add"]),
    ]
    assert [[v.name for v in piece.graph.inputs] for piece in pieces] == [["x"], ["0"], ["2", "1", "0"]]
    assert [[name for name, _ in piece.graph.outputs] for piece in pieces] == [["0"], ["1", "2"], ["4"]]
    (whole,) = in_pieces(build.graph(), lambda node: True)
    assert whole.native


def moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ONNX Runtime had given one node to another provider when it optimised the whole graph."""
    real = sessions.kept

    def kept(graph: Graph, provider: Any) -> Session:
        session = real(graph, provider)
        found = [Misplaced(node, "Sigmoid", "OtherExecutionProvider") for node in graph.nodes if node.op == "silu"]
        return dataclasses.replace(session, misplaced=tuple(found))

    monkeypatch.setattr("helios_ort.program.kept", kept)


def test_a_node_that_the_whole_graph_moved_is_an_error_with_its_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    moved(monkeypatch)
    with pytest.raises(UnsupportedNode) as caught:
        lower({"main": one_node("silu", (2, 3))}, OrtBackend())
    assert "cannot run: %0: float32[2,3] = silu(%x0)" in caught.value.why
    assert "gives Sigmoid to OtherExecutionProvider, not to CPUExecutionProvider" in caught.value.why
    program = lower({"main": one_node("silu", (2, 3))}, OrtBackend(), fallback="reference")
    assert program.coverage.rows() == [
        ("silu", 0, 0, 1, "ONNX Runtime gives Sigmoid to OtherExecutionProvider, not to CPUExecutionProvider")
    ]


def test_where_nodes_run_is_what_onnx_runtime_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of ONNX nodes lead back to those of Helios, also behind a fusion of ONNX Runtime's."""
    graph = one_node("silu", (2, 3))
    (node,) = graph.nodes
    parts = [
        SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: [SimpleNamespace(name="0", op_type="Mul")]),
        SimpleNamespace(
            ep_name="OtherExecutionProvider",
            get_nodes=lambda: [
                SimpleNamespace(name="0.1/Fused", op_type="QuickGelu"),
                SimpleNamespace(name="made_up", op_type="Cast"),
            ],
        ),
    ]
    session = SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)
    found = sessions._misplaced(session, graph.nodes, OrtBackend().provider)
    assert found == (
        Misplaced(node, "QuickGelu", "OtherExecutionProvider"),
        Misplaced(None, "Cast", "OtherExecutionProvider"),
    )


def test_support_is_asked_of_large_shapes_for_nothing() -> None:
    """Nothing is allocated: these operands would take 37 GB."""
    backend = OrtBackend()
    node = one_node("linear", (1, 1_000_000, 5120), (5120, 5120)).nodes[0]
    assert backend.supports(node) is None
    assert backend.supports(dataclasses.replace(node, op="quantize_rows")) == "quantize_rows has no form in ONNX"


def test_a_graph_that_onnx_runtime_refuses_is_told_in_its_words() -> None:
    with Builder("main") as build:
        x = build.input("x", (2, 4), torch.bfloat16, Rate.STEP)
        build.output("y", get("linear")(x, build.input("w", (4, 4), torch.bfloat16, Rate.WEIGHTS)))
    with pytest.raises(Refused, match=r"^NOT_IMPLEMENTED: Could not find an implementation for Gemm"):
        sessions.build(build.graph(), OrtBackend().provider)
    with pytest.raises(UnsupportedNode, match="NOT_IMPLEMENTED: Could not find an implementation for Gemm"):
        lower({"main": build.graph()}, OrtBackend())


def test_a_run_that_fails_is_an_error_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    program = lower({"main": one_node("silu", (2, 3))}, OrtBackend())
    program.load(Given())

    def fail(*_: Any) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", fail)
    with pytest.raises(BackendError, match="ONNX Runtime failed: RUNTIME_EXCEPTION: Failed to allocate memory"):
        program.run("main", {"x0": torch.ones(2, 3)})


# --- what a run keeps ---


def test_the_plan_of_a_run_is_followed_or_refused() -> None:
    backend = OrtBackend()
    plan = backend.execution_plan()
    assert plan["onnxruntime"] == onnxruntime.__version__
    assert plan["threads"] == torch.get_num_threads()
    backend.use_execution_plan(plan)
    with pytest.raises(BackendError, match=r"begun with onnxruntime '1\.20\.0', and here it would be"):
        backend.use_execution_plan({**plan, "onnxruntime": "1.20.0"})
    with pytest.raises(BackendError, match="OMP_NUM_THREADS"):
        backend.use_execution_plan({**plan, "threads": 99})


def test_a_graph_that_is_refused_though_its_nodes_are_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Session:
        raise Refused("FAIL: the whole is too much")

    monkeypatch.setattr("helios_ort.program.kept", refuse)
    with pytest.raises(BackendError, match=r"graph 'main\.0', but not all of them together: FAIL: the whole is"):
        lower({"main": one_node("silu", (2, 3))}, OrtBackend())


def test_a_node_of_several_that_moved_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sessions.kept

    def kept(graph: Graph, provider: Any) -> Session:
        found = tuple(Misplaced(graph.nodes[0], kind, "OtherExecutionProvider") for kind in ("Sigmoid", "Mul"))
        return dataclasses.replace(real(graph, provider), misplaced=found)

    monkeypatch.setattr("helios_ort.program.kept", kept)
    program = lower({"main": one_node("silu", (2, 3))}, OrtBackend(), fallback="reference")
    assert program.coverage.fallbacks == 1


# --- attention ---


def peak_of(program: Program, given: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The output of a run, and the bytes by which the process grew at its highest."""
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten

    def told(name: str) -> int:
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith(name))

    before = told("VmRSS")
    out = program.run("main", given)["y"]
    return out, told("VmHWM") - before


def test_attention_of_many_tokens_is_cut_by_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, heads = 1536, 5
    shape = (1, tokens, heads, 16)
    given = {f"x{i}": torch.randn(shape) for i in range(3)}
    scores = 4 * tokens * tokens
    monkeypatch.setattr(dialect, "SCORES", 2 * scores)
    graph = one_node("attention", shape, shape, shape)
    program = cast(Any, lower({"main": graph}, OrtBackend()))
    program.load(Given())
    kinds = [n.op_type for part in parts_of(program) for n in part.get_nodes()]
    assert kinds.count("Attention") == 3
    out, peak = peak_of(program, given)
    expected = get("attention").fn(*(x.double() for x in given.values()))
    assert distance(out, expected) < 1e-6
    assert peak < 4 * scores, "the scores of all heads were made at once"


def parts_of(program: Any) -> Any:
    return program._sessions["main.0"].runs.get_provider_graph_assignment_info()


def test_attention_of_few_tokens_is_one_node_and_others_than_the_cpu_get_it_whole() -> None:
    from helios.export.forms import FORMS

    program = lower({"main": one_node("attention", *[(1, 64, 5, 16)] * 3)}, OrtBackend())
    kinds = [n.op_type for part in parts_of(program) for n in part.get_nodes()]
    assert kinds.count("Attention") == 1
    assert dialect.forms(Provider("CUDAExecutionProvider")) is FORMS


def test_tensors_without_elements_are_bound_like_others() -> None:
    with Builder("empty") as build:
        x = build.input("x", (1, 4, 8), F32, Rate.STEP)
        nothing = build.input("nothing", (1, 0, 8), F32, Rate.STEP)
        build.output("whole", get("concat")([x, nothing], dim=1))
        build.output("none", get("narrow")(x, dim=1, start=0, length=0))
    program = lower({"empty": build.graph()}, OrtBackend())
    program.load(SimpleNamespace(read=lambda name: torch.zeros(0)))
    made = program.run("empty", {"x": torch.ones(1, 4, 8), "nothing": torch.ones(1, 0, 8)})
    assert torch.equal(made["whole"], torch.ones(1, 4, 8))
    assert made["none"].shape == (1, 0, 8)
