"""Builds of several processes, one of which may be killed. They build through the recorder, slowed down."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trt_rig import recorded

from helios_trt.store import Store, cache_folder

SHARED = Path(__file__).parents[2] / "shared"


def until(done: Callable[[], object], what: str) -> None:
    limit = time.monotonic() + 30
    while not done():
        assert time.monotonic() < limit, what
        time.sleep(0.01)


class Process:
    """One that builds; a child of the one that forks."""

    def __init__(self, pid: int, home: Path, name: str) -> None:
        self.pid, self._out, self._err = pid, home / f"{name}.out", home / f"{name}.err"

    @property
    def alive(self) -> bool:
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        return state != "Z"

    @property
    def said(self) -> str:
        return self._err.read_text() if self._err.exists() else ""

    def end(self, by: signal.Signals) -> None:
        os.kill(self.pid, by)
        until(lambda: not self.alive, f"{self.pid} does not end")

    def built(self) -> int:
        until(lambda: not self.alive, f"{self.pid} does not end")
        assert self._out.exists(), self.said
        return int(self._out.read_text())


@contextlib.contextmanager
def builder() -> Iterator[subprocess.Popen[str]]:
    """The one that forks; it and all that it forked are gone afterwards."""
    environment = {**os.environ, "PYTHONPATH": str(SHARED), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SHARED / "trt_builder.py")]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[str]]:
    with builder() as process:
        yield process


def fork(forks: subprocess.Popen[str], home: Path, seconds: float, name: str) -> Process:
    assert forks.stdin is not None
    assert forks.stdout is not None
    forks.stdin.write(f"{home} {seconds} {name}\n")
    forks.stdin.flush()
    return Process(int(forks.stdout.readline()), home, name)


@pytest.fixture
def begin(
    forks: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, float], Process]]:
    """Begin a process by name; its build takes 6 times so many seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def begun(name: str, seconds: float) -> Process:
        made.append(fork(forks, tmp_path, seconds, name))
        return made[-1]

    yield begun
    for process in made:
        if process.alive:
            process.end(signal.SIGKILL)


def building() -> list[Path]:
    return list((cache_folder() / "building").glob("*/model.onnx"))


def engines() -> int:
    return len(list(cache_folder().glob("*.engine")))


def test_build_that_is_killed_leaves_a_clean_next_start(begin: Callable[[str, float], Process]) -> None:
    first = begin("first", 60)
    until(building, "no build begins")
    first.end(signal.SIGKILL)
    assert len(building()) == 1  # what it left behind
    assert engines() == 0
    second = begin("second", 0)
    assert second.built() == 1
    assert "waiting" not in second.said  # the lock of a dead process is free
    assert not list((cache_folder() / "building").iterdir())
    assert engines() == 1


def test_two_processes_build_an_engine_once(begin: Callable[[str, float], Process]) -> None:
    first = begin("first", 0.2)
    until(building, "no build begins")
    second = begin("second", 0.2)
    assert (first.built(), second.built()) == (1, 0)
    assert "waiting for another process that builds product-" in second.said
    assert "waiting" not in first.said
    (entry,) = Store().entries()
    assert Store().fault(entry.name, entry.facts["environment"]) is None
    assert not list((cache_folder() / "building").iterdir())


def test_waiting_process_builds_where_the_first_is_killed(begin: Callable[[str, float], Process]) -> None:
    first = begin("first", 60)
    until(building, "no build begins")
    second = begin("second", 0)
    until(lambda: "waiting" in second.said, "the second does not wait")
    first.end(signal.SIGKILL)
    assert second.built() == 1
    assert engines() == 1


def test_start_does_not_remove_what_another_process_builds(begin: Callable[[str, float], Process]) -> None:
    first = begin("first", 0.2)
    until(building, "no build begins")
    with recorded(11):
        assert Store().clean() == []
        assert len(building()) == 1
    assert first.built() == 1


def test_interrupt_ends_a_build_and_leaves_nothing(begin: Callable[[str, float], Process]) -> None:
    """The build is told to stop by its monitor: an exception must not cross TensorRT."""
    first = begin("first", 0.5)
    until(building, "no build begins")
    until(lambda: "building the engine" in first.said, "no progress")
    first.end(signal.SIGINT)
    assert "KeyboardInterrupt" in first.said
    assert not list((cache_folder() / "building").iterdir())
    assert engines() == 0


@pytest.mark.parametrize("killed", [False, True])
def test_no_build_outlives_the_one_that_began_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool) -> None:
    """At the end of its input, as when these tests are killed, and when it is killed itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with builder() as forks:
        left = fork(forks, tmp_path, 60, "left")
        until(building, "no build begins")
        assert left.alive
        if killed:
            forks.kill()
    until(lambda: not left.alive, "the build goes on")
