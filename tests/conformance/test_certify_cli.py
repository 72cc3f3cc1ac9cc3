"""``helios certify`` and ``helios cases`` as they are typed: exit statuses, verdicts with reasons, interrupts."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from helios.cli import main
from helios_conformance import bundle, environment, suite
from helios_conformance.draws import Root
from helios_conformance.live import Progress, reproduce

Meet = Callable[[pytest.MonkeyPatch], None]
TIMED = ["--backend", "right", "--suite", "full", "--level", "realtime"]


@pytest.fixture(autouse=True)
def _strangers(monkeypatch: pytest.MonkeyPatch, meet_strangers: Meet) -> None:
    meet_strangers(monkeypatch)
    # Lowering the published size once more for each bundle would be most of the time here.
    monkeypatch.setattr(bundle.graphs, "of_spec", lambda *given: "left out by a test")


def report(out: Path) -> dict[str, Any]:
    assert (out / "report.html").is_file()
    assert (out / "MANIFEST.json").is_file()
    loaded: dict[str, Any] = json.loads((out / "report.json").read_text())
    return loaded


# --- verdicts -------------------------------------------------------------------------------------------------------


def test_a_filtered_run_passes_and_certifies_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    command = ["certify", "--backend", "right", "--filter", "add[bf16,small]", "--out", str(out), "--nonce", "00AA00BB"]
    assert main(command) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "passed, which is not a certification" in told
    assert f"Report: {out / 'report.html'}" in told
    made = report(out)
    assert made["verdict"]["word"] == "passed"
    assert made["suite"]["nonce"] == "00aa00bb"
    assert made["suite"]["levels"] == ["ops"], "the levels are those of the cases"
    assert [case["id"] for case in made["cases"]] == ["add[bf16,small]"]
    assert made["scope"]["precision"] == "bf16", "of the id"
    assert not (out / "cases").exists()
    assert not (out / "run.json").exists()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("zero", "no kernel"),
        ("noprobe", "the probe of backend 'noprobe' raised OSError: libcard.so: undefined symbol"),
        ("broken", "libbroken.so: no such file"),
        ("wild", "was killed by SIGSEGV"),
    ],
)
def test_strangers_are_not_certified_and_the_reason_is_told(
    spec: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert main(["certify", "--backend", spec, "--filter", "silu[fp32,small]", "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert "is not certified" in " ".join(captured.out.split())
    assert reason in " ".join((captured.out + captured.err).split())
    made = report(out)
    assert made["verdict"]["word"] == "not certified"
    assert reason in json.dumps(made)
    assert "Traceback" not in captured.err


def test_a_failure_comes_with_the_command_that_repeats_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    command = ["certify", "--backend", "wild", "--filter", "gelu[fp32,small]", "--seed", "7", "--nonce", "0011223344"]
    assert main([*command, "--out", str(out), "--json"]) == 1
    captured = capsys.readouterr()
    assert "FAIL gelu[fp32,small]: " in captured.err
    again = "helios certify --backend wild --filter 'gelu[fp32,small]' --seed 7 --nonce 0011223344"
    assert again in captured.err
    told = json.loads(captured.out)
    assert told["verdict"]["word"] == "not certified"
    assert told["report"] == str(out / "report.html")


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        ([], "helios backends"),
        (["--backend", "rihgt"], "'right'"),
        (["--backend", "right:"], "is not a backend"),
        (["--backend", "right", "--suite", "fulll"], "'full'"),
        (["--backend", "right", "--level", "block"], "'blocks'"),
        (["--backend", "right", "--precision", "fp64"], "fp32"),
        (["--backend", "right", "--filter", "silu[fp32,smal]"], "'silu[fp32,small]'"),
        (["--backend", "right", "--filter", "add[fp32,small]", "--filter", "add[bf16,small]"], "several precisions"),
        (["--backend", "right", "--nonce", "xyz"], "hexadecimal"),
        (["--backend", "right", "--timeout-factor", "0"], "--timeout-factor"),
        (["--backend", "right", "--model", "/nonexistent"], "is no folder"),
        (["--backend", "right", "--set", "chunks"], "NAME=VALUE"),
        (["--backend", "right", "--set", "imported=1"], "the suite says that itself"),
        (["--backend", "right", "--set", "resumed=1"], "the suite says that itself"),
        (["--backend", "right", "--set", "foo=1"], "unknown setting 'foo'"),
        ([*TIMED, "--set", "chunk=45"], "did you mean 'chunks'"),
        (["--backend", "right", "--set", "chunks=45"], "--set chunks=45 is of level realtime"),
        (["--backend", "right", "--size", "14b"], "--size is of level realtime"),
        (["--backend", "right", "--suite", "full", "--steps", "1,1,1"], "no case of that level is taken"),
        (["--backend", "right", "--level", "all", "--size", "tiny"], "--suite full"),
        (["--backend", "right", "--model", "."], "--model is of level realtime"),
        ([*TIMED, "--size", "15b"], "'14b'"),
        (["--resume", "--out", "x", "--height", "64"], "--height has no say with --resume"),
        (["--from-results", "x", "--set", "chunks=3"], "--set chunks=3 has no say with --from-results"),
        (["--backend", "right", "--resume"], "--out DIR"),
        (["--backend", "right", "--lvl", "ops"], "--lvl"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_a_mistake_exits_2_and_writes_nothing(
    arguments: list[str], near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["certify", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert near in captured.err
    assert list(tmp_path.iterdir()) == []


# --- interrupts -----------------------------------------------------------------------------------------------------


def finished(out: Path) -> int:
    return len(list((out / "cases").glob("*.json")))


def test_ctrl_c_ends_cleanly_and_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    command = [sys.executable, "-m", "helios", "certify", "--backend", "slow", "--out", str(out), "--seed", "5"]
    wanted = [f"add[fp32,{sample}]" for sample in ("small", "odd", "row")]
    command += [text for case in wanted for text in ("--filter", case)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd="/")
    deadline = time.monotonic() + 120
    while finished(out) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"helios certify --resume --out {out} goes on" in err
    before = finished(out)
    assert 0 < before < len(wanted), "interrupted in the middle"
    about = json.loads((out / "run.json").read_text())
    nonce, git = about["setup"]["root"]["nonce"], about["environment"]["git"]
    # Who commits while this test runs does not change what it runs.
    monkeypatch.setattr(environment, "_git", lambda module: git["helios" if module == "helios" else "backend"])
    assert main(["certify", "--resume", "--out", str(out)]) == 0
    made = report(out)
    assert (made["suite"]["seed"], made["suite"]["nonce"]) == (5, nonce)
    assert {case["id"]: case["state"] for case in made["cases"]} == dict.fromkeys(wanted, "pass")
    assert made["workers"] == {"started": 2, "lost": 0}
    assert made["setup"]["options"] == {"resumed": 1}
    capsys.readouterr()
    assert main(["certify", "--resume", "--out", str(out)]) == 2
    assert "is finished" in capsys.readouterr().err


# --- cases ----------------------------------------------------------------------------------------------------------


def test_cases_are_listed_as_filters_take_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cases", "list", "--level", "ops", "--precision", "bf16", "--filter", "add", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    wanted = [c for c in suite.all_cases("bf16") if c.id.startswith("add[")]
    assert [case["id"] for case in told] == [case.id for case in wanted] != []
    assert main(["cases", "list", "--filter", "add[bf16,small]"]) == 0
    assert "add[bf16,small]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value"), [("--level", "op"), ("--suite", "quik"), ("--precision", "fp33"), ("--filter", "ad[bf16]")]
)
def test_a_wrong_word_for_cases_is_a_mistake(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cases", "list", option, value]) == 2
    assert "did you mean" in capsys.readouterr().err


# --- the table ------------------------------------------------------------------------------------------------------


BACKEND: Mapping[str, Any] = {"label": "x[red]", "device": {"name": "A \x1b[31mcard"}, "emulated": ""}


def record(case: str, state: str, reason: str = "") -> dict[str, Any]:
    return {"id": case, "level": "ops", "state": state, "reason": reason, "required": True}


def shown(progress: Progress) -> str:
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=100).print(progress._table())
    return text.getvalue()


def test_the_table_counts_by_level(capsys: pytest.CaptureFixture[str]) -> None:
    cases = suite.choose("fp32", levels=["ops"])[:5]
    progress = Progress("x", Root(1, "ab"), terminal=False)
    progress.begin(cases, BACKEND)
    for case, state in zip(cases, ("pass", "pass", "fail", "unsupported"), strict=False):
        progress.at(case)
        progress.finished(record(case.id, state, "\x1b]0;owned\x07 why"))
    rows = [line.split() for line in shown(progress).splitlines() if " ops " in line]
    assert [word for word in rows[0] if word.isalnum()] == ["ops", "2", "1", "1", "1", "5"]
    assert "x[red]" in shown(progress)
    err = capsys.readouterr().err
    assert "\x1b" not in err, "what a stranger says moves no cursor"
    assert f"FAIL {cases[2].id}" in err
    assert reproduce("x", cases[2].id, Root(1, "ab")) in err
    assert f"UNSUPPORTED {cases[3].id}" in err


@pytest.mark.parametrize("told_by", ["backend", "record"])
def test_an_engines_single_ops_are_no_failures(told_by: str, capsys: pytest.CaptureFixture[str]) -> None:
    ops, blocks = (suite.choose("fp32", "quick", [level])[:3] for level in ("ops", "blocks"))
    progress = Progress("x", Root(), terminal=False)
    progress.begin([*ops, *blocks[:1]], BACKEND | ({"kind": "engine"} if told_by == "backend" else {}))
    engine = {"facts": {"engine": True}} if told_by == "record" else {}
    for case, state in zip(ops, ("fail", "unsupported", "pass"), strict=True):
        progress.finished(record(case.id, state, "why") | engine)
    progress.finished(record(blocks[0].id, "fail", "why") | {"level": "blocks"})
    err = capsys.readouterr().err
    assert f"DIAG {ops[0].id}: why" in err
    assert reproduce("x", ops[0].id, Root()) in err
    assert "UNSUPPORTED" not in err
    assert "ops: 1 diag, 1 passed, 1 unsupported" in err
    assert err.count("FAIL") == 1, "of the block, which counts"
    (row,) = [line for line in shown(progress).splitlines() if " ops " in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["ops", "1", "", "1", "1", "", "3"]


def test_many_cases_of_one_reason_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    cases = suite.choose("fp32", levels=["ops"])[:20]
    progress = Progress("x", Root(), terminal=False)
    progress.begin(cases, BACKEND | {"device": None})
    for case in cases:
        progress.finished(record(case.id, "not_run", "the device is gone"))
    err = capsys.readouterr().err
    assert err.count("the device is gone") == 1
    assert "ops: 20 not run" in err


def test_a_terminal_gets_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("x", Root(), terminal=True) as progress:
        progress.begin(suite.choose("fp32", levels=["ops"])[:2], BACKEND)
    assert "level" in capsys.readouterr().err
