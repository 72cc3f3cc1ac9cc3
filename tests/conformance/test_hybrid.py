"""Backends that run some graphs whole and others op by op: an engine's bundle, which verifies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helios import op
from helios.backend import Backend, DeviceInfo, ReferenceBackend
from helios.graph import Value
from helios.passes import Plan
from helios.program import Coverage, Program
from helios_conformance import execute, report, suite
from helios_conformance.case import Observation
from helios_conformance.draws import Root
from helios_conformance.references import committed
from helios_conformance.session import Session


class Whole(Program):
    """Runs a graph whole, by the op bodies."""

    def evaluate(self, graph: str, inputs: dict[str, Any]) -> dict[str, Any]:
        known = dict(inputs)
        for node in self.plan.graphs[graph].nodes:
            operands = [known[x.name] if isinstance(x, Value) else x for x in node.inputs]
            known[node.outputs[0].name] = op.get(node.op).fn(*operands, **node.attributes)
        return {name: known[value.name] for name, value in self.plan.graphs[graph].outputs}


class Hybrid(ReferenceBackend):
    """A linear layer runs whole; a lone addition, as anything else, op by op."""

    name = label = "hybrid"

    def devices(self) -> list[DeviceInfo]:
        return [DeviceInfo(0, "half of each", 1 << 34)]

    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        if any(node.op == "linear" for graph in plan.graphs.values() for node in graph.nodes):
            return Whole(plan, self, Coverage())
        return super().compile(plan, fallback=fallback)


@pytest.fixture(scope="module")
def hybrid(bundles: Any) -> Any:
    return bundles.run(bundles.cases, "hybrid", Root(7, "5f3a"), bundles.references, Hybrid())


def test_an_honest_hybrid_is_an_engine_and_its_bundle_is_accepted(hybrid: Any, tmp_path: Path) -> None:
    with hybrid.closed():
        told = hybrid.report()
        assert (told["backend"]["kind"], told["scope"]["kind"]) == ("kernels", "engine")
        assert {case["state"] for case in told["cases"]} == {"pass"}
        engines = {case["id"] for case in told["cases"] if case["facts"].get("engine") is True}
        assert engines == {"linear[bf16,small]"}
        assert told["verdict"]["word"] == "passed"  # level ops is all that was asked for
        assert "as an engine whose single ops are diagnostic, no level that counts" in told["verdict"]["sentence"]
        outcome = hybrid.verify(hybrid.write(tmp_path / "b"))
        assert [str(f) for f in outcome.findings] == []


def test_a_hybrid_cannot_call_itself_kernels(hybrid: Any, tmp_path: Path) -> None:
    with hybrid.closed():
        told = hybrid.report()
        told["scope"]["kind"] = "kernels"
        found = hybrid.refusals(hybrid.forge(told, tmp_path / "b"))
    assert "scope.kind: it says kernels, elsewhere the report says engine" in found


def seen(check: str = "codec", **change: Any) -> dict[str, Any]:
    case = {"check": check, "state": "pass", "facts": {}, "outputs": {"o0": {}}, "coverage": []}
    return case | change


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (seen(), "engine"),  # nothing says how it ran
        (seen(coverage=[["add", 0, 0, 0, ""]]), "engine"),
        (seen(coverage=[["add", 1, 0, 0, ""]]), "kernels"),
        (seen(coverage=[["add", 1, 0, 0, ""]], facts={"engine": True}), "engine"),
        (seen(facts={"engine": False}), "kernels"),  # which its judgement fails
        (seen(facts={"imported": True}), "kernels"),
        (seen(outputs={}), "kernels"),
        (seen("realtime_timed", outputs={}), "engine"),
        (seen("realtime_timed", outputs={}, state="fail"), "kernels"),
    ],
)
def test_what_no_coverage_accounts_for_ran_as_an_engine(case: dict[str, Any], kind: str) -> None:
    assert report.kind({"kind": "kernels"}, [seen(facts={"engine": False}), case]) == kind
    assert report.kind({"kind": "engine"}, [case]) == "engine"


CASES = (
    "add[bf16,small]",
    "block[bf16,tiny,odd]",
    "codec[bf16,groups]",
    "same[bf16,seed_twice]",
    "video[bf16,text,base]",
)


@pytest.mark.parametrize("case", CASES)
def test_every_program_of_kernels_has_its_coverage(case: str) -> None:
    """The autoencoder's too: a fallback there is seen."""
    backend: Backend = ReferenceBackend()
    backend.kernels = {name: kernel for name, kernel in backend.kernels.items() if name != "conv3d"}
    session = Session(backend, Root(3), fallback="reference")
    observation = execute.observe(suite.find(case), session)
    assert observation.outputs, observation.facts
    rows = {row[0] for row in observation.coverage if row[3]}
    assert rows == ({"conv3d"} if case.startswith(("codec", "same", "video")) else set())
    assert sum(sum(row[1:4]) for row in observation.coverage) > 0


@pytest.mark.parametrize("case", ["add[fp32,small]", "block[fp32,tiny,odd]"])
def test_kernels_without_coverage_fail(case: str) -> None:
    found = suite.find(case)
    observation, verdict = execute.run_here(found, Session(ReferenceBackend(), Root(3)), committed())
    assert verdict.state == "pass", verdict.reason
    for rows in ((), (("add", 0, 0, 0, ""),)):
        bare = Observation(observation.outputs, observation.facts, rows)
        verdict = execute.judge(found, bare, Root(3), committed())
        assert verdict.state == "fail"
        assert "no coverage says how" in verdict.reason
