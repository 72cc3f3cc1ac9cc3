"""The same again: repeats to the bit, programs side by side, weights that change with each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios_conformance import probes, scope
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Check, Observation, Suite, Verdict
from helios_conformance.checks import op_values
from helios_conformance.draws import Root
from helios_conformance.node_values import NodeValues
from helios_conformance.one_node import WEIGHTS, OneNode, types_of
from helios_conformance.op_samples import largest, smallest, values_case
from helios_conformance.references import References
from helios_conformance.session import Session

QUICK_RUNS = 8
FULL_RUNS = 135
"""A race that spoils 1 run in 20 leaves all of n alone with probability 0.95ⁿ: 66 % for 8, and 0.098 % for 135, the
least number below 0.1 %."""


class OpRepeats:
    """One program, two draws of the operands in turn: every run of a draw gives the bits of its first.

    The operands are plain host tensors, without guards or poison around them.
    """

    name = "op_repeats"

    def cases(self, precision: str) -> Iterator[Case]:
        for name in scope.ops(precision):
            few, many = smallest(op.get(name)), largest(op.get(name))
            if few is not None and many is not None:
                yield self._case(name, few.name, precision, QUICK_RUNS, "repeats", "quick")
                yield self._case(name, many.name, precision, FULL_RUNS, f"repeats{FULL_RUNS}", "full")

    def _case(self, name: str, sample: str, precision: str, runs: int, label: str, suite: Suite) -> Case:
        params = {"op": name, "sample": sample, "runs": runs}
        return Case(f"{name}[{precision},{sample},{label}]", "ops", self.name, precision, params, suite)

    def observe(self, case: Case, session: Session) -> Observation:
        values = _draws(case, session.root, weights_stay=True)
        node = _node(values[""])
        program = node.load(session, values[""].tensors)
        first: dict[str, Any] = {}
        differing = []
        for run in range(case.params["runs"]):
            which = "other" if run % 2 else ""
            came = probes.on_host(node.run(program, values[which].tensors))
            wanted = first.setdefault(which, came)
            if not all(probes.same_bits(came[name], wanted[name]) for name in wanted):
                differing.append(run)
        facts = {"runs": case.params["runs"], "repeats_equal": not differing, "differing": differing[:20]}
        return Observation(probes.keep(values_case(case), session, values, first), facts, program.coverage.rows())

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        values = _draws(case, root, weights_stay=True)
        reasons, judged = probes.judge_values(values_case(case), observation, root, references, values)
        reasons += _unequal(observation.facts)
        if observation.facts.get("runs") != case.params["runs"]:
            reasons.append(f"there were {observation.facts.get('runs')} runs, wanted {case.params['runs']}")
        return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        return {}  # those of the values


class OpPrograms:
    """Two programs of one graph with other weights and other operands, alive together and run in turn."""

    name = "op_programs"

    def cases(self, precision: str) -> Iterator[Case]:
        yield from _one_each(self.name, "programs", precision, scope.ops(precision))

    def observe(self, case: Case, session: Session) -> Observation:
        values = _draws(case, session.root, weights_stay=False)
        node = _node(values[""])
        programs = {run: node.load(session, draw.tensors) for run, draw in values.items()}
        first, again = (
            {run: probes.on_host(node.run(programs[run], draw.tensors)) for run, draw in values.items()}
            for _ in range(2)
        )
        pairs = [(again[run][name], first[run][name]) for run in first for name in first[run]]
        facts = {"repeats_equal": all(probes.same_bits(*pair) for pair in pairs)}
        kept = probes.keep(values_case(case), session, values, first)
        return Observation(kept, facts, programs[""].coverage.rows())

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        values = _draws(case, root, weights_stay=False)
        reasons, judged = probes.judge_values(values_case(case), observation, root, references, values)
        reasons += _unequal(observation.facts)
        return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        return {}


class OpStepWeights:
    """Weights that change with each step: a kernel that packs them must pack them anew.

    Not required, since no Helios graph needs it and a backend may decline.
    """

    name = "op_step_weights"

    def cases(self, precision: str) -> Iterator[Case]:
        weighted = [name for name in scope.ops(precision) if WEIGHTS & {o.name for o in op.get(name).operands}]
        yield from _one_each(self.name, "step_weights", precision, weighted, required=False)

    def observe(self, case: Case, session: Session) -> Observation:
        values = _draws(case, session.root, weights_stay=False)
        node = _node(values[""], packed=False)
        program = node.load(session, ())
        outputs = {run: probes.on_host(node.run(program, draw.tensors)) for run, draw in values.items()}
        return Observation(probes.keep(values_case(case), session, values, outputs), {}, program.coverage.rows())

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        values = _draws(case, root, weights_stay=False)
        reasons, judged = probes.judge_values(values_case(case), observation, root, references, values)
        return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        return {}


def _one_each(check: str, label: str, precision: str, names: Sequence[str], *, required: bool = True) -> Iterator[Case]:
    for name in names:
        sample = smallest(op.get(name))
        if sample is not None:
            params = {"op": name, "sample": sample.name}
            case = f"{name}[{precision},{sample.name},{label}]"
            yield Case(case, "ops", check, precision, params, required=required)


def _draws(case: Case, root: Root, *, weights_stay: bool) -> dict[str, NodeValues]:
    """Two draws of a case's operands, by run; weights are the same in both, or are not."""
    subject = op_values.subject(case, root)
    tensors = {"": subject.first, "other": subject.operands("other") if weights_stay else subject.second}
    return {run: NodeValues(op.get(subject.op), draw, subject.attrs, 2) for run, draw in tensors.items()}


def _node(values: NodeValues, *, packed: bool = True) -> OneNode:
    return OneNode.of(values.record.name, types_of(values.tensors), values.attrs, packed=packed)


def _unequal(facts: Mapping[str, Any]) -> list[str]:
    if facts.get("repeats_equal") is True:
        return []
    where = facts.get("differing")
    return [probes.FACTS["repeats_equal"] + (f" in runs {where}" if where else "")]


CHECKS: tuple[Check, ...] = (OpRepeats(), OpPrograms(), OpStepWeights())
