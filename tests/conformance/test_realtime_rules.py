"""The section on real time: figures that no device made contradict the rest, themselves, or physics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from realtime_report import H100, facts, report, sha

from helios_conformance.realtime import (
    check,
    section,
    shortcomings,
)


def test_a_right_report_has_no_contradiction() -> None:
    whole = report()
    assert check(whole["realtime"], whole) == []
    assert shortcomings(whole["realtime"]) == ["repeated and varied prompts were not compared"]


def edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set what a path names, in the section's primary run and in its list of runs alike."""

    def change(whole: dict[str, Any]) -> None:
        for one in (whole["realtime"], whole["realtime"]["runs"][0]):
            *keys, last = path.split(".")
            functools.reduce(lambda part, key: part[key], keys, one)[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("fps.steady", 24.5),
        ("fps.wall", 30.0),
        ("latency.p99", 0.9),
        ("latency.chunks", [1.0] * 50),
        ("class", "playback"),
        ("class", "published"),
        ("size", "14B"),
        ("steps", [1, 1, 2]),
        ("chunks", 500),
        ("seconds", 1e9),
        ("full_length", False),
        ("published", None),
        ("split.decode", 0.0),
        ("parent_clock.worker_seconds", 1.0),
        ("roofline", []),
        ("least_seconds", 0.0),
        ("weights", "checkpoint"),
        ("amplify", False),
    ],
)
def test_no_edit_of_the_section_stands(path: str, value: Any) -> None:
    whole = report()
    edit(path, value)(whole)
    assert check(whole["realtime"], whole)


def both(told: dict[str, Any], device: str = H100) -> list[str]:
    """What is wrong with a report whose section was made from records that were edited as well."""
    whole = report(told, device)
    return check(whole["realtime"], whole)


def test_a_speed_above_the_ceilings_is_refused_though_all_else_agrees() -> None:
    assert both(facts(0.9, 200)) == []  # 36 FPS of at most 51
    wrong = both(facts(0.3, 500))
    assert len(wrong) == 1
    assert "110.00 FPS, and the measured ceilings allow" in wrong[0]


def test_a_ceiling_above_the_data_sheet_is_refused() -> None:
    whole = report()
    whole["cases"][0]["facts"]["rows"][0]["best"] = 1.2e15
    whole["realtime"] = section(whole["cases"], whole["backend"])
    wrong = check(whole["realtime"], whole)
    assert len(wrong) == 1
    assert "the data sheet of NVIDIA H100 SXM 80GB has 9.89e+14" in wrong[0]
    whole["backend"]["device"]["name"] = "a device without data sheet"
    whole["realtime"] = section(whole["cases"], whole["backend"])
    assert check(whole["realtime"], whole) == []


def test_a_patched_timer_contradicts_the_parents_clock() -> None:
    told = facts()
    told["seconds"] /= 10
    assert any("the worker's clock says" in line for line in both(told))


def test_a_timed_run_that_is_not_the_checked_one_is_refused() -> None:
    told = facts()
    told["checked"][2][2] = sha("another")
    assert any("not those of the checked run" in line for line in both(told))
    told = facts()
    told["told"][3][1]["frames"] = sha("another")
    assert any("the parent heard of" in line for line in both(told))


def test_parts_of_a_chunk_that_are_more_than_the_chunk_are_refused() -> None:
    told = facts()
    for shot in told["chunks"]:
        shot["split"]["decode"] = 5.0
    assert any("the parts of a chunk sum to" in line for line in both(told))


def test_weights_and_precision_are_those_of_the_report() -> None:
    whole = report()
    whole["weights"]["origin"] = "checkpoint"
    whole["scope"]["precision"] = "fp32"
    assert len(check(whole["realtime"], whole)) == 2


def test_a_section_without_run_and_a_run_without_section_are_refused() -> None:
    whole = report()
    assert check(None, whole)
    assert check(whole["realtime"], {**whole, "cases": []})
    assert check(None, {**whole, "cases": []}) == []


@pytest.mark.parametrize(
    "hostile", [{}, {"runs": 3}, {"runs": [{}]}, {"runs": [{"case": 1, "latency": {"chunks": []}}]}, 7, "x"]
)
def test_whatever_a_section_holds_nothing_is_raised(hostile: Any) -> None:
    assert check(hostile, report())
    assert check(hostile, {"cases": [{"level": "realtime"}], "backend": None})


def test_hostile_shapes_are_refused_before_anything_is_computed() -> None:
    told = facts(height=10**9, width=10**9)
    whole = report()
    whole["cases"][1]["facts"] = told
    assert any("disagree on whether there was a timed run" in line for line in check(whole["realtime"], whole))
