"""Refusals: every error case of the record, and programs that are fed wrongly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import helios.ops  # noqa: F401
from helios import op
from helios.backend import Backend, ReferenceBackend
from helios.kernel_program import KernelProgram
from helios.lower import compile_kernels
from helios.passes import Plan
from helios.program import EMPTY, Context, Program
from helios_conformance import execute, references, scope, suite
from helios_conformance.case import PRECISIONS, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.session import Session

REFERENCES = references.committed()
ROOT = Root(2)


def judged(case: str, backend: Backend) -> tuple[Observation, Verdict]:
    return execute.run_here(suite.find(case), Session(backend, ROOT), REFERENCES)


def of_check(check: str, precision: str = "bf16") -> list[str]:
    return [case.id for case in suite.all_cases(precision) if case.check == check and case.precision == precision]


def test_there_is_a_case_for_every_error_of_every_record() -> None:
    assert len(of_check("op_refuses")) >= 25
    seen = set()
    for precision in PRECISIONS:
        errors = [(name, e.name) for name in scope.ops(precision) for e in op.get(name).error_cases()]
        seen.update(errors)
        wanted = {f"{name}[{precision},refuses,{error}]" for name, error in errors}
        assert set(of_check("op_refuses", precision)) == wanted
    assert seen == {(name, e.name) for name in op.names() for e in op.get(name).error_cases()}


def test_there_is_a_case_of_misfeeding_for_every_op_with_operands() -> None:
    for precision in PRECISIONS:
        found = {case.partition("[")[0] for case in of_check("op_misfed", precision)}
        assert found == {name for name in scope.ops(precision) if op.get(name).operands}


@pytest.mark.parametrize("case", [*of_check("op_refuses"), *of_check("op_refuses", "fp8-attention")])
def test_the_records_refuse(case: str) -> None:
    assert judged(case, ReferenceBackend())[1].state == "pass"


@pytest.mark.parametrize(
    "case", [*of_check("op_misfed"), *of_check("op_misfed", "fp8-attention"), *of_check("op_misfed", "fp8-weights")]
)
def test_the_reference_refuses_and_goes_on(case: str) -> None:
    _, verdict = judged(case, ReferenceBackend())
    assert verdict.state == "pass", verdict.reason


def test_other_words_or_another_error_are_no_refusal() -> None:
    case = suite.find("linear[bf16,refuses,inner]")
    seen, _ = judged(case.id, ReferenceBackend())
    for told, words in (
        ({"raised": "OpError", "says": "no"}, "said 'no'"),
        ({"raised": "RuntimeError", "says": "linear: x"}, "raised RuntimeError"),
        ({"raised": "", "says": ""}, "raised nothing"),
        (None, "raised nothing"),
    ):
        facts = {**seen.facts, "in_graph": told}
        verdict = execute.judge(case, dataclasses.replace(seen, facts=facts), ROOT, REFERENCES)
        assert verdict.state == "fail"
        assert words in verdict.reason


class Careless(KernelProgram):
    """Runs whatever it is given; what is missing is zero."""

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        known = {v.name: v for v in self.plan.graphs["main"].inputs}
        given = {
            name: inputs[name]
            if name in inputs and inputs[name].shape == v.shape
            else torch.zeros(v.shape, dtype=v.dtype)
            for name, v in known.items()
        }
        return super().run("main", given, context)


class Rude(KernelProgram):
    """Does not look before it leaps."""

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        if set(inputs) != {v.name for v in self.plan.graphs["main"].inputs}:
            raise KeyError("boom")
        return super().run(entry, inputs, context)


class Offended(KernelProgram):
    """Refuses well, and is never the same again."""

    offended = False

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        try:
            outputs = super().run(entry, inputs, context)
        except Exception:
            self.offended = True
            raise
        return {name: t * 1.5 if self.offended else t for name, t in outputs.items()}


def backend_of(program: type[KernelProgram]) -> Backend:
    class Wrong(ReferenceBackend):
        def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
            return compile_kernels(plan, self, fallback=fallback, program=program)

    return Wrong()


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (Careless, "an operand of another shape: raised nothing"),
        (Careless, "an operand that the graph does not have: raised nothing"),
        (Rude, "a missing operand: raised KeyError"),
        (Offended, "the right operands gave other bits than before"),
    ],
)
def test_a_program_that_takes_anything_fails(program: type[KernelProgram], words: str) -> None:
    _, verdict = judged("silu[bf16,small,misfed]", backend_of(program))
    assert verdict.state == "fail"
    assert words in verdict.reason


def test_a_mistake_that_nobody_tells_of_is_a_failure() -> None:
    case = suite.find("silu[bf16,small,misfed]")
    seen, _ = judged(case.id, ReferenceBackend())
    for facts in ({}, {"mistakes": {}, "repeats_equal": True}, {**seen.facts, "repeats_equal": None}):
        told: Any = dataclasses.replace(seen, facts=facts)
        assert execute.judge(case, told, ROOT, REFERENCES).state == "fail"
