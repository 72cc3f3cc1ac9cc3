"""Every op through a one-node graph: right backends pass, and what a judge must look at is looked at."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from helios import op
from helios.backend import Kernel, ReferenceBackend, select
from helios_conformance import execute, references, scope, selection, suite
from helios_conformance.case import Case, Kept, Observation
from helios_conformance.checks.op_values import inputs
from helios_conformance.draws import Root
from helios_conformance.one_node import run_body
from helios_conformance.session import Session

ROOT = Root(7, "n")
REFERENCES = references.committed()


def cases(precision: str) -> list[Case]:
    return [c for c in suite.choose(precision, "quick", ["ops"]) if c.check == "op_values"]


def test_every_op_dtype_and_sample_is_a_case() -> None:
    seen = set()
    for precision in ("bf16", "fp32", "fp8", "fp8-attention", "fp8-weights"):
        listed = {c.id: c for c in suite.all_cases(precision) if c.check == "op_values" and c.precision == precision}
        names = scope.ops(precision)
        seen.update(names)
        wanted = {f"{n}[{precision},{s.name}]": s.big for n in names for s in op.get(n).samples()}
        assert listed.keys() == wanted.keys()
        assert all((listed[i].suite == "full") == big for i, big in wanted.items())
    assert seen == set(op.names())


def test_what_has_tokens_has_a_case_beyond_8192() -> None:
    """And what has a batch one of two: kernels change their ways there."""
    for name in op.names():
        dims = op.get(name).operands[0].dims if op.get(name).operands else None
        small = [s for s in op.get(name).samples() if not s.big]
        if dims and dims[:2] in (("b", "s"), ("b", "n")):
            assert any(n > 8192 for s in small for x in s.inputs if x for n in x.shape), name  # type: ignore[union-attr]
        if dims and dims[0] == "b" and len(dims) > 1:
            assert any(s.inputs[0].shape[0] > 1 for s in small), name  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_right_backends_pass(name: str, precision: str) -> None:
    """One draw of a third of the cases; tools/false_alarms.py runs all of them over many seeds."""
    session = Session(select(name), ROOT)
    for case in cases(precision)[::3]:
        verdict = execute.run_here(case, session, REFERENCES)[1]
        assert verdict.state == "pass", f"{case.id}: {verdict.reason}"


@pytest.mark.parametrize("precision", ["fp8", "fp8-attention", "fp8-weights"])
def test_the_reference_passes_every_quantised_op(precision: str) -> None:
    """On this draw, of which the reference errors know nothing."""
    session = Session(ReferenceBackend(), ROOT)
    own = [case for case in cases(precision) if case.precision == precision]
    assert {case.params["op"] for case in own} == set(scope.ops(precision))
    for case in own:
        verdict = execute.run_here(case, session, REFERENCES)[1]
        assert verdict.state == "pass", f"{case.id}: {verdict.reason}"


class Wrong(ReferenceBackend):
    """The reference with one kernel changed."""

    def __init__(self, name: str, change: Any) -> None:
        super().__init__()
        body = op.get(name).fn
        self.kernels = dict(super().kernels) | {name: Kernel(lambda *xs, **attrs: change(body(*xs, **attrs)))}  # type: ignore[misc]


def flip_last_bit(x: torch.Tensor) -> torch.Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    flat = y.view(-1).view(torch.int16)
    flat[-1] ^= 1
    return y


def shifted(x: torch.Tensor) -> torch.Tensor:
    return x + 0.05


@pytest.mark.parametrize(
    ("case", "change", "why"),
    [
        ("permute[bf16,channels_last]", flip_last_bit, "must be exact"),
        ("concat[bf16,long]", flip_last_bit, "must be exact"),
        ("cast[fp32,bfloat16]", flip_last_bit, "must be exact"),
        ("linear[bf16,wide]", shifted, "norm of the error"),
        ("linear[bf16,wide]", lambda x: x.float(), "it is float32["),
        ("linear[bf16,wide]", lambda x: x[:, 1:], "it is bfloat16["),
        ("linear[fp32,wide]", lambda x: x * (1 + 1e-5), "gain"),
    ],
)
def test_wrong_kernels_fail(case: str, change: Any, why: str) -> None:
    found = suite.find(case)
    backend = Wrong(found.params["op"], change)
    verdict = execute.run_here(found, Session(backend, ROOT), REFERENCES)[1]
    assert verdict.state == "fail"
    assert why in verdict.reason


def observed(case: Case, **change: Any) -> Observation:
    """What a right run keeps of the node alone, changed."""
    given = inputs(case, ROOT)
    session = Session(ReferenceBackend(), ROOT)
    outputs = given.keep(session, case, run_body(given.record, given.tensors, given.attrs))
    return Observation({name: dataclasses.replace(kept, **change) for name, kept in outputs.items()})


def judged(case: Case, observation: Observation) -> str:
    verdict = inputs(case, ROOT).judge(case, observation, ROOT, REFERENCES)
    assert (verdict.state == "pass") == (not verdict.reason)
    return verdict.reason


def test_an_observation_has_to_be_whole() -> None:
    case = suite.find("linear[bf16,wide]")
    right = observed(case)
    assert judged(case, right) == ""
    assert "wanted o0" in judged(case, Observation({}))
    assert "wanted o0" in judged(case, Observation({**right.outputs, "o1": right.outputs["o0"]}))
    assert "elements were kept" in judged(case, observed(case, values=right.outputs["o0"].values[:-1]))
    assert "kept as float32" in judged(case, observed(case, values=right.outputs["o0"].values.float()))
    assert "it is float32[" in judged(case, observed(case, dtype="float32"))
    assert "it is bfloat16[65, 640], wanted" in judged(case, observed(case, shape=(65, 640)))
    assert "finite" in judged(case, observed(case, finite=False))


def test_elements_of_another_selection_fail() -> None:
    """Changing the digest of a large output changes which elements had to be kept."""
    case = suite.find("linear[bf16,wide]")
    assert judged(case, observed(case, digest="0" * 64)) != ""


def test_moved_data_is_compared_beyond_what_is_kept() -> None:
    """The digest is of every element."""
    case = suite.find("concat[bf16,long]")
    given = inputs(case, ROOT)
    wrong = run_body(given.record, given.tensors, given.attrs)["o0"].clone()
    values = wrong.clone()
    wrong[0, 8010, 3] = 9.0
    told = selection.digest(wrong)
    chosen = selection.selection(ROOT, case.id, "o0", tuple(wrong.shape), wrong.dtype, told)
    kept = Kept(chosen.take(selection.as_matrix(values)), tuple(wrong.shape), "bfloat16", told, True)
    assert "digest of the whole output" in judged(case, Observation({"o0": kept}))


@pytest.mark.parametrize("case", ["full[bf16,zero]", "rope_table[fp32,mid]"])
def test_constants_need_no_kernel(case: str) -> None:
    """The host computes them, so a program of nothing else has nothing to cover."""
    observation, verdict = execute.run_here(suite.find(case), Session(ReferenceBackend(), ROOT), REFERENCES)
    assert not observation.coverage
    assert verdict.state == "pass"
