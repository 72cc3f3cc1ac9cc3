"""Repeats to the bit, programs side by side, weights that change with each step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

import helios.ops  # noqa: F401
from helios import op
from helios.backend import Backend, Kernel, ReferenceBackend
from helios.graph import Node
from helios_conformance import execute, references, scope, suite
from helios_conformance.case import PRECISIONS, Observation, Verdict
from helios_conformance.checks import op_repeats
from helios_conformance.draws import Root
from helios_conformance.session import Session

REFERENCES = references.committed()
ROOT = Root(3)
RACE = "silu[bf16,wide,repeats135]"


def wrong(name: str, run: Callable[..., Any], **more: Any) -> Backend:
    backend = ReferenceBackend()
    backend.__dict__["kernels"] = {**backend.kernels, name: Kernel(run, **more)}
    return backend


def judged(case: str, backend: Backend) -> tuple[Observation, Verdict]:
    return execute.run_here(suite.find(case), Session(backend, ROOT), REFERENCES)


def of_check(check: str, full: bool = False, precision: str = "bf16") -> list[str]:
    cases = [c for c in suite.all_cases(precision) if c.check == check and c.precision == precision]
    return [c.id for c in cases if full or c.suite == "quick"]


def silu(x: Tensor) -> Tensor:
    return F.silu(x.float()).to(x.dtype)


def test_the_arithmetic_of_the_repeats() -> None:
    assert 0.95**op_repeats.FULL_RUNS < 1e-3 < 0.95 ** (op_repeats.FULL_RUNS - 1)


def test_every_op_with_operands_repeats_and_has_two_programs() -> None:
    for precision in PRECISIONS:
        wanted = {name for name in scope.ops(precision) if op.get(name).operands}
        for check in ("op_repeats", "op_programs"):
            assert {case.partition("[")[0] for case in of_check(check, precision=precision)} == wanted
        assert len(of_check("op_repeats", True, precision)) == 2 * len(wanted)
    assert {"linear", "conv3d", "qkv_linear", "rms_norm"} <= {c.partition("[")[0] for c in of_check("op_step_weights")}


@pytest.mark.parametrize(
    "case",
    [
        *(case for check in ("op_repeats", "op_programs", "op_step_weights") for case in of_check(check)),
        *(case for p in ("fp8-attention", "fp8-weights") for case in of_check("op_repeats", precision=p)),
        RACE,
    ],
)
def test_the_reference_repeats(case: str) -> None:
    _, verdict = judged(case, ReferenceBackend())
    assert verdict.state == "pass", verdict.reason


@pytest.mark.parametrize("at", [0, 7, 19])
def test_a_race_in_one_of_twenty_runs_is_caught(at: int) -> None:
    counter = itertools.count()

    def racing(x: Tensor) -> Tensor:
        out = silu(x)
        if next(counter) % 20 == at:
            out.view(-1)[0] += 1
        return out

    seen, verdict = judged(RACE, wrong("silu", racing))
    assert verdict.state == "fail"
    assert "the same operands gave other bits in runs [" in verdict.reason
    assert seen.facts["runs"] == 135


def test_fewer_runs_than_promised_fail() -> None:
    case = suite.find(RACE)
    seen, _ = judged(RACE, ReferenceBackend())
    facts = {**seen.facts, "runs": 8}
    verdict = execute.judge(case, dataclasses.replace(seen, facts=facts), ROOT, REFERENCES)
    assert verdict.reason == "there were 8 runs, wanted 135"


def test_a_result_of_the_run_before_fails() -> None:
    last: list[Tensor] = []

    def lagging(x: Tensor) -> Tensor:
        last.append(silu(x))
        return last[max(0, len(last) - 2)]

    assert judged("silu[bf16,small,repeats]", wrong("silu", lagging))[1].state == "fail"


def test_weights_kept_for_a_shape_fail_where_two_programs_live() -> None:
    packed: dict[Any, Any] = {}

    def prepare(_: None, weight: Tensor, bias: Tensor | None) -> Any:
        return packed.setdefault(weight.shape, (weight, bias))

    backend = wrong("linear", lambda w, x: F.linear(x, *w), prepare=prepare, weights=("weight", "bias"))
    _, verdict = judged("linear[fp32,small,programs]", backend)
    assert verdict.state == "fail"
    assert "run 'other'" in verdict.reason
    packed.clear()
    assert judged("linear[fp32,small,step_weights]", backend)[1].state == "fail"
    packed.clear()
    assert judged("linear[fp32,small,repeats]", backend)[1].state == "pass"  # one program, one set of weights


class Packs(ReferenceBackend):
    def supports(self, node: Node) -> str | None:
        return None if "WEIGHTS" in {v.rate.name for v in node.values} else "weights must be loaded"


def test_weights_at_the_rate_of_steps_may_be_declined() -> None:
    _, verdict = judged("linear[bf16,small,step_weights]", Packs())
    assert verdict.state == "unsupported"
    assert "weights must be loaded" in verdict.reason
    assert not suite.find("linear[bf16,small,step_weights]").required
    assert judged("linear[bf16,small,repeats]", Packs())[1].state == "pass"
