"""The runner: what a worker may do to it, and that it goes on; interrupts, and that a run goes on after them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from helios.errors import HeliosError, InputError, StateError
from helios_conformance import environment, execute, runner, suite
from helios_conformance.case import Case, Observation, Verdict
from helios_conformance.checks import CHECKS
from helios_conformance.draws import Root
from helios_conformance.references import committed
from helios_conformance.report import assemble, schema
from helios_conformance.run import RunFolder, RunResult, Setup
from helios_conformance.runner import LOSSES, Crew, Ended, Runner, check_filters, judged
from helios_conformance.session import Session
from helios_conformance.subject import describe, selected
from helios_conformance.suite import choose
from helios_conformance.workers import Lost, Refused

Meet = Callable[[pytest.MonkeyPatch], None]
FILTERS = (
    "add[fp32,small]",
    "silu[fp32,small]",
    "gelu[fp32,small]",
    "reshape[fp32,heads]",
    "expand[fp32,batch]",
    "unbind[fp32,modulation]",
    "euler_step[fp32,small]",
)


class Notes:
    """A watcher that keeps what it is told; raises Ctrl-C at a case where told to."""

    def __init__(self, stop_at: int = -1) -> None:
        self.began: list[str] = []
        self.at_: list[str] = []
        self.told: list[Mapping[str, Any]] = []
        self.notes: list[str] = []
        self.stop_at = stop_at

    def begin(self, cases: Sequence[Case], backend: Mapping[str, Any]) -> None:
        self.began = [case.id for case in cases]

    def at(self, case: Case) -> None:
        if len(self.at_) == self.stop_at:
            raise KeyboardInterrupt
        self.at_.append(case.id)

    def finished(self, record: Mapping[str, Any]) -> None:
        self.told.append(record)

    def note(self, text: str) -> None:
        self.notes.append(text)


def setup(spec: str, out: Path, filters: Sequence[str] = (), precision: str = "fp32") -> Setup:
    root = Root(0, "00112233")
    return Setup(spec, precision, "quick", ("ops",), tuple(filters), root, out=out)


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory, meet_strangers: Meet) -> Iterator[tuple[RunResult, Notes]]:
    """One run over much that a driver may do to a process."""
    out, notes = tmp_path_factory.mktemp("wild") / "run", Notes()
    with pytest.MonkeyPatch.context() as patch:
        meet_strangers(patch)
        patch.setattr(runner.suite, "choose", hurried)
        yield Runner(setup("wild", out, FILTERS), notes).run(), notes


def hurried(*given: Any) -> list[Case]:
    """The cases of a run; the one that hangs has 3 seconds, and the others all that they need."""
    return [dataclasses.replace(c, timeout=3.0) if c.params["op"] == "unbind" else c for c in choose(*given)]


def reason(result: RunResult, case: str) -> str:
    record = next(r for r in result.records if r["id"].startswith(case + "["))
    assert record["state"] == "fail"
    return str(record["reason"])


def test_every_case_has_a_record_in_order(wild: tuple[RunResult, Notes]) -> None:
    result, notes = wild
    assert {r["id"] for r in result.records} == set(FILTERS)
    assert [r["id"] for r in result.records] == notes.began == [r["id"] for r in notes.told]
    assert result.problem == ""


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("silu", ["was killed by SIGSEGV in silu[fp32,small]", "Segmentation fault"]),
        ("reshape", ["was killed by SIGKILL", "want of memory"]),
        ("unbind", ["gave no result in 3 s (timeout) and was killed", "in hang"]),
        ("expand", ["the backend raised RuntimeError: no such stream"]),
        ("gelu", ["beyond"]),
    ],
)
def test_a_failure_says_how(wild: tuple[RunResult, Notes], case: str, words: list[str]) -> None:
    told = reason(wild[0], case)
    assert [word for word in words if word not in told] == [], told


def test_the_run_went_on_and_what_is_right_passed(wild: tuple[RunResult, Notes]) -> None:
    passed = {r["id"] for r in wild[0].records if r["state"] == "pass"}
    assert passed == {"add[fp32,small]", "euler_step[fp32,small]"}, "noise on standard output is no failure"


def test_each_lost_worker_was_replaced_and_counted(wild: tuple[RunResult, Notes]) -> None:
    result, notes = wild
    assert result.workers == {"started": 3, "lost": 3}
    assert len(notes.notes) == 3
    assert result.peak_rss["parent"] > 50e6
    assert result.peak_rss["worker"] > 50e6


def test_the_backend_is_described_by_the_worker(wild: tuple[RunResult, Notes]) -> None:
    told = wild[0].backend
    assert (told["name"], told["label"], told["class"]) == ("wild", "wild", "stranger:Wild")
    assert (told["distribution"], told["version"], told["api_version"]) == ("stranger", "1.2", 1)
    assert told["kind"] == "kernels"
    assert told["device"] == {"name": "a stranger's device", "index": 0, "memory": 1 << 30}
    assert told["precisions"] == ["fp32", "bf16"]


def test_a_lost_case_is_judged_the_same_from_its_record(wild: tuple[RunResult, Notes]) -> None:
    record = next(r for r in wild[0].records if r["id"].startswith("silu"))
    again = judged(suite.find(record["id"]), Observation(facts=record["facts"]), Root(), committed())
    assert (again.state, again.reason) == (record["state"], record["reason"])


def test_kept_elements_are_there_for_each_output(wild: tuple[RunResult, Notes]) -> None:
    result = wild[0]
    wanted = {f"{r['id']}/{name}" for r in result.records for name in r["outputs"]}
    assert wanted
    assert wanted == set(result.tensors)


# --- with the worker's part in this process ---------------------------------------------------------------------------


class Here:
    """A worker that is no process."""

    peak = 0

    def __init__(self, start: Mapping[str, Any], *given: Any) -> None:
        try:
            self.session = Session(selected(start["backend"]), Root(start["seed"], start["nonce"]))
            self.backend = describe(self.session.backend, start["backend"], self.session)
            self.withheld = dict(self.session.backend.withheld)
        except HeliosError as error:
            raise Refused(error.why, error.fix) from error

    def observe(self, case: Case, timeout: float) -> tuple[Observation, float]:
        if case.id.startswith("expand"):
            raise Lost("the worker was lost")
        return execute.observe(case, self.session), 0.125

    def stop(self) -> None: ...


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, meet_strangers: Meet) -> None:
    meet_strangers(monkeypatch)
    monkeypatch.setattr(runner, "Worker", Here)
    monkeypatch.setattr(environment, "_git", lambda module: None)  # who commits meanwhile changes nothing here


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("noprobe", "OSError: libcard.so: undefined symbol"),
        ("broken", "libbroken.so: no such file"),
        ("onlyhalf", "does not offer fp32, but bf16; its adder is narrow"),
        ("right:5", "has no device 5"),
    ],
)
def test_who_cannot_start_leaves_cases_not_run(spec: str, words: str, tmp_path: Path) -> None:
    result = Runner(setup(spec, tmp_path / "run", ["add[fp32,small]"])).run()
    assert words in result.problem
    assert [(r["state"], r["reason"]) for r in result.records] == [("not_run", result.problem)]
    assert result.backend["label"] == spec


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("spec", "first"), [("right", "fp32"), ("onlyhalf", "bf16")])
def test_the_backends_first_precision_is_taken(spec: str, first: str, tmp_path: Path) -> None:
    result = Runner(setup(spec, tmp_path / "run", ["add[*,small]"], precision="")).run()
    assert result.setup.precision == first
    assert [r["id"] for r in result.records] == [f"add[{first},small]"]


@pytest.mark.usefixtures("here")
def test_a_device_that_goes_away_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAKY", str(tmp_path / "gone"))
    notes = Notes()
    notes.note = lambda text: (tmp_path / "gone").touch()  # type: ignore[method-assign]  # with the loss, all is gone
    result = Runner(setup("flaky", tmp_path / "run", ["expand[fp32,batch]", "silu[fp32,small]"]), notes).run()
    assert [r["state"] for r in result.records] == ["fail", "not_run"]
    assert "fell off the bus" in result.problem
    assert result.backend["device"]["name"] == "a stranger's device"


@pytest.mark.usefixtures("here")
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "run"
    filters = ["add[fp32,small]", "add[fp32,odd]", "silu[fp32,small]", "silu[fp32,odd]", "gelu[fp32,small]"]
    with pytest.raises(KeyboardInterrupt):
        Runner(setup("right", out, filters), Notes(stop_at=3)).run()
    about = json.loads((out / "run.json").read_text())
    before = {i: r["seconds"] for i, r in RunFolder(out).records().items()}
    assert len(before) == 3, "what the device has done is judged, and kept"
    assert about["workers"] == {"started": 1, "lost": 0}
    notes = Notes()
    result = Runner(setup("ignored", out), notes, resume=True).run()
    assert set(notes.at_) == set(notes.began) - set(before)
    assert [r["id"] for r in notes.told] == notes.began, "those of the first part are told first"
    assert result.setup.root == Root(0, "00112233")
    assert result.setup.filters == tuple(filters)
    assert {r["state"] for r in result.records} == {"pass"}
    assert result.workers == {"started": 2, "lost": 0}
    assert result.started == about["started"]


@pytest.mark.usefixtures("here")
def test_another_device_is_not_resumed_with(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        Runner(setup("right", out, ["add[fp32,small]", "add[fp32,odd]"]), Notes(stop_at=1)).run()
    about = json.loads((out / "run.json").read_text())
    about["backend"]["device"]["name"] = "another"
    (out / "run.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="not what the run was begun with"):
        Runner(setup("", out), resume=True).run()


def interrupted(out: Path) -> dict[str, Any]:
    """A run with a case to go, and its ``run.json``."""
    with pytest.raises(KeyboardInterrupt):
        Runner(setup("right", out, ["add[fp32,small]", "add[fp32,odd]"]), Notes(stop_at=1)).run()
    about: dict[str, Any] = json.loads((out / "run.json").read_text())
    return about


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda a: a["environment"]["packages"].update(torch="1.0"), 'environment.packages.torch: it says "'),
        (
            lambda a: a["environment"]["git"].update(helios={"commit": "0" * 40, "dirty": False}),
            "environment.git.helios",
        ),
        (lambda a: a["environment"].update(python="CPython 3.8.1"), "environment.python"),
        (lambda a: a["environment"]["drivers"].update(nvidia="555.1, 96"), "environment.drivers.nvidia"),
        (lambda a: a["environment"]["variables"].update(CUBLAS_X="1"), "environment.variables.CUBLAS_X: it is missing"),
        (lambda a: a["environment"]["cores"].update(usable=4096), "environment.cores.usable"),
        (lambda a: a["backend"].update(threads=512), "environment.threads: it says"),
    ],
)
def test_a_run_does_not_go_on_in_another_environment(change: Callable[[Any], Any], named: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    about = interrupted(out)
    change(about)
    (out / "run.json").write_text(json.dumps(about))
    for _ in range(2):  # being refused changes nothing
        with pytest.raises(InputError, match="the environment is not the one") as refused:
            Runner(setup("", out), resume=True).run()
        assert named in str(refused.value)
    assert len(RunFolder(out).records()) == 1
    assert json.loads((out / "run.json").read_text())["resumed"] == 0


@pytest.mark.usefixtures("here")
def test_a_variable_that_is_set_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path / "run")
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    with pytest.raises(InputError, match="TORCH_ALLOW_TF32_CUBLAS_OVERRIDE: it does not belong there"):
        Runner(setup("", tmp_path / "run"), resume=True).run()


@pytest.mark.usefixtures("here")
def test_the_report_says_that_a_run_went_on(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    told = assemble(Runner(setup("", tmp_path / "run"), resume=True).run())
    assert told["setup"]["options"] == {"resumed": 1}
    assert any("interrupted and went on once" in sentence for sentence in told["not_proved"])
    jsonschema.validate(json.loads(json.dumps(told)), schema())
    whole = assemble(Runner(setup("right", tmp_path / "whole", ["add[fp32,small]"])).run())
    assert whole["setup"]["options"] == {}
    assert not any("went on" in sentence for sentence in whole["not_proved"])


@pytest.mark.usefixtures("here")
def test_not_run_is_run_when_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, out = tmp_path / "gone", tmp_path / "run"
    gone.touch()
    monkeypatch.setenv("FLAKY", str(gone))
    assert Runner(setup("flaky", out, ["silu[fp32,small]"])).run().problem
    gone.unlink()
    result = Runner(setup("", out), resume=True).run()
    assert [r["state"] for r in result.records] == ["pass"]
    assert result.problem == ""


@pytest.mark.usefixtures("here")
def test_what_emulates_is_recorded(tmp_path: Path) -> None:
    result = Runner(setup("emulated", tmp_path / "run", ["add[fp32,small]"])).run()
    assert result.backend["emulated"] == "a CPU in its place"


# --- the folder -----------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.txt").touch()
    with pytest.raises(InputError, match="not empty"):
        Runner(setup("reference", tmp_path, ["add[fp32,small]"])).run()


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run"):
        Runner(setup("reference", tmp_path), resume=True).run()


@pytest.mark.parametrize("text", ["{", "[]", '{"suite_hash": 3}'])
def test_a_damaged_run_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(StateError, match="damaged"):
        Runner(setup("reference", tmp_path), resume=True).run()


def test_the_run_of_another_suite_is_refused(tmp_path: Path) -> None:
    RunFolder.create(setup("reference", tmp_path), "another hash")
    with pytest.raises(StateError, match="another version"):
        Runner(setup("reference", tmp_path), resume=True).run()


def test_a_damaged_record_counts_as_not_run(tmp_path: Path) -> None:
    folder, _ = RunFolder.create(setup("reference", tmp_path), "hash")
    folder.add({"id": "a"}, {})
    folder.add({"id": "b"}, {})
    (folder.cases / "00000.json").write_text('{"id": "a", ')
    again = RunFolder(tmp_path)
    assert again.records() == {"b": {"id": "b"}}
    again.add({"id": "c"}, {})
    assert set(RunFolder(tmp_path).records()) == {"b", "c"}


def test_a_setup_survives_json(tmp_path: Path) -> None:
    made = setup("cuda:1", tmp_path, ["add[fp32,small]"])
    assert Setup.of(json.loads(json.dumps(made.told())), tmp_path) == made


# --- judgement ------------------------------------------------------------------------------------------------------


def test_a_filter_that_takes_nothing_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"did you mean 'add\[fp32,small\]'"):
        check_filters(["add[fp32,smal]"])
    with pytest.raises(InputError, match="unknown case"):
        check_filters(["add[fp32,small]"], "bf16")


def test_what_cannot_be_judged_has_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(*given: Any) -> Verdict:
        raise KeyError("o1")

    case = suite.find("add[fp32,small]")
    monkeypatch.setattr(type(next(c for c in CHECKS if c.name == case.check)), "judge", judge)
    verdict = judged(case, Observation(), Root(), committed())
    assert verdict.state == "fail"
    assert "cannot be judged: KeyError: o1" in verdict.reason


def test_losses_without_end_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Doomed:
        """Starts, and is lost in each case."""

        peak = 0
        backend: Mapping[str, Any] = {}

        def __init__(self, *given: Any) -> None: ...

        def observe(self, *given: Any) -> Any:
            raise Lost("gone")

        def stop(self) -> None: ...

    monkeypatch.setattr(runner, "Worker", Doomed)
    crew = Crew(setup("right", tmp_path), 1, Notes())
    case = suite.find("add[fp32,small]")
    for _ in range(LOSSES):
        with pytest.raises(Lost):
            crew.observe(case)
    with pytest.raises(Ended, match=f"{LOSSES} cases in a row"):
        crew.observe(case)
    assert crew.lost == LOSSES
