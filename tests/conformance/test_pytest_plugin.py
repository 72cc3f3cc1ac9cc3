"""``pytest --pyargs helios_conformance``: the same ids, nothing green that did not run, other projects left alone."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# It registers with torch once, and pytester forgets the modules that a run inside imports first.
import torch._inductor.test_operators  # noqa: F401

from helios_conformance import pytest_cases, suite
from helios_conformance.case import Level, State, Verdict
from helios_conformance.pytest_plugin import asked_for

pytest_plugins = ["pytester"]

Meet = Callable[[pytest.MonkeyPatch], None]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in a folder of somebody else's."""
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-rA", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """By id, from the short summary."""
    found = {}
    for line in done.stdout.splitlines():
        word, _, rest = line.partition(" ")
        if word in ("PASSED", "FAILED", "SKIPPED", "XFAIL", "ERROR") and "::" in rest:
            found[rest.partition("::")[2].partition(" - ")[0]] = word
    return found


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        (["--pyargs", "helios_conformance", "--backend", "cpu"], True),
        (["--pyargs", "helios_conformance.test_conformance::add[bf16,small]"], True),
        (["/x/helios_conformance/test_conformance.py::add[bf16,small]"], True),
        (["/x/helios_conformance/"], True),
        (["tests/helios_conformance_notes.py"], False),
        (["--pyargs", "other", "--backend", "cpu"], False),
        (["-phelios_conformance"], False),
        ([], False),
    ],
)
def test_it_joins_in_where_the_package_is_asked_for(arguments: list[str], ours: bool) -> None:
    assert asked_for(arguments) is ours


def test_ids_are_those_of_the_suite(pytester: pytest.Pytester) -> None:
    ours = ("--pyargs", "helios_conformance", "--backend", "cpu", "--precision", "fp32")
    done = pytester.runpytest_inprocess(*ours, "--co", "-q")
    assert done.ret == 0
    ids = [line.partition("::")[2] for line in done.outlines if "::" in line]
    assert ids == [c.id for c in suite.choose("fp32", "quick", suite.levels_up_to("pipeline"))]


def test_each_case_has_its_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meet_strangers: Meet) -> None:
    meet_strangers(monkeypatch)
    cases = ["add[fp32,small]", "clamp[fp32,unit]", "gelu[fp32,small]"]
    filters = [text for case in cases for text in ("--filter", case)]
    # In a process of its own, with doctests and warnings as errors: settings that a project may have.
    done = run(
        tmp_path, "--pyargs", "helios_conformance", "--backend", "wild", *filters, "--doctest-modules", "-Werror"
    )
    assert outcomes(done) == dict(zip(cases, ("PASSED", "FAILED", "FAILED"), strict=True)), done.stdout + done.stderr
    assert done.returncode == 1
    assert "exited with status 3 in clamp[fp32,unit]" in done.stdout
    assert "helios certify --backend wild --filter 'gelu[fp32,small]' --seed 0" in done.stdout


@pytest.mark.parametrize(("spec", "reason"), [("zero", "unsupported: "), ("noprobe", "undefined symbol")])
def test_what_is_unsupported_or_cannot_run_is_not_green(
    spec: str, reason: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, meet_strangers: Meet
) -> None:
    meet_strangers(monkeypatch)
    ours = ("--pyargs", "helios_conformance", "--backend", spec)
    done = pytester.runpytest_inprocess(*ours, "--filter", "add[fp32,small]")
    done.assert_outcomes(failed=1)
    assert done.ret == 1
    assert any(reason in line for line in done.outlines)


def test_one_case_by_its_node_id(pytester: pytest.Pytester) -> None:
    name = "helios_conformance.test_conformance::add[fp32,small]"
    done = pytester.runpytest_inprocess("--pyargs", name, "--backend", "reference", "--precision", "fp32")
    done.assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("kind", "level", "required", "wanted"),
    [
        ("kernels", "ops", True, {"fail": "fail", "unsupported": "fail", "not_run": "fail"}),
        # What no certificate needs may be absent, but not wrong.
        ("kernels", "ops", False, {"fail": "fail", "unsupported": "skip", "not_run": "skip"}),
        ("engine", "ops", True, {"fail": "xfail", "unsupported": "skip", "not_run": "skip"}),
        ("engine", "blocks", True, {"fail": "fail", "unsupported": "fail", "not_run": "fail"}),
        ("engine", "blocks", False, {"fail": "fail", "unsupported": "skip", "not_run": "skip"}),
    ],
)
def test_what_did_not_pass_counts_as_in_a_certificate(
    kind: str, level: Level, required: bool, wanted: dict[State, str]
) -> None:
    case = dataclasses.replace(suite.find("add[fp32,small]"), level=level, required=required)
    bench = pytest_cases.Bench.__new__(pytest_cases.Bench)
    bench._kind = kind
    assert {state: bench.counts(case, Verdict(state, "why")) for state in wanted} == wanted


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        ([], "--backend NAME"),
        (["--backend", "cup"], "did you mean 'cpu'"),
        (["--backend", "cpu", "--filter", "ad[fp32,small]"], "did you mean"),
        (["--backend", "cpu", "--suite", "quik"], "quick"),
    ],
)
def test_a_mistake_is_a_usage_error(arguments: list[str], near: str, pytester: pytest.Pytester) -> None:
    done = pytester.runpytest_inprocess("--pyargs", "helios_conformance", *arguments)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert any(near in line for line in done.errlines)


def test_another_project_keeps_its_own_options(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n"
        "    for name in ('--backend', '--suite', '--level', '--precision', '--filter', '--seed'):\n"
        "        parser.addoption(name)\n"
    )
    (tmp_path / "test_theirs.py").write_text(
        "import sys\n"
        "def test_theirs(request):\n"
        "    assert request.config.getoption('--backend') == 'theirs'\n"
        "    assert 'torch' not in sys.modules\n"
        "    assert 'helios_conformance.pytest_cases' not in sys.modules\n"
    )
    done = run(tmp_path, "--backend", "theirs")
    assert outcomes(done) == {"test_theirs": "PASSED"}, done.stdout + done.stderr
