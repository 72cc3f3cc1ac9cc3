"""Reference errors: complete, finite, merged and compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from helios import op
from helios_conformance import checks, references, scope, suite
from helios_conformance.budget import Errors, rounds_once
from helios_conformance.case import PRECISIONS, Case, Suite
from helios_conformance.checks.pipeline import Codecs, videos
from helios_conformance.draws import Root
from helios_conformance.exact import scenarios
from helios_conformance.golden import calls_of
from helios_conformance.graph_runs import SceneCheck, wanted_of

ROOT = Root(0)
HERE = {"machine": "here", "torch": "1", "vectors": "none"}
SOME = Errors(0.1234567, 2.0, -3e-7, 0.25, 40)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_quick_case_of_an_op_has_its_reference(precision: str) -> None:
    known = references.committed().entries
    cases = [c for c in suite.choose(precision, "quick", ["ops"]) if c.check == "op_values"]
    missing = [c.id for c in cases if op.get(c.params["op"]).kind != "move" and c.id not in known]
    assert len(cases) > 150
    assert missing == []


def wanted(case: Case) -> set[str]:
    """The outputs of a case that are held to reference errors, told by its check without running anything."""
    check = checks.get(case.check)
    if isinstance(check, SceneCheck):
        scene = check.scene(case)
        dtype = scene.dtype(case.precision)
        if scene.forced:  # what it is asked needs the oracle's answers: any output will do
            return set()
        return set(wanted_of(scene, calls_of(scene, ROOT, dtype), dtype))
    if case.check == "video":
        return {f"c{i}.latents" for i in range(videos()[case.params["scene"]].chunks)}
    if case.check == "same":
        return {run.name for run in scenarios()[case.params["scene"]].runs if run.after is None}
    if case.check == "beside":
        return {f"{how}.{j}" for how in ("batch", "alone") for j in (0, 1)}
    if case.check == "codec":
        return {*Codecs.splits} | (set() if case.params.get("working") else {"encode_whole", "encode_group2"})
    return set()


UNHELD = ("free_run",)
"""Checks above the ops that are not numeric: a free run is drawn."""


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["quick", "full"])
def test_every_case_of_blocks_model_and_pipeline_has_its_reference(precision: str, name: Suite) -> None:
    """For each output, and for none that there is not."""
    known = references.committed().entries
    cases = [c for c in suite.choose(precision, name, ["blocks", "model", "pipeline"]) if c.check not in UNHELD]
    assert len(cases) > 50
    assert [c.id for c in cases if not known.get(c.id)] == []
    small = [c for c in cases if not c.params.get("scene", "").startswith(("14b", "mini", "wide"))]
    outputs = {c.id: wanted(c) for c in small}
    assert sum(map(bool, outputs.values())) > 20
    assert {i: sorted(w ^ set(known[i])) for i, w in outputs.items() if w and w != set(known[i])} == {}


CHEAP = ("block[{},tiny,odd]", "vae[{},decode_groups]", "sampler[{},dmd]", "forward[{},tiny,one_stage]")
CHEAP += ("steps[{},tiny,base]", "beside[{},batch2,base]")
OWN = [
    (case, precision)
    for case in CHEAP
    for precision in PRECISIONS
    if scope.dtype_scope(precision) == precision or case.partition("[")[0] not in scope.SHARED
]


@pytest.mark.parametrize(("case", "precision"), OWN)
def test_what_is_committed_above_the_ops_is_what_is_computed(case: str, precision: str) -> None:
    """Computed on another machine, so up to a quarter: an entry of another suite, scene or budget differs by more."""
    found = suite.find(case.format(precision))
    assert references.differing(references.committed().entries[found.id], references.of_case(found)) == []


def test_an_entry_of_another_scene_is_seen() -> None:
    one, other = (references.committed().entries[f"block[bf16,tiny,{scene}]"] for scene in ("no_history", "no_anchor"))
    worse = {name: Errors(e.norm * 1.5, e.worst, e.gain, e.misrounded, e.count) for name, e in one.items()}
    assert references.differing(one, worse)
    assert references.differing(one, {})
    assert one != other


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
