"""The suite's own test in small: ten wrong backends of different families are caught, and the right one is not.

``make mutants`` runs all of them in both precisions.
"""

from __future__ import annotations

import pytest

from helios.backend import Backend, ReferenceBackend
from helios_conformance import references, suite
from helios_conformance.case import LEVELS, PRECISIONS, Case, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.mutants import MUTANTS, Bench, Mutant, attempt, kill, likeliest_first
from helios_conformance.mutants.mutant import backend_with, touched

TEN = {
    "attention_padding_masked": "fp32",
    "rms_eps_outside": "bf16",
    "linear_tf32": "fp32",
    "rope_bfloat16_table": "bf16",
    "unchecked_rows_only": "bf16",
    "cached_by_address": "fp32",
    "guard_after_input": "fp32",
    "poison_sensed": "bf16",
    "dmd_sigmas_swapped": "fp32",
    "fallback_taken": "fp32",
}
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(ReferenceBackend(), Root(3, "of the tests"), references.committed())


@pytest.mark.parametrize(("name", "precision"), TEN.items())
def test_ten_are_caught_and_the_right_backend_is_not(name: str, precision: str, bench: Bench) -> None:
    mutant = BY_NAME[name]
    found = attempt(mutant, bench, precision)
    assert found.kill is not None, f"{name} survived {found.tried} cases"
    assert LEVELS.index(found.kill.level) <= LEVELS.index(mutant.level)
    assert not bench.alarms  # every case that failed on the way is one that the right backend passes


QUANTISED = [(m.name, precision) for m in MUTANTS if m.family == "quantised" for precision in m.precisions]


@pytest.mark.parametrize(("name", "precision"), QUANTISED)
def test_quantised_products_that_are_almost_right_are_caught(name: str, precision: str, bench: Bench) -> None:
    found = attempt(BY_NAME[name], bench, precision)
    assert found.kill is not None, f"{name} survived {found.tried} cases"
    assert found.kill.level == "ops"
    assert not bench.alarms


def test_each_quantised_scope_has_a_mutant() -> None:
    assert {precision for _, precision in QUANTISED} == {"fp8", "fp8-attention", "fp8-weights"}


def test_the_unwrapped_backend_survives_the_same_cases(bench: Bench) -> None:
    nothing_wrong = Mutant("right", "Nothing.", "none", lambda b: backend_with(b), ops=touched(("rope",)))
    cases = likeliest_first(suite.choose("bf16", "quick", ("ops",)), nothing_wrong)[:20]
    assert {case.params["op"] for case in cases} <= nothing_wrong.ops
    assert [kill._killed_by(case, bench.session(nothing_wrong.apply(bench.right)), bench) for case in cases] == [
        None
    ] * 20


def test_there_are_more_than_forty_in_families_with_names_of_their_own() -> None:
    assert len(BY_NAME) == len(MUTANTS) >= 44
    assert len({mutant.family for mutant in MUTANTS}) >= 8
    assert {mutant.level for mutant in MUTANTS} == set(LEVELS)
    for mutant in MUTANTS:
        assert set() < set(mutant.precisions) <= set(PRECISIONS), mutant.name
        assert mutant.wrong.endswith("."), mutant.name
        assert mutant.repeats >= 1, mutant.name


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_each_leaves_the_right_backend_as_it_was(mutant: Mutant) -> None:
    right = ReferenceBackend()
    kernels, fusions, cls = dict(right.kernels), right.fusions, type(right)
    wrong = mutant.apply(right)
    assert isinstance(wrong, Backend)
    assert wrong is not right
    assert type(wrong) is not cls
    assert (type(right), right.fusions, dict(right.kernels)) == (cls, fusions, kernels)


def test_a_case_that_the_right_backend_fails_catches_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    alarmed = Bench(bench.right, bench.root, bench.references)
    wrong = Verdict("fail", "this case fails everything")
    monkeypatch.setattr(kill, "_run", lambda case, session, known: (Observation(), wrong))
    case = suite.choose("bf16", "quick", ("ops",))[0]
    assert kill._killed_by(case, alarmed.session(alarmed.right), alarmed) is None
    assert "this case fails everything" in alarmed.alarms[case.id]


def test_cases_of_the_mutants_own_level_and_ops_come_first() -> None:
    mutant = Mutant("m", "M.", "none", lambda b: b, "blocks", ops=touched(("rope",)))
    assert {"rope", "qk_norm_rope"} == mutant.ops
    cases = [
        Case("a[fp32,x]", "ops", "op_values", "fp32", {"op": "linear"}),
        Case("b[fp32,x]", "ops", "op_values", "fp32", {"op": "rope"}, "full"),
        Case("c[fp32,x]", "ops", "op_values", "fp32", {"op": "qk_norm_rope"}),
        Case("d[fp32,x]", "blocks", "block", "fp32"),
    ]
    assert [case.id[0] for case in likeliest_first(cases, mutant)] == ["d", "c", "b", "a"]
