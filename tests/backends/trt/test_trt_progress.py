"""The line of a build: how far it is, and what happens to an exception on the way."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
import trt_acts
from trt_strict import Strict

from helios_trt.progress import Line, Phases, monitor


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_inner_phases_are_parts_of_the_next_step() -> None:
    phases = Phases(Clock())
    phases.start("build", 4)
    phases.step("build", 0)
    assert phases.done == 0.25
    phases.start("timing", 10)
    phases.step("timing", 4)
    assert phases.done == pytest.approx(0.25 + 0.25 * 0.5)
    phases.finish("timing")
    phases.step("build", 1)
    assert phases.done == 0.5


def test_done_never_falls_nor_passes_one() -> None:
    phases, seen = Phases(Clock()), []
    phases.start("build", 2)
    for outer in range(2):
        phases.start("inner", 3)
        for step in range(5):  # more than it said it would have
            phases.step("inner", step)
            seen.append(phases.done)
        phases.finish("inner")
        phases.step("build", outer)
        seen.append(phases.done)
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_phases_may_end_in_any_order_and_have_no_steps() -> None:
    phases = Phases(Clock())
    phases.finish("never begun")
    phases.start("outer", 0)
    phases.start("inner", 2)
    phases.finish("outer")
    phases.step("inner", 0)
    assert phases.done == 0.5


def test_estimate_is_there_once_there_is_something_to_estimate_from() -> None:
    clock = Clock()
    phases = Phases(clock)
    phases.start("build", 100)
    clock.now = 60
    assert "left" not in phases.text("x")
    phases.step("build", 9)
    assert phases.text("x") == "building the engine of x: build, 10 %, 1 min, some 9 min left"


def test_terminal_has_one_line_and_a_file_seldom_one() -> None:
    for stream, wanted in ((Terminal(), "\r\x1b[Ka\r\x1b[Kc\r\x1b[Kdone\n"), (StringIO(), "a\nd\ndone\n")):
        clock = Clock()
        line = Line(stream, clock)
        for at, text in ((0, "a"), (0.1, "b"), (1, "c"), (11, "d")):
            clock.now = at
            if not (stream.isatty() and text == "d"):
                line.now(text)
        line.say("done")
        assert stream.getvalue() == wanted


def watched(strict: Strict, line: Line) -> Any:
    return monitor(strict.module, "x", line)


@pytest.mark.parametrize("major", [10, 11])
def test_interrupt_does_not_cross_tensorrt_and_ends_the_build(major: int) -> None:
    class Interrupted(StringIO):
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    found = watched(Strict(major, trt_acts.ACTS), Line(Interrupted()))
    found.phase_start("build", None, 2)
    assert isinstance(found.stopped, KeyboardInterrupt)
    assert found.step_complete("build", 0) is False
    found.phase_finish("build")


@pytest.mark.parametrize("major", [10, 11])
def test_build_goes_on_while_nothing_is_wrong(major: int) -> None:
    out = StringIO()
    found = watched(Strict(major, trt_acts.ACTS), Line(out))
    found.phase_start("build", None, 2)
    assert found.step_complete("build", 0) is True
    assert "building the engine of x" in out.getvalue()
