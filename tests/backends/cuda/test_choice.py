"""Choosing among ways to compute: fastest of the right ones, recorded, replayed, never measured inside a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from helios.errors import BackendError
from helios_cuda.choice import Choices, Variant

Run = Callable[[int], int]


def broken(_x: int) -> int:
    raise RuntimeError("out of memory\nin detail")


def made(**others: Run) -> Choices:
    first = Variant("sure", lambda x: x + 1, version=lambda: "1")
    rest = [Variant(name, run, lambda x: "odd" if x % 2 else "", lambda: "2") for name, run in others.items()]
    return Choices([first, *rest])


def choose(choices: Choices, seconds: dict[str, float], x: int = 4) -> str:
    """With a clock that knows how long each way takes."""
    names = {id(v.run): v.name for v in choices.variants.values()}

    def clock(call: Callable[[], object]) -> float:
        call()
        way: Any = call
        return seconds[names[id(way.func)]]

    return choices.choose("form", lambda: (x,), clock, lambda a, b: "" if a == b else "wrong", "a device")


def test_the_fastest_right_way_is_chosen_and_run() -> None:
    choices = made(fast=lambda x: 1 + x, wrong=lambda x: x, lost=broken)
    assert choose(choices, {"sure": 2.0, "fast": 1.0, "wrong": 0.1}) == "fast"
    entry = choices.record["form"]
    assert (entry["variant"], entry["version"], entry["device"]) == ("fast", "2", "a device")
    assert entry["seconds"] == {"sure": 2.0, "fast": 1.0}
    assert entry["why_not"] == {"wrong": "wrong", "lost": "out of memory"}
    assert choices.run("form", 6) == 7


def test_noise_does_not_decide() -> None:
    assert choose(made(fast=lambda x: 1 + x), {"sure": 1.0, "fast": 0.99}) == "sure"


def test_what_is_not_there_is_not_measured() -> None:
    choices = made(fast=lambda x: 1 + x)
    assert choose(choices, {"sure": 1.0}, x=3) == "sure"
    assert choices.record["form"]["why_not"] == {"fast": "odd"}


def test_without_the_first_there_is_nothing_to_agree_with() -> None:
    choices = Choices([Variant("sure", broken), Variant("fast", lambda x: x)])
    assert choose(choices, {}) == "sure"
    assert choices.record["form"]["why_not"] == {"sure": "out of memory"}


def test_a_form_that_nobody_chose_for_runs_the_first_way_and_is_recorded() -> None:
    choices = made(fast=lambda x: 1 + x)
    assert choices.run("new", 4) == 5
    assert choices.record["new"]["variant"] == "sure"
    again = made(fast=lambda x: 1 + x)
    again.replay(choices.record, "any device")
    assert again.record == choices.record


def test_a_record_is_replayed_or_refused() -> None:
    choices = made(fast=lambda x: 1 + x)
    choose(choices, {"sure": 2.0, "fast": 1.0})
    again = made(fast=lambda x: 1 + x)
    again.replay(choices.record, "a device")
    assert again.run("form", 4) == 5
    with pytest.raises(BackendError, match="odd"):
        again.run("form", 5)
    with pytest.raises(BackendError, match="this is another"):
        again.replay(choices.record, "another")
    with pytest.raises(BackendError, match="known are sure"):
        made().replay(choices.record, "a device")
    newer = Choices([Variant("sure", lambda x: x), Variant("fast", lambda x: x, version=lambda: "3")])
    with pytest.raises(BackendError, match="here it is 3"):
        newer.replay(choices.record, "a device")
