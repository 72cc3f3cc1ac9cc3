"""The verdict: only a complete, closed scope is certified, and no level is green because of what did not run."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from helios_conformance import report as report_of
from helios_conformance import suite, verdict
from helios_conformance.case import LEVELS, Case

CASES = tuple(
    Case(f"{level}_{i}[bf16]", level, "op_values", "bf16", suite="quick" if i == 0 else "full", required=i < 2)
    for level in LEVELS
    for i in range(3)
)


@pytest.fixture(autouse=True)
def _tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "all_cases", lambda precision: CASES)


def told(levels: int = 4, name: str = "full", filters: tuple[str, ...] = (), **states: str) -> dict[str, Any]:
    """A report in which all passed, but for the cases named."""
    taken = suite.choose("bf16", name, LEVELS[:levels], filters)  # type: ignore[arg-type]
    cases = [
        {
            "id": case.id,
            "level": case.level,
            "required": case.required,
            "state": states.get(case.id.partition("[")[0], "pass"),
            "facts": {},
            "coverage": [],
        }
        for case in taken
    ]
    return {
        "suite": {"name": name, "levels": list(LEVELS[:levels]), "filters": list(filters)},
        "scope": {"precision": "bf16", "kind": "kernels", "variants": ["base", "mid", "distilled"]},
        "backend": {"label": "cpu", "emulated": "", "device": {"name": "a CPU"}},
        "setup": {"imported": False},
        "weights": {"origin": "random"},
        "environment": {"git": {"helios": None, "backend": None}},
        "coverage": [],
        "problem": "",
        "realtime": None,
        "cases": cases,
    }


def test_a_complete_closed_scope_is_certified() -> None:
    found = verdict.conclude(told())
    assert (found["word"], found["closed"], found["reasons"]) == ("certified", True, [])
    assert found["sentence"] == (
        "In bf16, as single kernels, levels ops, blocks, model and pipeline, full suite, "
        "variants base, mid and distilled: backend cpu on a CPU is certified, self-tested."
    )
    assert {level: row["state"] for level, row in found["levels"].items()} == dict.fromkeys(LEVELS[:4], "pass") | {
        "realtime": "not_run"
    }
    assert found["levels"]["ops"]["required"] == 2
    assert verdict.exit_code(found) == 0


def speed(**change: Any) -> dict[str, Any]:
    """A section on real time that is a full measurement, but for a change."""
    run = {"case": "realtime", "state": "pass", "size": "14b", "height": 384, "width": 640, "class": "measured"}
    run["weights"] = "random"
    return {
        "runs": [run | {"full_length": True, "chunks": 45, "seconds": 130.0} | change],
        "varied": {},
        "ceilings": [1],
    }


@pytest.mark.parametrize(
    "section",
    [None, {}, speed(size="mini"), speed(full_length=False), speed(height=192), speed(weights="checkpoint")],
)
def test_real_time_is_certified_by_a_full_measurement_alone(section: Any) -> None:
    assert verdict.conclude(told(5) | {"realtime": speed()})["word"] == "certified"
    assert verdict.conclude(told(5) | {"realtime": section})["word"] == "passed"


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_scope_names_its_levels(levels: int) -> None:
    found = verdict.conclude(told(levels) | {"realtime": speed()})
    assert found["word"] == "certified"
    assert LEVELS[levels - 1] in found["sentence"]
    assert found["levels"][LEVELS[levels - 1]]["state"] == "pass"
    assert all(found["levels"][level]["reason"] == "not asked for" for level in LEVELS[levels:])


@pytest.mark.parametrize(
    ("state", "words", "level"),
    [("fail", "failed", "fail"), ("unsupported",) * 2 + ("fail",), ("not_run", "not run", "not_run")],
)
def test_a_required_case_that_did_not_pass_refuses_the_certificate(state: str, words: str, level: str) -> None:
    found = verdict.conclude(told(blocks_1=state))
    assert found["word"] == "not certified"
    assert found["levels"]["blocks"]["state"] == level
    assert f"1 of 3 {words}: blocks_1[bf16]" in found["sentence"]
    assert verdict.exit_code(found) == 1


def test_the_level_realtime_needs_a_full_measurement() -> None:
    found = verdict.conclude(told(5))
    assert found["word"] == "passed"
    assert "no timed run was made" in found["sentence"]


@pytest.mark.parametrize(
    ("state", "word"), [("unsupported", "certified"), ("not_run", "certified"), ("fail", "not certified")]
)
def test_a_case_that_no_certificate_needs_may_be_absent_but_not_wrong(state: str, word: str) -> None:
    found = verdict.conclude(told(blocks_2=state))
    assert found["word"] == word


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r["backend"].update(emulated="torch"), "emulated: torch"),
        (lambda r: r.update(coverage=[["add", 1, 0, 3, "no kernel"]]), "3 nodes ran by the reference"),
        (lambda r: r["suite"].update(levels=["ops", "model"]), "a level was left out"),
    ],
)
def test_what_is_less_than_complete_passed_at_best(change: Any, reason: str) -> None:
    report = told()
    change(report)
    report["cases"] = [c for c in report["cases"] if c["level"] in report["suite"]["levels"]]
    found = verdict.conclude(report)
    assert found["word"] == "passed"
    assert "passed, which is not a certification" in found["sentence"]
    assert reason in found["sentence"]


@pytest.mark.parametrize("scope", [{"name": "quick"}, {"filters": ("ops_0",)}])
def test_quick_and_filtered_runs_only_pass(scope: Any) -> None:
    found = verdict.conclude(told(**scope))
    assert (found["word"], found["closed"]) == ("passed", False)
    assert verdict.exit_code(found) == 0


def test_a_filtered_run_whose_only_case_fails_did_not_pass() -> None:
    for state in ("fail", "unsupported", "not_run"):
        assert verdict.conclude(told(filters=("ops_2",), ops_2=state))["word"] == "not certified"


def test_a_level_without_cases_is_never_green() -> None:
    report = told()
    report["cases"] = [case for case in report["cases"] if case["level"] != "model"]
    found = verdict.conclude(report)
    assert found["levels"]["model"]["state"] == "not_run"
    assert (found["word"], found["closed"]) == ("passed", False)


def test_nothing_ran() -> None:
    report = told(filters=("nothing",))
    found = verdict.conclude(report)
    assert (found["word"], found["reasons"][0]) == ("not certified", "no case ran")
    everything = {case.id.partition("[")[0]: "not_run" for case in CASES}
    report = told(**everything) | {"problem": "its probe raised OSError: libcard.so"}
    found = verdict.conclude(report)
    assert found["reasons"][:2] == ["its probe raised OSError: libcard.so", "no case ran"]
    assert "its probe raised OSError: libcard.so" in found["sentence"]
    assert verdict.conclude(told(**dict.fromkeys(everything, "unsupported")))["word"] == "not certified"


def test_an_engines_single_ops_are_diagnostic() -> None:
    report = told(ops_0="fail", ops_1="unsupported")
    report["scope"]["kind"] = "engine"
    found = verdict.conclude(report)
    assert found["word"] == "certified"
    assert found["levels"]["ops"]["state"] == "fail"
    assert found["levels"]["ops"]["diagnostic"]
    assert found["levels"]["ops"]["reason"].endswith("diagnostic for an engine")
    only = told(1)
    only["scope"]["kind"] = "engine"
    assert verdict.conclude(only)["word"] == "passed"
    failing = told(blocks_0="fail")
    failing["scope"]["kind"] = "engine"
    assert verdict.conclude(failing)["word"] == "not certified"


def test_an_engines_sentence_is_not_that_of_a_backend_of_kernels() -> None:
    """Its single ops do not count, so they are not named, whether they failed or passed."""
    for state in ("fail", "pass"):
        report = told(ops_0=state)
        report["scope"]["kind"] = "engine"
        assert verdict.conclude(report)["sentence"] == (
            "In bf16, as an engine whose single ops are diagnostic, levels blocks, model and pipeline, full suite, "
            "variants base, mid and distilled: backend cpu on a CPU is certified, self-tested."
        )
    only = told(1)
    only["scope"]["kind"] = "engine"
    assert "diagnostic, no level that counts, full suite" in verdict.conclude(only)["sentence"]


def test_a_filtered_run_names_the_levels_that_it_had_cases_of() -> None:
    sentence = verdict.conclude(told(4, filters=("ops_0", "model_1")))["sentence"]
    assert sentence.startswith("In bf16, as single kernels, levels ops and model, only cases that match ops_0, model_1")
    one = verdict.conclude(told(4, filters=("ops_0",)))["sentence"]
    assert "as single kernels, level ops, only cases that match ops_0" in one


def test_what_is_not_certified_names_what_was_asked_for() -> None:
    sentence = verdict.conclude(told(2, blocks_0="fail"))["sentence"]
    assert "as single kernels, asked for levels ops and blocks, full suite" in sentence
    assert "is not certified: level blocks: 1 of 3 failed: blocks_0[bf16]" in sentence


def test_imported_results_are_called_that() -> None:
    report = told()
    report["setup"]["imported"] = True
    found = verdict.conclude(report)
    assert (found["word"], found["closed"]) == ("imported", False)
    report["cases"][0]["state"] = "fail"
    assert verdict.conclude(report)["word"] == "not certified"


def test_many_names_are_cut() -> None:
    report = told(filters=tuple(f"x{i}" for i in range(9)) + ("ops_0",))
    assert "x4 and 5 more" in verdict.conclude(report)["sentence"]


def test_what_is_not_proved() -> None:
    plain = verdict.not_proved(told())
    assert any("level realtime" in s for s in plain)
    assert "No speed was measured." in plain
    assert any("Weights are random" in s for s in plain)
    assert not any("Cases were left out" in s for s in plain)
    report = copy.deepcopy(told(5, "quick"))
    report |= {"realtime": {"fps": {}}, "weights": {"origin": "checkpoint", "name": "Helios-Distilled"}}
    report["environment"]["git"]["backend"] = {"commit": "0" * 40, "dirty": True}
    more = verdict.not_proved(report)
    assert any("attested, not proved" in s for s in more)
    assert any("section on real time does not say" in s for s in more)
    assert any("Cases were left out" in s for s in more)
    assert any("changes that its commit does not name" in s for s in more)
    assert not any("Nothing is said" in s for s in more)
    assert "Weights were random at levels ops, blocks, model and pipeline: what they judge" in " ".join(more)
    assert "'Helios-Distilled' ran at level realtime alone, timed: how good videos of a published" in " ".join(more)


def sheet(*ceilings: tuple[str, float, str]) -> dict[str, Any]:
    rows = [{"what": what, "best": best, "unit": unit, "dtype": "bfloat16"} for what, best, unit in ceilings]
    return {"datasheet": {"device": "H100 SXM", "bf16": 1e15, "bandwidth": 4e12}, "ceilings": rows}


def test_ceilings_far_below_the_data_sheet_of_the_name_are_remarked_upon() -> None:
    def said(section: Any) -> str:
        return " ".join(s for s in verdict.not_proved(told(5) | {"realtime": section}) if "named by its host" in s)

    right = said(sheet(("linear", 7.1e14, "FLOP/s"), ("attention", 1e14, "FLOP/s"), ("copy", 3.6e12, "B/s")))
    assert "of linear 71 % and of copy 90 % of what the data sheet gives for H100 SXM." in right
    slow = said(sheet(("linear", 7.1e13, "FLOP/s")))
    assert "of linear 7 % of what the data sheet gives for H100 SXM: a slower device under that name" in slow
    assert said(sheet()) == said({"datasheet": None, "ceilings": []}) == ""
    assert "malformed" in " ".join(verdict.not_proved(told(5) | {"realtime": sheet() | {"ceilings": [3]}}))


def timed(model: bool = True, weights: str = "checkpoint", levels: int = 5) -> dict[str, Any]:
    """The parts of a report that say which weights ran."""
    report = told(levels)
    report["suite"]["seed"] = 3
    report["setup"]["options"] = {"checkpoint": {"sha256": "0" * 64, "name": "distilled"}} if model else {}
    for case in report["cases"]:
        if case["level"] == "realtime":
            case["facts"] = {"setting": {"weights": weights}}
    return report


def test_the_weights_are_told_level_by_level() -> None:
    ran = report_of.weights(timed())
    assert (ran["origin"], ran["name"], ran["seed"]) == ("checkpoint", "distilled", 3)
    assert ran["levels"] == dict.fromkeys(LEVELS[:4], "random") | {"realtime": "checkpoint"}


@pytest.mark.parametrize("change", [{"model": False}, {"weights": "random"}, {"levels": 4}])
def test_a_checkpoint_that_nothing_ran_is_none(change: dict[str, Any]) -> None:
    """No other level reads it, so without a timed run the weights were random, whatever was asked for."""
    report = timed(**change)
    ran = report_of.weights(report)
    assert set(ran) == {"origin", "seed", "scale"}
    assert ran["origin"] == "random"
    caveats = " ".join(verdict.not_proved(report | {"weights": ran}))
    assert "Weights are random: how good videos of a published checkpoint look was not judged." in caveats
