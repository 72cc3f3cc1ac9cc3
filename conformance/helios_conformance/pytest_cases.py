"""The cases of the suite as items of pytest, with the ids that ``helios certify --filter`` takes.

A required case that is unsupported or was not run fails: what did not run is never green. What no certificate needs may
be absent, but what ran and was wrong fails. For a whole-graph engine single ops are diagnostic, so there they are
expected failures.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from helios.backend import names, parse_spec
from helios.errors import HeliosError, UnknownBackend, unknown_name
from helios_conformance import suite
from helios_conformance.case import LEVELS, PRECISIONS, SUITES, Case, Observation, Verdict, is_diagnostic
from helios_conformance.draws import Root
from helios_conformance.live import reproduce
from helios_conformance.references import committed
from helios_conformance.run import Setup
from helios_conformance.runner import Crew, Ended, Silent, check_filters, judged, precision_of, split_cores
from helios_conformance.workers import Lost, Refused

__all__ = ["Plugin", "add_options"]

FOLDER = Path(__file__).parent
FILE = FOLDER / "test_conformance.py"


def add_options(parser: pytest.Parser) -> None:
    """The options of ``helios certify`` that make sense here."""
    group = parser.getgroup("helios conformance")
    group.addoption("--backend", metavar="NAME", help="backend under judgement, such as cpu or cuda:1")
    group.addoption("--suite", choices=SUITES, default="quick", help="of cases (default: quick)")
    group.addoption("--level", choices=[*LEVELS, "all"], default="pipeline", help="highest (default: pipeline)")
    group.addoption("--precision", choices=PRECISIONS, help="of the arithmetic (default: the backend's first)")
    group.addoption("--filter", action="append", default=[], metavar="ID", help="only these cases; repeat it for more")
    group.addoption("--seed", type=int, default=0, metavar="N", help="of all draws (default: 0)")
    group.addoption("--nonce", default="", metavar="HEX", help="a challenge that somebody else chose")
    group.addoption("--timeout-factor", type=float, default=1.0, metavar="X", help="on the time of each case")


class Plugin:
    """Collects and runs the cases; registered only where the package is what pytest runs."""

    def pytest_configure(self, config: pytest.Config) -> None:
        try:
            config.stash[BENCH] = Bench(_setup(config))
        except HeliosError as error:
            raise pytest.UsageError(str(error)) from error

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        if BENCH in config.stash:
            config.stash[BENCH].close()

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Nothing else in this package is a test, not even where pytest looks for doctests."""
        ours = FOLDER in collection_path.parents
        return True if ours and collection_path != FILE and collection_path.is_file() else None

    @pytest.hookimpl(wrapper=True)
    def pytest_collect_file(
        self, file_path: Path, parent: pytest.Collector
    ) -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
        found = yield
        return [CaseFile.from_parent(parent, path=file_path)] if file_path == FILE else found

    def pytest_report_header(self, config: pytest.Config) -> str:
        setup = config.stash[BENCH].setup
        return f"helios conformance: backend {setup.spec}, {setup.suite} suite, seed {setup.root.seed}"


def _setup(config: pytest.Config) -> Setup:
    """What was asked for, checked without importing the backend."""
    get = config.getoption
    spec = get("--backend")
    if not spec:
        raise pytest.UsageError("--backend NAME says what is judged; `helios backends` lists what there is")
    name = parse_spec(spec)[0]
    if name not in names():
        raise UnknownBackend(unknown_name("backend", name, names()), "`helios backends` lists what is installed")
    precision = get("--precision") or precision_of(get("--filter"))
    check_filters(get("--filter"), precision)
    folder = Path(tempfile.mkdtemp(prefix="helios-conformance-"))
    return Setup(
        spec,
        precision,
        get("--suite"),
        suite.levels_up_to(get("--level")),
        tuple(get("--filter")),
        Root(get("--seed"), get("--nonce")),
        out=folder,
        timeout_factor=get("--timeout-factor"),
    )


class Bench:
    """The worker of this pytest process, started when it is first needed."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._crew = Crew(setup, split_cores()[0], Silent())
        self._references = committed()
        self._problem = ""
        self._kind = ""

    def cases(self) -> list[Case]:
        """Those of the run; without a precision the backend is asked for its first."""
        if not self.setup.precision:
            offered = [p for p in self._backend().get("precisions", ()) if p in PRECISIONS]
            self.setup = dataclasses.replace(self.setup, precision=(offered or list(PRECISIONS))[0])
        setup = self.setup
        return suite.choose(setup.precision, setup.suite, setup.levels, setup.filters)

    def _backend(self) -> dict[str, Any]:
        if self._problem:
            return {}
        try:
            return self._crew.ready().backend
        except (Refused, Ended) as error:
            self._problem = f"backend {self.setup.spec!r} cannot run here: {error}"
            return {}

    def verdict(self, case: Case) -> Verdict:
        """Run and judge one case."""
        observation = self._observed(case)
        return judged(case, observation, self.setup.root, self._references)

    def _observed(self, case: Case) -> Observation:
        backend = self._backend()
        if backend and case.precision not in backend["precisions"]:
            self._problem = f"the backend does not offer {case.precision}"
        if not self._problem:
            self._kind = backend["kind"]
            try:
                seen = self._crew.observe(case)[0]
                self._kind = "engine" if seen.facts.get("engine") is True else self._kind
                return seen
            except Lost as loss:
                return Observation(facts={"lost": str(loss)})
            except Ended as ended:
                self._problem = str(ended)
        return Observation(facts={"not_run": self._problem})

    def counts(self, case: Case, verdict: Verdict) -> str:
        """What a case that did not pass is here: ``fail``, ``skip`` or ``xfail``, as in a certificate."""
        diagnostic = is_diagnostic(self._kind, case.level)
        if verdict.state in ("unsupported", "not_run") and (diagnostic or not case.required):
            return "skip"
        return "xfail" if diagnostic else "fail"

    def close(self) -> None:
        import shutil

        self._crew.stop()
        shutil.rmtree(self.setup.out, ignore_errors=True)


BENCH: pytest.StashKey[Bench] = pytest.StashKey()


class CaseFile(pytest.File):
    """All cases of the run."""

    def collect(self) -> Iterator[CaseItem]:
        for case in self.config.stash[BENCH].cases():
            yield CaseItem.from_parent(self, name=case.id, case=case)


class NotPassed(Exception):
    """A case that did not pass."""


class CaseItem(pytest.Item):
    """One case."""

    def __init__(self, *, case: Case, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.case = case

    def runtest(self) -> None:
        bench = self.config.stash[BENCH]
        verdict = bench.verdict(self.case)
        if verdict.state == "pass":
            return
        told = f"{verdict.state.replace('_', ' ')}: {verdict.reason}"
        how = bench.counts(self.case, verdict)
        if how == "fail":
            raise NotPassed(told)
        pytest.skip(told) if how == "skip" else pytest.xfail(told)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        setup = self.config.stash[BENCH].setup
        if isinstance(excinfo.value, NotPassed):
            return f"{excinfo.value}\n{reproduce(setup.spec, self.case.id, setup.root)}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, self.name
