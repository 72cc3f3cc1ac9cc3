"""Whole programs of the Ascend backend on the host, over operators written from their documentation: no NPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import pytest
import torch
from npu_operators import Calls, installed
from torch import Tensor

from helios import op
from helios.backend import Backend, ReferenceBackend, parse_spec
from helios.errors import BackendError, InputError
from helios.graph import Builder, Node, Rate
from helios.lower import lower
from helios.pipeline.entries import Entries
from helios.pipeline.model import Model, sized_model
from helios.precision import precision
from helios.program import Program
from helios_ascend import AscendBackend
from helios_ascend.program import AscendProgram
from helios_ascend.recorders import _traced
from helios_ascend.supports import refusal

T = TypeVar("T")
STAGES = ("denoise.0", "denoise.1", "denoise.2")
BOUNDS = {"fp32": 2e-6, "bf16": 2e-2}


class OnHost(AscendBackend):
    """The same kernels and program with tensors on the host."""

    def __init__(self, recorder: Any = None) -> None:
        super().__init__()
        self._recorder = recorder

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cpu")

    def recorder(self) -> Any:
        return self._recorder


class Noted:
    """Captures by running again: what is replayed is what the recorder was given."""

    def __init__(self) -> None:
        self.replays = 0

    def warm_up(self, run: Callable[[], object]) -> None:
        run()

    def capture(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        result: Any = run()

        def replay() -> None:
            self.replays += 1
            for name, tensor in run().items():  # type: ignore[attr-defined]
                result[name].copy_(tensor)

        return replay, result


class Refusing(Noted):
    def capture(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        raise RuntimeError("the operator is not supported in capture mode")


@pytest.fixture
def calls() -> Iterator[Calls]:
    with installed() as made:
        yield made


@functools.cache
def tiny() -> Model:
    return sized_model("tiny", "distilled")


def program(backend: Backend, name: str) -> Program:
    given = Entries(tiny(), 64, 64, text_tokens=16, precision=precision(name), parts=("transformer",))
    made = lower(given.graphs(), backend)
    made.load(tiny().transformer_weights)
    return made


def drawn(made: Program, rate: Rate, entry: str = "") -> dict[str, Tensor]:
    graphs = [made.plan.graphs[entry]] if entry else list(made.plan.graphs.values())
    names = None if entry else made.input_names(rate)
    values = {v.name: v for graph in graphs for v in graph.inputs_at(rate) if names is None or v.name in names}
    generator = torch.Generator().manual_seed(11)
    return {name: torch.randn(values[name].shape, generator=generator) for name in sorted(values)}


def velocities(made: Program) -> Mapping[str, Tensor]:
    context = made.bind(drawn(made, Rate.PROMPT)) | made.bind(drawn(made, Rate.CHUNK))
    return {entry: next(iter(made.run(entry, drawn(made, Rate.STEP, entry), context).values())) for entry in STAGES}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_forward_is_that_of_the_reference(calls: Calls, name: str) -> None:
    ours, theirs = velocities(program(OnHost(), name)), velocities(program(ReferenceBackend(), name))
    for entry in STAGES:
        wanted = theirs[entry].float()
        assert float((ours[entry].float() - wanted).norm() / wanted.norm()) < BOUNDS[name]
    used = {made[0] for made in calls.made}
    fused = "npu_fusion_attention_v3" if name == "fp32" else "npu_fused_infer_attention_score"
    assert {fused, "npu_rms_norm", "npu_rotary_mul", "npu_add_layer_norm"} <= used


@pytest.mark.usefixtures("calls")
def test_the_plan_has_all_fused_ops_of_the_transformer_and_nothing_falls_back() -> None:
    made = program(OnHost(), "bf16")
    counts = made.coverage.counts
    assert {"adaln", "gated_add_adaln", "qk_norm_rope"} <= {n for n, c in counts.items() if c["fused"]}
    assert made.coverage.fallbacks == 0


@pytest.mark.usefixtures("calls")
def test_replayed_steps_give_the_same_bits() -> None:
    plain, recorder = velocities(program(OnHost(), "bf16")), Noted()
    made = program(OnHost(recorder), "bf16")
    replayed = velocities(made)
    assert recorder.replays == len(STAGES)
    assert all(torch.equal(plain[entry], replayed[entry]) for entry in STAGES)
    assert isinstance(made, AscendProgram)
    assert set(made.execution()["graphs"]) == set(STAGES)


@pytest.mark.usefixtures("calls")
def test_a_capture_that_fails_says_so_and_runs_kernel_by_kernel() -> None:
    made = program(OnHost(Refusing()), "bf16")
    with pytest.warns(RuntimeWarning, match="not as graphs: denoise.2: the operator is not supported"):
        found = velocities(made)
    assert set(found) == set(STAGES)
    assert isinstance(made, AscendProgram)
    assert made.execution()["eager"].startswith("not captured: ")


@pytest.mark.usefixtures("calls")
def test_a_traced_step_is_one_graph_that_reads_its_static_buffers() -> None:
    """What torchair gets: torch's operators, with the buffers as constants and a mapping as the result."""
    held = torch.ones(3)
    run = _traced(lambda: {"out": held * 2.0 + 1.0})
    assert torch.equal(run()["out"], torch.full((3,), 3.0))
    held.fill_(2.0)
    assert torch.equal(run()["out"], torch.full((3,), 5.0))


@pytest.mark.usefixtures("calls")
def test_weights_that_do_not_fit_are_refused_before_any_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AscendBackend, "memory", lambda self: (1 << 10, 32 << 30))
    with pytest.raises(BackendError, match="the weights need"):
        program(OnHost(), "fp32")


def node(name: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, **attrs: Any) -> Node:
    with Builder("one") as build:
        values = [build.input(f"x{i}", shape, dtype, Rate.STEP) for i, shape in enumerate(shapes)]
        out = op.get(name)(*values, **attrs)
        build.output("y", out[0] if isinstance(out, tuple) else out)
    return build.graph().nodes[-1]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (node("add", (2, 3), (2, 3), dtype=torch.float64), "float64"),
        (node("attention", (1, 8, 300, 16), (1, 8, 300, 16), (1, 8, 300, 16)), "at most 256 heads"),
        (node("attention", (1, 8, 1, 520), (1, 8, 1, 520), (1, 8, 1, 520)), "at most 512 channels"),
        (node("rope", (50, 4, 40, 8), (4, 4, 2)), "fewer than 1000"),
        (node("quantize_rows", (4, 8)), "float8_e4m3fn"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_the_hardware_cannot_do_is_refused_with_the_reason(asked: Node, said: str) -> None:
    assert said in str(refusal(asked) or AscendBackend().supports(asked))


def test_float32_attention_may_be_wider() -> None:
    shapes = ((1, 8, 1, 520),) * 3
    assert refusal(node("attention", *shapes, dtype=torch.float32)) is None


def test_names_and_options() -> None:
    assert parse_spec("ascend:1") == ("ascend", "", 1)
    assert AscendBackend("", 1).label == "ascend:1"
    emulated = AscendBackend("emulated")
    assert emulated.label == "ascend:emulated"
    assert "documentation" in emulated.emulated
    assert not AscendBackend().emulated
    with pytest.raises(InputError, match="no provider 'cann'"):
        AscendBackend("cann")
    with pytest.raises(InputError, match="graphs"):
        AscendBackend(graphs="cuda")
