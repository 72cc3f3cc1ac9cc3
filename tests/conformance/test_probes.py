"""Each probe fails on a backend that is wrong in the way that it looks for, and on nothing else."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helios import op
from helios.backend import Backend, Kernel, ReferenceBackend
from helios.graph import Node, Value
from helios.passes import Plan
from helios.program import Coverage, Program
from helios_conformance import checks, execute, probes, references, suite
from helios_conformance.case import Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.session import Session

REFERENCES = references.committed()
ROOT = Root(1)
SILU = "silu[bf16,small]"


def wrong(name: str, run: Callable[..., Any], **more: Any) -> Backend:
    """The reference, but for one kernel."""
    backend = ReferenceBackend()
    backend.__dict__["kernels"] = {**backend.kernels, name: Kernel(run, **more)}
    return backend


def judged(case: str, backend: Backend, **options: Any) -> tuple[Observation, Verdict]:
    return execute.run_here(suite.find(case), Session(backend, ROOT, options=options), REFERENCES)


def silu(x: Tensor) -> Tensor:
    return F.silu(x.float()).to(x.dtype)


def beyond(tensor: Tensor) -> Tensor:
    """The element after a contiguous tensor."""
    at = tensor.storage_offset() + tensor.numel()
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), at, (1,), (1,))


@pytest.mark.parametrize("case", [SILU, "linear[fp32,odd]", "concat[bf16,tokens]", "full[bf16,zero]", "cfg[bf16,odd]"])
def test_a_right_backend_passes(case: str) -> None:
    seen, verdict = judged(case, ReferenceBackend())
    assert verdict.state == "pass", verdict.reason
    assert set(seen.outputs) == {"o0", "o0@other", "o0@padded", "o0@permuted"}
    assert json.loads(json.dumps(dict(seen.facts))) == seen.facts
    assert seen.facts["engine"] is False


def test_a_kernel_that_allocates_in_python_is_guarded_and_right() -> None:
    seen, verdict = judged(SILU, wrong("silu", lambda x: torch.empty_like(x).copy_(silu(x))))
    assert verdict.state == "pass", verdict.reason
    assert seen.facts["allocations_guarded"] >= 4


def in_place(x: Tensor) -> Tensor:
    return x.copy_(silu(x))


def aliasing(x: Tensor) -> Tensor:
    """Puts its result behind the operand, in the operand's own memory, and what was there elsewhere."""
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), 0, tuple(x.shape), x.stride()).copy_(silu(x))


def spoils_input(x: Tensor) -> Tensor:
    out = silu(x)
    x.view(-1)[-1:].mul_(2) if x.is_contiguous() else None
    return out


def writes_beyond(x: Tensor) -> Tensor:
    beyond(x).fill_(0)
    return silu(x)


def allocates_and_writes_beyond(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype).copy_(silu(x))
    if out.untyped_storage().nbytes() > out.nbytes:  # elsewhere it would end this process
        beyond(out).fill_(1)
    return out


def reads_beyond(x: Tensor) -> Tensor:
    return silu(x) + 0 * beyond(x) if x.is_contiguous() and x.untyped_storage().nbytes() > x.nbytes else silu(x)


def reads_unwritten(x: Tensor) -> Tensor:
    return silu(x) + 0 * torch.empty(x.shape, dtype=x.dtype)


def leaves_last_row(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    out[:, :-1] = silu(x[:, :-1])
    return out


def senses_poison(x: Tensor) -> Tensor:
    honest = bool(torch.empty(64).isnan().any())
    return silu(x) if honest else silu(x * 1.01)


def ignores_strides(x: Tensor) -> Tensor:
    strides = torch.empty(x.shape, device="meta").stride()
    return silu(torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), x.storage_offset(), tuple(x.shape), strides))


def other_dtype(x: Tensor) -> Tensor:
    return F.silu(x.float())


def other_shape(x: Tensor) -> Tensor:
    return silu(x)[None]


def nothing(x: Tensor) -> None:
    return None


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "in place": (in_place, "it wrote to its operands"),
    "aliasing": (aliasing, "its outputs share memory with operands"),
    "spoils its input": (spoils_input, "it wrote to its operands"),
    "writes beyond": (writes_beyond, "it wrote beyond its operands"),
    "writes beyond its own": (allocates_and_writes_beyond, "it wrote beyond memory that it had allocated"),
    "reads beyond": (reads_beyond, "not every element of the whole output is finite"),
    "reads what it never wrote": (reads_unwritten, "the same operands gave other bits"),
    "leaves the last row": (leaves_last_row, "the same operands gave other bits"),
    "senses poison": (senses_poison, "the same operands gave other bits"),
    "ignores strides": (ignores_strides, "run 'padded': o0"),
    "another dtype": (other_dtype, "its outputs are not what the op gives"),
    "another shape": (other_shape, "its outputs are not what the op gives"),
    "nothing": (nothing, "wanted a torch.Tensor"),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_fails_and_the_reason_says_how(name: str, seed: int) -> None:
    run, words = WRONG[name]
    _, verdict = judged(SILU, wrong("silu", run))
    assert verdict.state == "fail"
    assert words in verdict.reason


def test_a_result_kept_for_a_shape_fails() -> None:
    known: dict[Any, Tensor] = {}
    _, verdict = judged(SILU, wrong("silu", lambda x: known.setdefault(x.shape, silu(x))))
    assert verdict.state == "fail"
    assert "run 'other': o0" in verdict.reason


def test_a_result_kept_for_an_address_fails() -> None:
    known: dict[Any, Tensor] = {}
    _, verdict = judged(SILU, wrong("silu", lambda x: known.setdefault(x.data_ptr(), silu(x))))
    assert verdict.state == "fail"
    assert "gave other bits (o0 in run 'again')" in verdict.reason


def test_an_output_that_the_next_run_reuses_fails() -> None:
    buffer: dict[Any, Tensor] = {}
    _, verdict = judged(SILU, wrong("silu", lambda x: buffer.setdefault(x.shape, silu(x)).copy_(silu(x))))
    assert verdict.state == "fail"
    assert "a later run wrote to outputs that were given away" in verdict.reason


def test_data_movement_may_give_views_and_nothing_else_may() -> None:
    facts = dict.fromkeys(probes.FACTS, True) | {"outputs_separate": False}
    assert probes.judge_facts(facts, "move") == []
    assert probes.judge_facts(facts | {"engine": True}, "round") == []
    for kind in ("round", "reduce", "fused"):
        assert probes.judge_facts(facts, kind) == ["its outputs share memory with operands"]  # type: ignore[arg-type]


@pytest.mark.parametrize("fact", probes.FACTS)
def test_a_fact_that_is_missing_or_not_true_is_a_reason(fact: str) -> None:
    facts: dict[str, Any] = dict.fromkeys(probes.FACTS, True)
    assert probes.judge_facts(facts, "round") == []
    for told in (False, None, 1, "true"):
        for details in (3, {fact: 3}, {fact: {}}, {}):
            assert probes.judge_facts(facts | {fact: told, "details": details}, "round") == [probes.FACTS[fact]]
    del facts[fact]
    assert probes.judge_facts(facts, "round") == [probes.FACTS[fact]]


def test_an_observation_without_one_of_the_runs_fails() -> None:
    case = suite.find(SILU)
    seen, _ = judged(SILU, ReferenceBackend())
    for run in ("", "@other", "@padded", "@permuted"):
        rest = {name: kept for name, kept in seen.outputs.items() if name != f"o0{run}"}
        left = Observation(rest, seen.facts, seen.coverage)
        assert "outputs are none, wanted o0" in execute.judge(case, left, ROOT, REFERENCES).reason
    more = Observation({**seen.outputs, "o0@mine": seen.outputs["o0"]}, seen.facts, seen.coverage)
    assert "there is no run 'mine'" in execute.judge(case, more, ROOT, REFERENCES).reason


def test_half_of_the_runs_are_poisoned_and_nobody_knows_which() -> None:
    drawn = [probes.draw_treatments() for _ in range(200)]
    runs = ("a", "other", "again", "anew", "padded", "permuted")
    for treatments in drawn:
        assert [treatments[run] for run in runs].count("nan") == 3
        assert {treatments[run] for run in ("a", "again", "anew")} == {"nan", "zero", "plain"}
        assert treatments["load"] != treatments["load_anew"]
    for run in runs:
        found = collections.Counter(treatments[run] for treatments in drawn)
        assert min(found[t] for t in ("nan", "zero", "plain")) >= 8


def test_the_treatments_of_a_record_run_again() -> None:
    treatments = probes.draw_treatments()
    seen, _ = judged(SILU, ReferenceBackend(), treatments=treatments)
    assert seen.facts["treatments"] == treatments


class Packs(ReferenceBackend):
    """Weights only at load."""

    def supports(self, node: Node) -> str | None:
        rates = {v.rate.name for v in node.values}
        return "weights must be loaded" if node.op == "linear" and "WEIGHTS" not in rates else None


def test_a_backend_that_takes_weights_at_load_only_is_probed_with_the_rest() -> None:
    seen, verdict = judged("linear[bf16,odd]", Packs())
    assert verdict.state == "pass", verdict.reason
    assert seen.facts["declined"].endswith("weights must be loaded")


def test_a_kernel_that_packs_badly_strided_weights_fails() -> None:
    def prepare(_: None, weight: Tensor, bias: Tensor | None) -> Any:
        start, strides = weight.storage_offset(), (weight.shape[1], 1)
        flat = torch.empty(0, dtype=weight.dtype)
        return flat.set_(weight.untyped_storage(), start, tuple(weight.shape), strides), bias

    kernel = {"prepare": prepare, "weights": ("weight", "bias")}
    _, verdict = judged("linear[bf16,odd]", wrong("linear", lambda w, x: op.get("linear").fn(x, *w), **kernel))
    assert "run 'padded'" in verdict.reason
    assert "run 'other'" not in verdict.reason


def test_large_operands_run_once() -> None:
    case = suite.find("velocity_to_x0[fp32,stage2]")
    known = references.References({case.id: checks.get(case.check).reference(case, Root(9))})
    seen, verdict = execute.run_here(case, Session(ReferenceBackend(), ROOT), known)
    assert verdict.state == "pass", verdict.reason
    assert set(seen.outputs) == {"o0"}
    assert "repeats_equal" not in seen.facts
    assert seen.facts["inputs_unchanged"] is True


class Engine(Program):
    """Runs a graph whole, and gives its input for what changes nothing."""

    def __init__(self, plan: Plan, backend: Backend, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(plan, backend, Coverage())
        self.change = change

    def evaluate(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        known: dict[str, Any] = dict(inputs)
        for node in self.plan.graphs[graph].nodes:
            operands = [known[x.name] if isinstance(x, Value) else x for x in node.inputs]
            known[node.outputs[0].name] = op.get(node.op).fn(*operands, **node.attributes)
        return {name: self.change(known[value.name]) for name, value in self.plan.graphs[graph].outputs}


def engine(change: Callable[[Tensor], Tensor] = lambda t: t) -> Backend:
    class Whole(Backend):
        name = "whole"

        def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
            return Engine(plan, self, change)

    return Whole()


@pytest.mark.parametrize("case", [SILU, "linear[fp32,odd]", "denormalize_latents[bf16,small]"])
def test_an_engine_is_probed_too(case: str) -> None:
    seen, verdict = judged(case, engine())
    assert verdict.state == "pass", verdict.reason
    assert seen.facts["engine"] is True
    assert judged(case, engine(lambda t: t * 1.05))[1].state == "fail"


def test_an_engine_may_share_memory_and_may_not_change_it_later() -> None:
    buffer: dict[Any, Tensor] = {}
    _, verdict = judged(SILU, engine(lambda t: buffer.setdefault(t.shape, t.clone()).copy_(t)))
    assert "a later run wrote to outputs that were given away" in verdict.reason


def test_a_kernel_that_senses_the_guards_is_seen_where_there_are_none() -> None:
    def senses(x: Tensor) -> Tensor:
        return silu(x if x.untyped_storage().nbytes() > x.nbytes else x * 1.02)

    backend = wrong("silu", senses)
    assert judged(SILU, backend)[1].state == "pass"
    assert judged("silu[bf16,small,repeats]", backend)[1].state == "fail"
