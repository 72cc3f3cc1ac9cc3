"""Two bundles side by side."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from helios.cli import main
from helios.errors import InputError
from helios_conformance import compare


def case(told: dict[str, Any], name: str = "linear[bf16,small]") -> dict[str, Any]:
    return next(c for c in told["cases"] if c["id"] == name)


def test_a_bundle_against_itself_changed_nothing(closed: Any) -> None:
    found = compare.compare(closed.report(), closed.report())
    assert (found.regressions, found.improvements, found.slower, found.faster, found.environment) == ((),) * 5


def test_a_case_that_no_longer_passes_is_a_regression_and_back_an_improvement(closed: Any) -> None:
    worse = closed.report()
    case(worse).update(state="fail", reason="o0: norm of the error")
    worse["verdict"]["word"] = "not certified"
    found = compare.compare(closed.report(), worse)
    assert [(c.what, c.before) for c in found.regressions] == [("verdict", "certified"), ("linear[bf16,small]", "pass")]
    assert found.regressions[1].after == "fail: o0: norm of the error"
    back = compare.compare(worse, closed.report())
    assert (len(back.improvements), back.regressions) == (2, ())


def test_errors_that_grew_on_the_same_inputs(closed: Any) -> None:
    worse = closed.report()
    output = case(worse)["outputs"]["o0"]
    output["errors"]["norm"] *= 1.2
    assert compare.compare(closed.report(), worse).regressions == ()
    output["errors"]["norm"] *= 1.2
    (found,) = compare.compare(closed.report(), worse).regressions
    assert found.what == "linear[bf16,small] o0 norm"
    assert found.factor == pytest.approx(1.44)
    assert [c.what for c in compare.compare(worse, closed.report()).improvements] == [found.what]


def taking(told: dict[str, Any], part: float, statistic: str = "norm") -> dict[str, Any]:
    """The report with one error that takes a part of its bound."""
    output = case(told)["outputs"]["o0"]
    output["errors"][statistic] = part * output["bounds"][statistic]
    return told


def test_a_gain_near_zero_is_no_measure_of_growth(closed: Any) -> None:
    def found(before: float, after: float) -> int:
        a, b = (taking(closed.report(), part, "gain") for part in (before, after))
        return len(compare.compare(a, b).regressions)

    assert (found(0.01, -0.4), found(-0.01, 0.6), found(0.55, -0.6)) == (0, 1, 0)


def test_two_runs_of_one_backend_with_other_draws_compare_clean(
    closed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [closed] + [closed.with_nonce(nonce) for nonce in ("aaaa01", "bbbb02")]
    found = [compare.compare(a.report(), b.report()) for a, b in itertools.permutations(runs, 2)]
    assert [(f.regressions, f.improvements) for f in found] == [((), ())] * 6
    a, b = (run.write(tmp_path / str(i)) for i, run in enumerate(runs[:2]))
    assert main(["compare", str(a), str(b)]) == 0
    assert "beyond 0.8 of its bound and 3 times" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(compare, "OTHER_DRAWS", compare.Growth(0.1, 1.25))
    found = [compare.compare(a.report(), b.report()) for a, b in itertools.permutations(runs, 2)]
    assert any(f.regressions for f in found), "their errors do differ"


@pytest.mark.parametrize(("before", "after", "counts"), [(0.2, 0.9, True), (0.2, 0.7, False), (0.5, 0.9, False)])
def test_a_regression_shows_whatever_was_drawn(closed: Any, before: float, after: float, counts: bool) -> None:
    other = taking(closed.report(), after)
    other["suite"]["nonce"] = "aaaa01"
    found = compare.compare(taking(closed.report(), before), other)
    wanted = [("linear[bf16,small] o0 norm", f"{before:g} of its bound", f"{after:g} of its bound")] if counts else []
    assert [(c.what, c.before, c.after) for c in found.regressions] == wanted


def test_a_level_of_a_picture_is_off_or_is_not(closed: Any) -> None:
    a, b = taking(closed.report(), 0.0, "worst"), taking(closed.report(), 0.99, "worst")
    for told in (a, b):
        case(told)["outputs"]["o0"]["dtype"] = "uint8"
    assert compare.compare(a, b).regressions == ()
    assert len(compare.compare(a, taking(b, 0.9, "misrounded")).regressions) == 1


def test_errors_far_below_their_bound_never_count(closed: Any) -> None:
    a, b = closed.report(), closed.report()
    for told, norm in ((a, 1e-9), (b, 1e-8)):
        case(told)["outputs"]["o0"]["errors"]["norm"] = norm
    assert compare.compare(a, b).regressions == ()


def test_infinite_errors(closed: Any) -> None:
    worse = closed.report()
    case(worse)["outputs"]["o0"]["errors"]["worst"] = "inf"
    (found,) = compare.compare(closed.report(), worse).regressions
    assert (found.after, found.factor) == ("inf", None)


def test_times_are_hints(closed: Any) -> None:
    a, b = closed.report(), closed.report()
    case(a)["seconds"], case(b)["seconds"] = 0.2, 0.5
    case(a, "silu[bf16,odd]")["seconds"], case(b, "silu[bf16,odd]")["seconds"] = 0.001, 0.04  # too short to tell
    found = compare.compare(a, b)
    assert [(c.what, c.factor) for c in found.slower] == [("linear[bf16,small]", 2.5)]
    assert found.regressions == ()
    assert [c.what for c in compare.compare(b, a).faster] == ["linear[bf16,small]"]


def test_speed_of_the_level_realtime(closed: Any) -> None:
    a, b = closed.report(), closed.report()
    run = {"case": "realtime[bf16]", "fps": {"steady": 20.0}, "latency": {"p50": 1.6, "p99": 1.7}}
    a["realtime"] = {"runs": [run]}
    b["realtime"] = {"runs": [run | {"fps": {"steady": 10.0}, "latency": {"p50": 1.6, "p99": 1.2}}]}
    found = compare.compare(a, b)
    assert [(c.what, c.factor) for c in found.regressions] == [("realtime[bf16] fps steady", 0.5)]
    assert [c.what for c in found.improvements] == ["realtime[bf16] latency p99"]


def test_what_else_differs_and_what_makes_comparing_hard(closed: Any) -> None:
    other = closed.report()
    other["environment"]["packages"]["torch"] = "9.9"
    other["suite"] |= {"hash": "0" * 64, "nonce": "aa"}
    other["cases"] = other["cases"][1:]
    found = compare.compare(closed.report(), other)
    changed = {c.what: c.after for c in found.environment}
    assert changed["environment.packages.torch"] == "9.9"
    notes = " ".join(found.notes)
    for words in ("two suites made them", "drew other inputs", "only the first has 1 cases"):
        assert words in notes


def test_the_command(closed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = closed.write(tmp_path / "a")
    told = closed.report()
    case(told).update(state="fail", reason="wrong \x1b[31m")
    b = closed.forge(told, tmp_path / "b")
    assert main(["compare", str(a), str(a)]) == 0
    assert "No regression" in capsys.readouterr().out
    assert main(["compare", str(a), str(b)]) == 1
    said = capsys.readouterr().out
    assert "2 regressions" in said
    assert "\x1b" not in said
    assert main(["compare", str(a), str(b), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["regressions"][1]["what"] == "linear[bf16,small]"
    assert main(["compare", str(a), str(tmp_path / "none")]) == 2


def test_what_is_no_bundle_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"report\.json: it is missing"):
        compare.read(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(InputError, match="not as the schema says"):
        compare.read(tmp_path)
