"""Reference errors: complete, finite, merged and compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from helios import op
from helios_conformance import references, suite
from helios_conformance.budget import Errors, rounds_once
from helios_conformance.case import PRECISIONS

HERE = {"machine": "here", "torch": "1", "vectors": "none"}
SOME = Errors(0.1234567, 2.0, -3e-7, 0.25, 40)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_quick_case_of_an_op_has_its_reference(precision: str) -> None:
    known = references.committed().entries
    cases = [c for c in suite.choose(precision, "quick", ["ops"]) if c.check == "op_values"]
    missing = [c.id for c in cases if op.get(c.params["op"]).kind != "move" and c.id not in known]
    assert len(cases) > 150
    assert missing == []


def test_committed_numbers_make_sense() -> None:
    for case, rows in references.committed().entries.items():
        for errors in rows.values():
            numbers = (errors.norm, errors.worst, errors.gain, errors.misrounded)
            assert all(map(math.isfinite, numbers)), case
            assert 0 <= errors.misrounded <= 1, case
            assert abs(errors.gain) <= errors.norm * 1.01, case  # Cauchy and Schwarz
            assert errors.count > 0, case


def test_a_reference_that_rounds_once_is_known_as_such() -> None:
    """What the sharpest statistic hangs on."""
    known = references.committed()
    for case in ("add[bf16,odd]", "gelu[bf16,wide]", "linear[bf16,wide]", "rope[bf16,long]", "adaln[bf16,long]"):
        assert rounds_once(known.get(case, "o0")), case
    for case in ("attention[bf16,head128]", "linear_gelu[bf16,long]", "linear[fp32,wide]"):
        assert not rounds_once(known.get(case, "o0")), case


def test_the_text_is_deterministic_and_reads_back() -> None:
    text = references.encode({"b[bf16,x]": {"o1": SOME, "o0": SOME}, "a[bf16,x]": {"o0": SOME}}, [HERE, HERE])
    assert text == references.encode({"a[bf16,x]": {"o0": SOME}, "b[bf16,x]": {"o0": SOME, "o1": SOME}}, [HERE])
    assert json.loads(text)["made"] == [HERE]
    assert references.decode(text).get("b[bf16,x]", "o1") == Errors(0.123457, 2.0, -3e-7, 0.25, 40)


def test_an_infinite_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        references.encode({"a[bf16,x]": {"o0": Errors(math.inf, 1, 1, 1, 1)}}, [HERE])


def test_what_is_missing_names_its_command() -> None:
    with pytest.raises(KeyError, match=r"python -m helios_conformance.references 'a\[bf16,x\]'"):
        references.References({}).get("a[bf16,x]", "o0")


def test_merging_keeps_others_and_drops_what_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "_file", lambda: tmp_path / "references.json")
    there = {**HERE, "machine": "there"}
    assert (
        references.merge({"a[bf16,x]": {"o0": SOME}, "b[bf16,x]": {"o0": SOME}}, {"a[bf16,x]", "b[bf16,x]"}, HERE) == 2
    )
    assert references.merge({"c[bf16,x]": {"o0": SOME}}, {"a[bf16,x]", "c[bf16,x]"}, there) == 2
    told = json.loads((tmp_path / "references.json").read_text())
    assert sorted(told["errors"]) == ["a[bf16,x]", "c[bf16,x]"]
    assert told["made"] == [HERE, there]
    assert references.merge({c: {"o0": SOME} for c in told["errors"]}, set(told["errors"]), there) == 2
    assert json.loads((tmp_path / "references.json").read_text())["made"] == [there]  # all of it is made here
    assert [p.name for p in tmp_path.iterdir()] == ["references.json"]


def test_check_compares(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert references.main(["--check", "--precision", "bf16", "add[bf16,small]", "concat[bf16,one]"]) == 0
    wrong = {"add[bf16,small]": {"o0": Errors(0.5, 0.5, 0.0, 0.0, 48)}}
    monkeypatch.setattr(references, "committed", lambda: references.References(wrong))
    assert references.main(["--check", "add[bf16,small]"]) == 1
    assert "add[bf16,small]: o0 norm" in capsys.readouterr().out
    assert references.main(["--check", "no_such_case"]) == 1
