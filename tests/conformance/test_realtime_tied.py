"""What ties a timed run to right results at any size: the network opened, frames decoded again, bounded work."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from helios import op
from helios.backend import Backend, ReferenceBackend, select
from helios.graph import Graph, Value
from helios.model import presets
from helios.model.transformer import DenoiseShape, HistoryShape, denoise_graph
from helios.passes import Plan
from helios.pipeline.codec import Codec
from helios.pipeline.history import Window
from helios.program import Coverage, Program
from helios_conformance import realtime
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.golden import Call, Interpreter
from helios_conformance.mutants import MUTANTS
from helios_conformance.realtime import checks, golden, inside, opened, scene, shown
from helios_conformance.realtime.inside import JUDGED, ROLES, Pick, Rows
from helios_conformance.realtime.options import Options
from helios_conformance.record import record
from helios_conformance.references import References, committed
from helios_conformance.session import Session

ROOT = Root(5, "nonce")
TINY = {"size": "tiny", "height": 64, "width": 64, "tokens": 16, "chunks": 2, "seconds": 0.0, "warmup": 1}
TIMED = checks.Timed()
BACKEND = {"device": {"name": "a CPU"}, "emulated": ""}


def timed(
    backend: Backend, precision: str = "fp32", model: str | None = None, **options: Any
) -> tuple[Case, Observation]:
    """The timed case in this process, heard by a clock of its own."""
    case = next(iter(TIMED.cases(precision)))
    told: list[list[Any]] = []
    session = Session(backend, ROOT, model=model, options=TINY | options)
    session.tell = lambda line: told.append([time.monotonic(), dict(line)])
    seen = TIMED.observe(case, session)
    return case, dataclasses.replace(seen, facts={**seen.facts, "told": told})


def verdict(case: Case, seen: Observation) -> Verdict:
    return TIMED.judge(case, seen, ROOT, committed())


@pytest.fixture(autouse=True, scope="module")
def one_latent() -> Iterator[None]:
    """Of tiny as much is decoded as at the published size."""
    affordable = shown._affordable
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shown, "_affordable", lambda size, *of: 1 if size == "tiny" else affordable(size, *of))
        yield


@pytest.fixture(scope="module")
def right() -> tuple[Case, Observation]:
    return timed(select("cpu"), "bf16")


@pytest.fixture
def no_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at 14B: no host computes the whole network."""
    monkeypatch.setattr(golden, "entries", lambda *args, **named: [])


def test_a_right_backend_passes_and_everything_is_judged(right: tuple[Case, Observation]) -> None:
    found = verdict(*right)
    assert found.state == "pass", found.reason
    assert {f"opened.{role}" for role in JUDGED} | {"shown.frames"} <= set(found.judged)


@pytest.mark.usefixtures("no_oracle")
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("layers_skipped_when_timed", "opened: the velocity is not the timed program's own"),
        ("velocity_scaled_when_timed", "opened: the velocity is not the timed program's own"),
        ("decoder_coarse", "frames: worst element"),
    ],
)
def test_who_does_less_where_the_clock_runs_is_caught(name: str, wanted: str) -> None:
    mutant = next(m for m in MUTANTS if m.name == name)
    found = verdict(*timed(mutant.apply(ReferenceBackend())))
    assert found.state == "fail"
    assert wanted in found.reason
    assert all("opened" in line or "shown" in line for line in found.reason.split("; ")), found.reason


@pytest.mark.parametrize("name", ["layers_skipped_when_timed", "velocity_scaled_when_timed"])
def test_nothing_of_a_timed_checkpoint_is_judged_so_it_is_no_certification(
    name: str, make_checkpoint: ModuleType, tmp_path: Path
) -> None:
    make_checkpoint.write_checkpoint(tmp_path / "model", size_name="tiny", variant_name="distilled")
    mutant = next(m for m in MUTANTS if m.name == name)
    case, seen = timed(mutant.apply(ReferenceBackend()), model=str(tmp_path / "model"))
    found = verdict(case, seen)
    assert found.state == "pass", "a verifier does not have the weights: were this judged, the rest here would be moot"
    made = realtime.section([json.loads(json.dumps(record(case, seen, found, 1.0)))], BACKEND)
    assert made is not None
    assert made["class"] not in ("playback", "published", "measured")
    # However large, long and fast it says that it was:
    made["runs"] = [run | {"size": "14b", "height": 384, "width": 640, "full_length": True} for run in made["runs"]]
    whole = made | {"varied": {"turns": 5}, "ceilings": [{"what": "linear"}]}
    wanted = "with weights of a checkpoint nothing of the timed network is judged: time random weights to certify"
    assert realtime.shortcomings(whole) == [f"{case.id}: {wanted}"]
    assert realtime.judged_network(whole).startswith("With weights of a checkpoint nothing of the timed network")
    random = whole | {"runs": [run | {"weights": "random"} for run in whole["runs"]]}
    assert realtime.shortcomings(random) == [], "nothing else is amiss"
    assert "one drawn block of one stage" in realtime.judged_network(random)


def changed(seen: Observation, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Observation:
    kept = seen.outputs[name]
    return dataclasses.replace(
        seen, outputs={**seen.outputs, name: dataclasses.replace(kept, values=change(kept.values))}
    )


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("opened.first", "first"),
        ("opened.before", "keys"),
        ("opened.attended", "after"),
        ("opened.after", "after"),
        ("opened.last", "velocity"),
        ("opened.velocity", "velocity"),
    ],
)
def test_each_part_follows_from_the_one_before(right: tuple[Case, Observation], name: str, role: str) -> None:
    case, seen = right
    found = verdict(case, changed(seen, name, lambda x: x.flip(0)))
    assert found.state == "fail"
    assert f": {role}: norm of the error" in found.reason


def test_a_whole_network_times_three_tenths_is_caught_by_its_head(right: tuple[Case, Observation]) -> None:
    case, seen = right
    found = verdict(case, changed(seen, "opened.velocity", lambda x: x * 0.3))
    assert ": velocity: gain -0.7" in found.reason


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda f: f.update(opened=None), "it was not done"),
        (lambda f: f["opened"].update(block=7), "it was not done"),
        (lambda f: f["opened"].update(timed="0" * 64), "not the timed program's own"),
        (lambda f: f["opened"].update(timed="0" * 64, engine=True, difference=0.5), "beyond 0."),
        (lambda f: f["opened"].update(timed="0" * 64, engine=True, difference=None), "beyond 0."),
        (lambda f: f["opened"].update(timed="0" * 64, engine=True, difference=0.004), ""),
        (lambda f: f["shown"].update(chunk=9), "was wanted"),
        (lambda f: f["shown"].update(frames=["0" * 64] * 33), "has 1 different frames"),
        (lambda f: f.update(vae={"group": 9, "tile": 8, "stride": 8}), "tiles of 8 pixels"),
    ],
)
def test_facts_that_are_not_right_fail(
    right: tuple[Case, Observation], change: Callable[[dict[str, Any]], None], wanted: str
) -> None:
    case, seen = right
    facts = {**seen.facts, "opened": dict(seen.facts["opened"]), "shown": dict(seen.facts["shown"])}
    change(facts)
    found = verdict(case, dataclasses.replace(seen, facts=facts))
    assert found.state == ("fail" if wanted else "pass"), found.reason
    assert wanted in found.reason


@pytest.mark.parametrize("name", ["opened.keys", "opened.keys.head", "shown.latents", "shown.frames", "opened.first"])
def test_what_is_missing_or_of_another_shape_fails(right: tuple[Case, Observation], name: str) -> None:
    case, seen = right
    without = {n: kept for n, kept in seen.outputs.items() if n != name}
    assert verdict(case, dataclasses.replace(seen, outputs=without)).state == "fail"
    odd = {**seen.outputs, name: dataclasses.replace(seen.outputs[name], shape=(1, 2, 3))}
    assert verdict(case, dataclasses.replace(seen, outputs=odd)).state == "fail"
    assert verdict(case, changed(seen, name, lambda x: x[:-1])).state == "fail"


def test_rows_and_head_are_of_one_tensor(right: tuple[Case, Observation]) -> None:
    case, seen = right
    found = verdict(case, changed(seen, "opened.values.head", lambda x: x + 1))
    assert "rows and head of values are not of one tensor" in found.reason


def test_latents_that_are_not_the_timed_ones_are_not_decoded(
    right: tuple[Case, Observation], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, seen = right
    monkeypatch.setattr(Codec, "decode", lambda *args: 1 / 0)
    found = verdict(case, changed(seen, "shown.latents", lambda x: x + 1))
    assert "the latents are not those of the timed chunk" in found.reason


class Engine(Program):
    """Runs graphs whole; where it is asked for more than the velocity, that comes out otherwise by a part of it."""

    def __init__(self, plan: Plan, backend: Backend, part: float) -> None:
        super().__init__(plan, backend, Coverage())
        self.part = part

    def evaluate(self, graph: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        known: dict[str, Any] = dict(inputs)

        def fetch(operand: Any) -> Any:
            return known[operand.name] if isinstance(operand, Value) else operand and [fetch(x) for x in operand]

        for node in self.plan.graphs[graph].nodes:
            result = op.get(node.op).fn(*map(fetch, node.inputs), **node.attributes)
            results = result if isinstance(result, tuple) else (result,)
            known.update((v.name, x) for v, x in zip(node.outputs, results, strict=True))
        made = {name: known[value.name] for name, value in self.plan.graphs[graph].outputs}
        if "after" in made:
            signs = torch.ones(made["velocity"].numel()).reshape(-1, 2).mul(torch.tensor([1.0, -1.0]))
            made["velocity"] = made["velocity"] * (1 + self.part * signs.reshape(made["velocity"].shape))
        return made


@pytest.mark.parametrize(("part", "wanted"), [(1e-6, ""), (1e-4, "differs from the timed program's by")])
def test_an_engine_may_round_otherwise_where_it_has_more_outputs(part: float, wanted: str) -> None:
    class Whole(ReferenceBackend):
        def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
            return Engine(plan, self, part)

    case, seen = timed(Whole())
    found = verdict(case, seen)
    assert seen.facts["opened"]["engine"] is True
    assert seen.facts["opened"]["difference"] == pytest.approx(part, rel=0.2)
    assert found.state == ("fail" if wanted else "pass"), found.reason
    assert wanted in found.reason


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_rows_are_those_of_the_whole_graph(stage: int, block: int) -> None:
    """In float64 itself nothing differs: every stage, the first block, one between, and the last."""
    config = dataclasses.replace(presets.size("tiny").transformer, num_layers=3, is_amplify_history=True)
    side = 8 >> (2 - stage)
    shape = DenoiseShape(side, side, 16, Window().indices, HistoryShape(8, 8))
    graph = denoise_graph(config, shape, dtype=torch.float64, name="denoise.0")
    chosen = Pick(0, block, 1, ROOT)
    weights = inside.Remembered(scene.DrawnWeights(shapes(graph), ROOT, "test", lambda name: torch.float64))
    given = opened.given(graph, ROOT)
    wider, names = opened.graph_with(graph, block)
    came = Interpreter({"all": wider}, weights).run(Call("all", "all", given))
    tensors = {role: came[names[role]] for role in ROLES}
    rows = Rows.of(7, {role: tuple(x.shape) for role, x in tensors.items()}, chosen)
    read = {role: rows.take(role, x) for role, x in tensors.items()}
    heads = {role: tensors[role][0, :, chosen.head] for role in ("keys", "values")}
    for errors in inside.measure(graph, config, weights, given, chosen, rows, read, heads).values():
        assert errors.norm < 1e-12


def shapes(graph: Graph) -> Mapping[str, tuple[int, ...]]:
    return {v.name: v.shape for v in graph.inputs if v.rate == 0}


def test_the_timed_program_is_free_before_its_weights_are_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    programs: list[weakref.ref[Any]] = []

    class Counting(ReferenceBackend):
        def compile(self, plan: Any, *, fallback: str = "error") -> Any:
            gc.collect()
            if any(name.startswith("denoise") for name in plan.steps):
                alive.append(sum(ref() is not None for ref in programs))
            program = super().compile(plan, fallback=fallback)
            if any(name.startswith("denoise") for name in plan.steps):
                programs.append(weakref.ref(program))
            return program

    timed(Counting())
    assert alive == [0, 0]


def test_nothing_is_computed_of_sizes_without_reference_errors(
    right: tuple[Case, Observation], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"height": 64, "width": 64, "tokens": 1}
    assert golden.entries(Options(size="14b", **small), "distilled") == []
    case, seen = right
    for name in ("oracle", "graphs_of"):
        monkeypatch.setattr(golden, name, lambda *args, **named: pytest.fail("something was computed"))
    found = TIMED.judge(case, seen, ROOT, References({}))
    assert found.state == "fail"
    assert "no reference error" in found.reason


def test_work_is_bounded_by_what_the_shapes_cost(right: tuple[Case, Observation]) -> None:
    full, huge = Options(), Options(height=4096, width=4096, tokens=4096)
    assert opened.stages(full, "distilled") == [0, 1, 2]
    assert opened.stages(huge, "distilled") == []
    assert shown.affordable(full, {"group": 9})[0] == 1
    assert shown.affordable(huge, {"group": 9})[0] == 0
    assert shown.affordable(Options(size="mini", height=64, width=64), {"group": 9})[0] == 9
    case, seen = right
    setting = {**seen.facts["setting"], "size": "14b", "height": 4096, "width": 4096, "tokens": 4096}
    begin = time.monotonic()
    verdict(case, dataclasses.replace(seen, facts={**seen.facts, "setting": setting}))
    assert time.monotonic() - begin < 10


def test_reference_errors_are_those_of_rounding() -> None:
    rows: dict[str, Errors] = dict(committed().entries["realtime[bf16,distilled,1-1-1]"])
    for size in opened.SIZES:
        for role in JUDGED:
            assert 1e-3 < rows[f"{size}.{role}"].norm < 6e-3, (size, role)


@pytest.mark.slow
def test_mini_on_the_cpu_backend() -> None:
    """The real kernels' shapes at a tenth of the width."""
    case, seen = timed(select("cpu"), "bf16", size="mini", height=64, width=64)
    found = verdict(case, seen)
    assert found.state == "pass", found.reason
    assert len(seen.facts["chunks"]) == 2
    assert {"mini.denoise.2", "opened.after", "shown.frames"} <= set(found.judged)
