"""Every Triton kernel in the interpreter, judged by the conformance suite like any backend: its cases, its budgets."""

from __future__ import annotations

import pytest

from helios.backend import select
from helios_conformance import execute, references, scope, suite
from helios_conformance.case import Case
from helios_conformance.draws import Root
from helios_conformance.session import Session
from helios_cuda.kernels import KERNELS

CHECKS = ("op_values", "op_specials", "op_misfed")
SLOW = ("long", "long_keys")
"""Samples of more than 8,192 tokens: a Python call per program makes minutes of them."""


def scopes(name: str) -> list[str]:
    """Plain precisions, or the first of those that quantise: in the others the cases are the same."""
    quantised = [precision for precision in scope.QUANTISED if name in scope.ops(precision)]
    return quantised[:1] or ["bf16", "fp32"]


EACH = pytest.mark.parametrize(("name", "precision"), [(n, p) for n in sorted(KERNELS) for p in scopes(n)])


def cases(name: str, precision: str) -> list[Case]:
    listed = suite.choose(precision, "quick", ["ops"])
    return [case for case in listed if case.params.get("op") == name and case.check in CHECKS]


def slow(case: Case) -> bool:
    return str(case.params.get("sample")) in SLOW


def judge(name: str, precision: str, *, long: bool) -> None:
    session = Session(select("cuda:interpret"), Root(11, "n"))
    chosen = [case for case in cases(name, precision) if slow(case) == long]
    verdicts = {case.id: execute.run_here(case, session, references.committed())[1] for case in chosen}
    assert {i: v.reason for i, v in verdicts.items() if v.state != "pass"} == {}
    assert verdicts or long


@EACH
def test_kernels_pass_the_suite(name: str, precision: str) -> None:
    judge(name, precision, long=False)


@pytest.mark.slow
@EACH
def test_kernels_pass_beyond_8192_tokens(name: str, precision: str) -> None:
    judge(name, precision, long=True)
