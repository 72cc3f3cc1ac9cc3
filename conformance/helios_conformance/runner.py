"""The run itself: cases to a worker one after the other, and their judgement beside it in a thread of the parent.

The judged backend is never imported here. A worker that is lost fails the case that it was at and is replaced. All
levels run, also after one that failed: what fails above is worth knowing, though nothing above can be certified then.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from helios.backend import parse_spec
from helios.errors import InputError, unknown_name
from helios_conformance import environment, execute, suite
from helios_conformance.case import PRECISIONS, Case, Observation, Verdict
from helios_conformance.differences import differences
from helios_conformance.draws import Root
from helios_conformance.record import record, tensors_of
from helios_conformance.references import References, committed
from helios_conformance.run import UNASKED, RunFolder, RunResult, Setup, in_order, now
from helios_conformance.subject import distribution
from helios_conformance.workers import Lost, Refused, Worker, peak_rss

__all__ = ["Crew", "Desk", "Runner", "Watcher", "check_filters", "judged", "precision_of", "split_cores"]

STARTS = 3
"""Losses in a row while starting, after which the run ends."""
LOSSES = 40
"""Losses in a row in cases: the device is gone, or the backend can do nothing at all."""
GRACE = 10.0
"""Seconds that judgement has after an interrupt for what the device has computed already."""
_NAMED = 5
"""Differences of an environment that are named."""
_AHEAD = 4
"""Cases that may wait for judgement before the worker gets another."""


class Watcher(Protocol):
    """Who is told how the run goes; a table on a terminal, say."""

    def begin(self, cases: Sequence[Case], backend: Mapping[str, Any]) -> None: ...
    def at(self, case: Case) -> None: ...
    def finished(self, record: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """Nobody watches."""

    def begin(self, cases: Sequence[Case], backend: Mapping[str, Any]) -> None: ...
    def at(self, case: Case) -> None: ...
    def finished(self, record: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


class Ended(Exception):
    """No further case can be run; the text says why."""


def split_cores() -> tuple[int, int]:
    """Threads of the worker and of the parent's judgement: half the cores each, one at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    most = int(asked) if asked.isdigit() and int(asked) else cores
    judging = max(1, cores // 2)
    return min(most, max(1, cores - judging)), min(most, judging)


class Crew:
    """One worker after the other: starts them, replaces the lost, and keeps the count.

    Args:
        setup: of the run.
        threads: of a worker.
        watcher: told of each loss.
    """

    def __init__(self, setup: Setup, threads: int, watcher: Watcher) -> None:
        self._setup, self._watcher = setup, watcher
        self._start = {
            "backend": setup.spec,
            "seed": setup.root.seed,
            "nonce": setup.root.nonce,
            "model": setup.model,
            "options": dict(setup.options),
            "threads": threads,
        }
        self._worker: Worker | None = None
        self.started = self.lost = self.peak = self._in_a_row = 0

    def ready(self) -> Worker:
        """The worker, started anew where there is none. Raises Refused, or Ended after some losses in a row."""
        reason = ""
        for _ in range(STARTS):
            if self._worker is not None:
                return self._worker
            self.started += 1
            try:
                self._worker = Worker(self._start, self._setup.out, self._setup.timeout_factor)
            except Lost as loss:
                self.lost += 1
                reason = str(loss)
                self._watcher.note(reason)
        if self._worker is None:
            raise Ended(f"{STARTS} workers in a row were lost before they were ready: {reason}")
        return self._worker

    def observe(self, case: Case) -> tuple[Observation, float]:
        """What came back, and seconds. Raises Lost, or Ended where no other worker can be had."""
        if self._in_a_row >= LOSSES:
            raise Ended(f"{LOSSES} cases in a row lost their worker; the last of them says how")
        try:
            worker = self.ready()
        except Refused as refused:
            raise Ended(f"a worker was lost, and no other can start: {refused.why}") from refused
        try:
            observation, seconds = worker.observe(case, case.timeout * self._setup.timeout_factor)
        except Lost as loss:
            self.lost += 1
            self._in_a_row += 1
            self.stop()
            self._watcher.note(str(loss))
            raise
        self._in_a_row = 0
        return observation, seconds

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self.peak, self._worker = max(self.peak, self._worker.peak), None


def judged(case: Case, observation: Observation, root: Root, references: References) -> Verdict:
    """The verdict. A case that the suite itself cannot judge has not passed."""
    try:
        return execute.judge(case, observation, root, references)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = error.args[0] if isinstance(error, KeyError) and error.args else error  # a KeyError prints as a repr
        text = f"{type(error).__name__}: {what} ({os.path.basename(where.filename)}:{where.lineno})"
        return Verdict("fail", f"what came back cannot be judged: {text}"[:2000])


def check_filters(filters: Sequence[str], precision: str = "") -> None:
    """Raises InputError with the nearest id for a filter that takes no case (of that precision)."""
    precisions = [precision] if precision else PRECISIONS
    ids = [case.id for p in precisions for case in suite.all_cases(p)]
    for pattern in filters:
        if not any(suite.matches(case, pattern) for case in ids):
            why = unknown_name("case", pattern, ids).partition(" Known:")[0]
            raise InputError(why.rstrip(":"), "`helios cases list` prints all ids; * stands for any characters")


class Desk:
    """Where observations are judged and entered, in order: one thread, with the cores that the worker leaves.

    Args:
        root, references: what judging needs.
        threads: of the arithmetic.
        books: where finished cases go.
    """

    def __init__(self, root: Root, references: References, threads: int, books: Books) -> None:
        self._root, self._references, self._books = root, references, books
        # The number of threads of torch is each thread's own.
        self._thread = ThreadPoolExecutor(1, "judge", torch.set_num_threads, (threads,))
        self._waiting: collections.deque[Future[None]] = collections.deque()

    def take(self, case: Case, observation: Observation, seconds: float) -> None:
        """Put it in the line. Waits while the line is long; raises what an earlier entry raised (a full disk, say)."""
        self.drain(_AHEAD)
        self._waiting.append(self._thread.submit(self._finish, case, observation, seconds))

    def _finish(self, case: Case, observation: Observation, seconds: float) -> None:
        verdict = judged(case, observation, self._root, self._references)
        self._books.enter(record(case, observation, verdict, seconds), tensors_of(case.id, observation))

    def drain(self, left: int = 0) -> None:
        """Wait until only so many are in the line."""
        while len(self._waiting) > left:
            self._waiting.popleft().result()

    def close(self) -> None:
        """What the device has computed is judged still, for a while; the rest is dropped."""
        futures.wait(self._waiting, GRACE)
        self._thread.shutdown(wait=False, cancel_futures=True)


def precision_of(filters: Sequence[str]) -> str:
    """The precision that the ids name, "" where none does: so that an id alone says all.

    Raises InputError where they name several.
    """
    found = {name for name in PRECISIONS for pattern in filters if re.search(rf"\[{name}[,\]]", pattern)}
    if len(found) > 1:
        raise InputError("the filters name several precisions, and a run has one", "run once for each")
    return found.pop() if found else ""


@dataclasses.dataclass
class Runner:
    """A run from beginning to end.

    Args:
        setup: what to do.
        watcher: told how it goes.
        resume: go on with the run in ``setup.out``; of the setup only the folder counts then.
        references: of the suite; others for tests.
    """

    setup: Setup
    watcher: Watcher = dataclasses.field(default_factory=Silent)
    resume: bool = False
    references: References = dataclasses.field(default_factory=committed)

    def run(self) -> RunResult:
        """Run all cases that are not finished yet.

        Raises:
            InputError, StateError: before it starts: the folder, a filter, or what is resumed makes no sense.
            KeyboardInterrupt: the folder is ready to go on.
        """
        folder, about = self._folder()
        threads = split_cores()
        done = {i: told for i, told in folder.records().items() if told["state"] != "not_run"}
        crew = Crew(self.setup, threads[0], self.watcher)
        desk = Desk(self.setup.root, self.references, threads[1], Books(folder, done, self.watcher))
        try:
            problem = self._meet(crew, about)
            folder.note(about)
            cases = self._begin(about["backend"], done)
            problem = self._work([case for case in cases if case.id not in done], crew, desk, problem)
        finally:
            crew.stop()
            desk.close()
            _count(about, crew)
            folder.note(about)
        records, backend = in_order(cases, done), about["backend"]
        return RunResult(
            self.setup,
            records,
            backend,
            about["environment"],
            about["started"],
            now(),
            about["peak_rss"],
            about["workers"],
            problem,
            about["resumed"],
        )

    def _folder(self) -> tuple[RunFolder, dict[str, Any]]:
        if self.resume:
            folder, about = RunFolder.open(self.setup.out, suite.suite_hash())
            self.setup = Setup.of(about["setup"], self.setup.out)
            return folder, about
        check_filters(self.setup.filters, self.setup.precision)
        return RunFolder.create(self.setup, suite.suite_hash())

    def _meet(self, crew: Crew, about: dict[str, Any]) -> str:
        """Start the first worker and settle what depends on its backend; why nothing can run, or ""."""
        withheld: Mapping[str, str] = {}
        try:
            worker, problem = crew.ready(), ""
            backend, withheld = worker.backend, worker.withheld
        except Refused as refused:
            backend, problem = _nobody(self.setup.spec), f"backend {self.setup.spec!r} cannot run here: {refused.why}"
        except Ended as ended:
            backend, problem = _nobody(self.setup.spec), str(ended)
        machine = environment.read(backend)
        before = about.get("backend")
        if before and before["device"] and backend["device"]:
            _same_or_refuse(before, backend, about["environment"], machine)
        about |= {"backend": backend, "environment": machine, "resumed": about.get("resumed", -1) + 1}
        problem = problem or self._settle(backend["precisions"], withheld)
        self.setup = dataclasses.replace(self.setup, precision=self.setup.precision or PRECISIONS[0])
        about["setup"] = self.setup.told()
        return problem

    def _settle(self, offered: Sequence[str], withheld: Mapping[str, str]) -> str:
        """Take the backend's first precision where none was asked for."""
        possible = [name for name in offered if name in PRECISIONS]
        names = ", ".join(offered) or "none"
        if not possible:
            return f"the backend offers no precision that can be certified ({' or '.join(PRECISIONS)}), but {names}"
        if self.setup.precision and self.setup.precision not in possible:
            why = withheld.get(self.setup.precision, "")
            return f"the backend does not offer {self.setup.precision}, but {names}" + (f"; {why}" if why else "")
        self.setup = dataclasses.replace(self.setup, precision=self.setup.precision or possible[0])
        return ""

    def _begin(self, backend: Mapping[str, Any], done: Mapping[str, dict[str, Any]]) -> list[Case]:
        setup = self.setup
        check_filters(setup.filters, setup.precision)
        cases = suite.choose(setup.precision, setup.suite, setup.levels, setup.filters)
        self.watcher.begin(cases, backend)
        for told in in_order(cases, done):
            self.watcher.finished(told)
        return cases

    def _work(self, todo: Sequence[Case], crew: Crew, desk: Desk, problem: str) -> str:
        """Run the cases, ahead of their judgement; why it ended early, or ""."""
        for case in todo:
            self.watcher.at(case)
            if case.level == "realtime":  # what is timed shares the host with no judgement
                desk.drain()
            observation, seconds, problem = _observed(case, crew, problem)
            desk.take(case, observation, seconds)
        desk.drain()
        return problem


@dataclasses.dataclass(frozen=True, slots=True)
class Books:
    """Where finished cases are entered."""

    folder: RunFolder
    done: dict[str, dict[str, Any]]
    watcher: Watcher

    def enter(self, told: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """On the disk first."""
        self.folder.add(told, tensors)
        self.done[told["id"]] = told
        self.watcher.finished(told)


def _observed(case: Case, crew: Crew, problem: str) -> tuple[Observation, float, str]:
    """What came back, seconds, and from now on why no case can be run."""
    if not problem:
        begin = time.monotonic()
        try:
            return *crew.observe(case), ""
        except Lost as loss:
            return Observation(facts={"lost": str(loss)}), time.monotonic() - begin, ""
        except Ended as ended:
            problem = str(ended)
    return Observation(facts={"not_run": problem}), 0.0, problem


def _same_or_refuse(
    before: Mapping[str, Any], backend: Mapping[str, Any], then: Mapping[str, Any], machine: Mapping[str, Any]
) -> None:
    """One bundle tells of one backend in one environment. Raises InputError where a run would go on in another."""
    if _identity(before) != _identity(backend):
        why = f"{backend['class']} on {backend['device']['name']} is not what the run was begun with"
        raise InputError(f"--resume: {why}", "start anew with another --out")
    found = differences(
        {"threads": backend["threads"], **machine}, {"threads": before["threads"], **then}, "environment"
    )
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        told = "; ".join(f"{place}: {what}" for place, what in found[:_NAMED])
        why = f"--resume: the environment is not the one that the run was begun in: {told}{more}"
        raise InputError(why, "bring it back, or start anew with another --out")


def _identity(backend: Mapping[str, Any]) -> tuple[Any, ...]:
    return backend["class"], backend["version"], backend["device"]["name"], backend["device"]["index"]


def _nobody(spec: str) -> dict[str, Any]:
    """What is known of a backend that cannot start."""
    return {
        "name": parse_spec(spec)[0],
        "label": spec,
        "class": "",
        **distribution(parse_spec(spec)[0]),
        **UNASKED,
        "threads": 0,
    }


def _count(about: dict[str, Any], crew: Crew) -> None:
    """Add what this process used to what those before it did."""
    peak, workers = about.get("peak_rss", {}), about.get("workers", {})
    about["peak_rss"] = {
        "parent": max(peak.get("parent", 0), peak_rss()),
        "worker": max(peak.get("worker", 0), crew.peak),
    }
    about["workers"] = {
        "started": workers.get("started", 0) + crew.started,
        "lost": workers.get("lost", 0) + crew.lost,
    }
