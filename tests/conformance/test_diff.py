"""``helios diff``: a wrong node is found where it is wrong, in a program of kernels and in one that runs whole."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helios import op
from helios.backend import Backend, Kernel, ReferenceBackend, select
from helios.cli.app import main
from helios.cli.options import setting
from helios.errors import HeliosError, InputError
from helios.fit.costs import stage_graphs
from helios.graph import Builder, Rate
from helios.kernel_program import KernelProgram
from helios.lower import compile_kernels
from helios.passes import Plan
from helios.program import Coverage, Program
from helios_conformance import diff
from helios_conformance.cuts import cuts, prefix, segment
from helios_conformance.diff import compare, examine, walk
from helios_conformance.draws import Root
from helios_conformance.replay import Drawn, Subject
from helios_conformance.session import Session

REFERENCE = ReferenceBackend()


def session(backend: Backend) -> Session:
    return Session(backend, Root(0))


@cache
def subject(precision: str = "fp32") -> Subject:
    """One forward of the last stage, in the ops that the opset calls core."""
    asked = setting("tiny", "distilled", 64, 64, precision, text_tokens=16)
    (graph,) = stage_graphs(asked, [2]).values()
    return Subject(diff._core(graph), Drawn(graph, Root(0)))


class Wrong(ReferenceBackend):
    """The reference with some kernels replaced."""

    def __init__(self, wrong: Mapping[str, Callable[..., Any]], fusions: Iterable[str] = ()) -> None:
        super().__init__()
        self.wrong, self.fusions = wrong, tuple(fusions)
        self.kernels = {**ReferenceBackend().kernels, **{name: Kernel(run) for name, run in wrong.items()}}

    @property
    def label(self) -> str:
        return "wrong"


def body(name: str) -> Callable[..., Any]:
    run: Callable[..., Any] = op.get(name).fn
    return run


def erf_gelu(x: Tensor, **_: Any) -> Tensor:
    return torch.nn.functional.gelu(x)


def without_bias_of(name: str, precision: str = "fp32") -> Callable[..., Any]:
    """A linear that forgets the bias in one layer only."""
    forgotten = subject(precision).read(name)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, **attrs: Any) -> Any:
        if bias is not None and bias.shape == forgotten.shape and torch.equal(bias, forgotten):
            bias = torch.zeros_like(bias)
        return body("linear")(x, weight, bias, **attrs)

    return linear


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", ["cpu", "reference"])
def test_right_backends_have_no_finding(spec: str, precision: str) -> None:
    came = compare(subject(precision), session(select(spec)), session(REFERENCE))
    assert came.findings == []
    assert came.sides[0].kind == "kernels"
    assert came.apart["output velocity"] < {"fp32": 1e-5, "bf16": 5e-2}[precision]
    if spec == "cpu":
        assert came.sides[0].places > 50
        assert len(came.apart) > 50


def test_a_wrong_kernel_is_named_at_its_first_node() -> None:
    side = examine(subject(), session(Wrong({"gelu": erf_gelu})))
    first = next(node for node in subject().graph.nodes if node.op == "gelu")
    assert side.finding is not None
    assert side.finding.where == str(first)
    assert "o0: norm of the error" in side.finding.reasons[0]


@pytest.mark.parametrize(
    "layer", ["blocks.1.attn1.to_k", "blocks.0.ffn.net.2", "condition_embedder.text_embedder.linear_2"]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_wrong_layer_among_right_ones_is_named_exactly(layer: str, precision: str) -> None:
    wrong = Wrong({"linear": without_bias_of(f"{layer}.bias", precision)})
    came = compare(subject(precision), session(wrong), session(REFERENCE))
    (finding,) = came.findings
    assert finding.label == "wrong"
    assert f"%{layer}.weight" in finding.where
    assert " = linear(" in finding.where
    assert finding.block == (layer[:8] if layer.startswith("blocks") else "")


def test_a_wrong_fused_kernel_is_named_as_the_backend_runs_it() -> None:
    def adaln(*operands: Any, **attrs: Any) -> Any:
        return body("adaln")(*operands, **attrs) * 1.01

    side = examine(subject(), session(Wrong({"adaln": adaln}, ["adaln"])))
    assert side.finding is not None
    assert " = adaln(" in side.finding.where
    assert side.finding.block == "blocks.0"


def test_an_output_of_another_dtype_is_a_finding() -> None:
    wide = Wrong({"unpatchify": lambda x, **attrs: body("unpatchify")(x, **attrs).float()})
    side = examine(subject("bf16"), session(wide))
    assert side.finding is not None
    assert "torch.float32" in side.finding.reasons[0]


def test_a_kernel_that_raises_is_named() -> None:
    forgotten = subject().read("blocks.1.attn2.to_v.bias")

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, **attrs: Any) -> Any:
        if bias is not None and bias.shape == forgotten.shape and torch.equal(bias, forgotten):
            raise RuntimeError("no such tile")
        return body("linear")(x, weight, bias, **attrs)

    came = compare(subject(), session(Wrong({"linear": linear})), session(REFERENCE))
    (finding,) = came.findings
    assert "%blocks.1.attn2.to_v.weight" in finding.where
    assert (finding.block, list(finding.reasons)) == ("blocks.1", ["it raised RuntimeError: no such tile"])
    assert examine(finding.subject, session(REFERENCE)).finding is None


def test_data_movement_must_be_exact() -> None:
    def split(x: Tensor, **attrs: Any) -> Tensor:
        moved: Tensor = body("split_heads")(x, **attrs).clone()
        moved.view(-1)[-1] += 1e-6
        return moved

    side = examine(subject(), session(Wrong({"split_heads": split})))
    assert side.finding is not None
    assert side.finding.reasons == ["o0: data movement must be exact, and is not"]


def test_windows_of_inner_values_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = session(Wrong({"linear": without_bias_of("blocks.1.attn1.to_k.bias")}))
    at_once = examine(subject(), wrong).finding
    monkeypatch.setattr(diff, "_WINDOW", 200_000)
    assert len(list(diff._windows(subject().graph.nodes))) > 5
    piecewise = examine(subject(), wrong).finding
    assert at_once is not None
    assert piecewise is not None
    assert piecewise.where == at_once.where


class Whole(Program):
    """Runs graphs in one piece; ``spoil`` is what it does to the result of each node."""

    def __init__(self, plan: Plan, backend: Engine) -> None:
        super().__init__(plan, backend, Coverage())
        self.spoil = backend.spoil

    def evaluate(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        env: dict[str, Any] = dict(inputs)
        for node in self.plan.graphs[graph].nodes:
            operands = [[env[v.name] for v in x] if isinstance(x, tuple) else x and env[x.name] for x in node.inputs]
            result = self.spoil(node, body(node.op)(*operands, **node.attributes))
            results = result if isinstance(result, tuple) else (result,)
            env.update(zip((v.name for v in node.outputs), results, strict=True))
        return {name: env[value.name] for name, value in self.plan.graphs[graph].outputs}


class Engine(Backend):
    name = "engine"

    def __init__(self, spoil: Callable[[Any, Any], Any] = lambda node, result: result) -> None:
        super().__init__()
        self.spoil = spoil
        self.compiled = 0

    def supports(self, node: Any) -> str | None:
        return None

    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        self.compiled += 1
        return Whole(plan, self)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_right_engine_has_no_finding(precision: str) -> None:
    side = examine(subject(precision), session(Engine()))
    assert (side.kind, side.finding) == ("engine", None)
    assert side.places > 5


@pytest.mark.parametrize("layer", ["blocks.0.attn1.to_out.0", "blocks.1.attn2.to_v", "blocks.1.ffn.net.2", "proj_out"])
def test_an_engine_is_bisected_to_its_block(layer: str) -> None:
    def spoil(node: Any, result: Any) -> Any:
        return result * 1.01 if any(v.name == f"{layer}.weight" for v in node.values) else result

    engine = Engine(spoil)
    side = examine(subject(), session(engine))
    assert side.finding is not None
    assert any(v.name == f"{layer}.weight" for v in side.finding.subject.graph.inputs), "the part holds the layer"
    assert len(side.finding.subject.graph.nodes) < len(subject().graph.nodes) / 2
    assert side.finding.reasons
    assert "grown" not in side.finding.note
    if layer.startswith("blocks"):
        assert side.finding.block == layer[:8]
    assert engine.compiled < 10, "bisected, not run cut by cut"


class Shy(KernelProgram):
    """Wrong only where nobody looks at its inner values."""

    def evaluate(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        out = super().evaluate(graph, inputs)
        alone = len(self.plan.graphs[graph].outputs) == 1 and any(
            n.op == "unpatchify" for n in self.plan.graphs[graph].nodes
        )
        return {name: x * 1.01 for name, x in out.items()} if alone else out


class ShyBackend(ReferenceBackend):
    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        return compile_kernels(plan, self, fallback=fallback, program=Shy)


def test_a_program_that_changes_under_observation_is_bisected() -> None:
    side = examine(subject(), session(ShyBackend()))
    assert side.finding is not None
    assert "another result when its inner values are read" in side.finding.note
    assert "to its outputs" in side.finding.where


def test_prefix_and_segment_make_the_whole() -> None:
    graph, read = subject().graph, subject()
    found = cuts(graph)
    assert [c.block for c in found][-1] == ""  # the head
    assert len([c for c in found if c.block == "blocks.0"]) == 3
    wanted = {v.name for _, v in graph.outputs}
    (whole,) = walk(read, wanted, wide=True).values()
    for cut in found[1::2]:
        (middle,) = walk(Subject(prefix(graph, cut), read.source), {cut.value.name}, wide=True).values()
        rest = segment(graph, cut, None)
        tensors = {v.name: read.read(v.name) for v in rest.inputs if v.name != cut.value.name}
        tensors[cut.value.name] = middle

        class Exact:
            def read(self, name: str, tensors: dict[str, Tensor] = tensors) -> Tensor:
                return tensors[name]

        # Rounded to float32 where it was cut, so the two agree to that.
        (again,) = walk(Subject(rest, Exact()), wanted, wide=True).values()
        assert (again - whole).norm() < 1e-5 * whole.norm()


def test_what_is_saved_shows_the_same_again(tmp_path: Path) -> None:
    wrong = session(Wrong({"linear": without_bias_of("blocks.1.attn1.to_k.bias")}))
    finding = examine(subject(), wrong).finding
    assert finding is not None
    finding.subject.save(tmp_path / "d", {"where": finding.where})
    again = examine(Subject.load(tmp_path / "d"), wrong).finding
    assert again is not None
    assert list(again.reasons) == list(finding.reasons)
    assert examine(Subject.load(tmp_path / "d"), session(REFERENCE)).finding is None
    assert json.loads((tmp_path / "d" / "about.json").read_text())["where"] == finding.where


def test_damaged_replays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HeliosError):
        Subject.load(tmp_path)
    with Builder("g") as build:
        x = build.input("x", (2, 3), torch.float32, Rate.STEP)
        build.output("y", op.get("silu")(x))
    graph = build.graph()
    Subject(graph, Drawn(graph, Root(0))).save(tmp_path, {})
    (tmp_path / "inputs.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"cannot read .*inputs\.safetensors"):
        Subject.load(tmp_path)
    renamed = dataclasses.replace(graph.inputs[0], name="z")
    other = dataclasses.replace(graph, inputs=(renamed,), nodes=(graph.nodes[0].renamed({"x": renamed}),))
    Subject(other, Drawn(other, Root(0))).save(tmp_path / "other", {})
    (tmp_path / "inputs.safetensors").write_bytes((tmp_path / "other" / "inputs.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"holds no float32\[2,3\] named 'x'"):
        Subject.load(tmp_path)


SMALL = ["--height", "64", "--width", "64", "--text-tokens", "16", "--precision", "fp32"]


def test_the_command_says_who_is_wrong_and_how_to_run_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chosen(spec: str) -> Backend:
        return Wrong({"gelu": erf_gelu}) if spec == "wrong" else select(spec)

    monkeypatch.setattr("helios_conformance.subject.selected", chosen)
    assert main(["diff", "wrong", "reference", *SMALL, "--out", str(tmp_path / "d")]) == 1
    told = capsys.readouterr().out
    assert " = gelu(" in told
    assert "reference: is the reference itself" in told
    replay = told.partition("replay:\n")[2].replace(" \\\n", " ").splitlines()[0]
    words = shlex.split(replay)
    assert words[0] == "helios"
    assert main(words[1:]) == 1
    assert " = gelu(" in capsys.readouterr().out
    assert main([*words[1:-2], "cpu", "reference"]) == 0


def test_the_command_on_right_backends_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "cpu", "reference", *SMALL, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [side["backend"] for side in told["sides"]] == ["cpu", "reference"]
    assert told["apart"]["output velocity"] < 1e-5


def test_the_command_takes_a_graph_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "g.txt"
    path.write_text("graph g {\n  input %x: float32[4,8] @step\n  %0: float32[4,8] = silu(%x)\n  output y = %0\n}\n")
    assert main(["diff", "cpu", "reference", "--graph", str(path)]) == 0
    assert "cpu: 1 node" in capsys.readouterr().out.replace("1 nodes", "1 node")


@pytest.mark.parametrize(
    "arguments",
    [["cpu", "nobody"], ["cpu", "reference", "--graph", "absent.txt"], ["cpu", "reference", "--size", "huge"]],
)
def test_mistakes_in_the_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", *arguments]) == 2
    assert capsys.readouterr().err
