"""A scene as a case: run on the device with the oracle's inputs, judged output by output."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from helios.graph import Graph, Rate, TensorType
from helios.program import EMPTY, Context, Program, WeightReader
from helios_conformance import budget, selection
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Judged, Kept, Observation, Verdict
from helios_conformance.condition import Draw, Seen
from helios_conformance.draws import Root
from helios_conformance.golden import Call, Scene, calls_of, golden, reference, working

if TYPE_CHECKING:
    from helios_conformance.references import References
    from helios_conformance.session import Session

__all__ = [
    "SceneCheck",
    "Wanted",
    "chosen_of",
    "judge_kept",
    "keep",
    "largest",
    "longest_sum",
    "misshapen",
    "wanted_of",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """What an output must be: its type, the terms of the longest sum behind it, and whether a chain of forwards made
    it, each from the device's own result before."""

    type: TensorType
    terms: int
    chain: bool = False


class SceneCheck:
    """Runs and judges cases that are scenes; who inherits says what scene a case is.

    Beside the outputs two facts: ``again_equal``, whether the first call gave the same bits once more after all
    others, and ``engine``, whether the graphs run whole.
    """

    name: str

    def scene(self, case: Case) -> Scene:
        raise NotImplementedError

    def observe(self, case: Case, session: Session) -> Observation:
        scene = self.scene(case)
        dtype = scene.dtype(case.precision)
        calls = calls_of(scene, session.root, dtype)  # before the device holds anything
        program = session.lower(working(scene, case.precision))
        if case.params.get("reload"):
            program.load(_Negated(scene.weights(dtype)))
        program.load(scene.weights(dtype))
        outputs, again = _run(program, calls, session)
        kept = {name: keep(session.root, case, name, x, len(outputs)) for name, x in outputs.items()}
        facts = {"again_equal": again, "engine": session.is_engine(program)}
        return Observation(kept, facts, program.coverage.rows())

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        scene = self.scene(case)
        dtype = scene.dtype(case.precision)
        oracle = golden(scene, root, dtype)
        wanted = wanted_of(scene, oracle.calls, dtype)
        draw = Draw(scene, root, case.precision, self.draws(case))
        judged, reasons = judge_kept(case, observation, root, references, oracle.outputs, wanted, draw=draw)
        if observation.facts.get("again_equal") is not True:
            reasons.append("the first call gave other bits when it was made again after the others")
        return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        """The largest of several draws: what rounding does to a network depends on what it is given, by more than its
        number of elements would let expect."""
        scene = self.scene(case)
        rows: dict[str, list[Errors]] = {}
        for draw in range(self.draws(case)):
            for name, errors in _reference(scene, Root(64 * root.seed + draw, root.nonce), case.precision).items():
                rows.setdefault(name, []).append(errors)
        return {name: largest(errors) for name, errors in rows.items()}

    def draws(self, case: Case) -> int:
        """Of the inputs, for the reference."""
        key = str(case.params.get("scene", ""))
        return 1 if key.startswith("14b") else 2 if key.startswith(("mini", "wide")) else 12


@dataclasses.dataclass(frozen=True, slots=True)
class _Negated:
    """Other weights, of which nothing may be left when the right ones are loaded after them."""

    source: WeightReader

    def read(self, name: str) -> Tensor:
        return -self.source.read(name)


def _reference(scene: Scene, root: Root, precision: str) -> dict[str, Errors]:
    dtype = scene.dtype(precision)
    oracle = golden(scene, root, dtype).outputs
    return {name: budget.measure(came, oracle[name]) for name, came in reference(scene, root, precision).items()}


def largest(rows: list[Errors]) -> Errors:
    """Of each statistic the largest; of counts the sum."""
    return dataclasses.replace(functools.reduce(budget.largest, rows), count=sum(e.count for e in rows))


def _run(program: Program, calls: tuple[Call, ...], session: Session) -> tuple[dict[str, Tensor], bool]:
    """All outputs on the host, and whether the first call repeats. Contexts of all calls stay bound side by side."""
    contexts: dict[str, Context] = {}

    def answer(call: Call) -> dict[str, Tensor]:
        context = EMPTY
        for name, inputs in call.bound.items():
            if name not in contexts:
                contexts[name] = program.bind({key: x.clone() for key, x in inputs.items()})
            context = context | contexts[name]
        # Copies: a kernel that writes to its operands must not spoil the inputs of the next call.
        out = program.run(call.entry, {key: x.clone() for key, x in call.inputs.items()}, context)
        return {f"{call.name}.{key}": session.to_host(x).clone() for key, x in out.items()}

    outputs: dict[str, Tensor] = {}
    for call in calls:
        outputs.update(answer(call))
    once_more = answer(calls[0])
    return outputs, all(budget.exact(x, outputs[name]) for name, x in once_more.items())


def judge_kept(
    case: Case,
    observation: Observation,
    root: Root,
    references: References,
    oracle: Mapping[str, Tensor],
    wanted: Mapping[str, Wanted],
    shares: Mapping[str, int] | None = None,
    draw: Draw | None = None,
) -> tuple[dict[str, Judged], list[str]]:
    """The numbers of every output, and what is wrong with them.

    Args:
        oracle: whole outputs in float64.
        wanted: what each must be, by the same names.
        shares: by how many outputs each shares the room; default: all by all.
        draw: whose condition is asked for, only where a bound is passed.
    """
    if set(observation.outputs) != set(wanted):
        odd = sorted(set(observation.outputs) ^ set(wanted))
        return {}, [f"outputs missing or unknown: {', '.join(odd[:5])}"]
    judged: dict[str, Judged] = {}
    reasons: list[str] = []
    for name, output in wanted.items():
        kept = observation.outputs[name]
        wrong = misshapen(kept, output.type)
        if wrong:
            reasons.append(f"{name}: {wrong}")
            continue
        choose = functools.partial(chosen_of, root, case, name, kept, share=shares[name] if shares else len(wanted))
        right = choose(oracle[name])
        if right.shape != kept.values.shape:
            reasons.append(f"{name}: {kept.values.numel()} elements are kept, its digest chooses {right.numel()}")
            continue
        errors = budget.measure(kept.values, right)
        known = references.get(case.id, name)
        counted = budget.of_chain(known) if output.chain else known
        bound = functools.partial(budget.allowed, "fused", output.type.dtype, output.terms, right)
        bounds = bound(counted)
        if draw is not None and budget.exceeded(errors, bounds):
            bounds = draw.bounds(Seen(name, kept.values, right, choose, bound), counted)
        judged[name] = Judged(errors, bounds, known)
        reasons += [f"{name}: {line}" for line in budget.exceeded(errors, bounds)]
    return judged, reasons


def misshapen(kept: Kept, wanted: TensorType) -> str:
    """What is wrong with an output before any number is compared: its type, or an element that is not finite."""
    if misfit := kept.misfit(wanted.shape, wanted.dtype):
        return f"came as {misfit}"
    return "" if kept.finite else "holds NaN or infinity"


def keep(root: Root, case: Case, name: str, output: Tensor, share: int) -> Kept:
    """What is kept of one of ``share`` outputs."""
    return selection.keep(root, case.id, name, output, _layout(output.ndim, share), share=share)


def chosen_of(root: Root, case: Case, name: str, kept: Kept, oracle: Tensor, share: int) -> Tensor:
    """Of the oracle's whole output the elements that ``keep`` kept of the device's."""
    layout = _layout(oracle.ndim, share)
    told = (kept.shape, kept.values.dtype, kept.digest)
    chosen = selection.selection(root, case.id, name, *told, layout, share=share)
    return chosen.take(selection.as_matrix(oracle, layout))


def _layout(ndim: int, share: int) -> selection.Layout:
    """Latents and videos in rows of a frame; of a channel where many share the room: a selection takes some of every
    64 rows."""
    return selection.Layout((3 if share <= 12 else 2) if ndim == 5 else None)


def wanted_of(scene: Scene, calls: tuple[Call, ...], dtype: torch.dtype) -> dict[str, Wanted]:
    """What every output of these calls must be, by ``call.output``."""
    graphs = scene.graphs(dtype)
    terms = {entry: longest_sum(graph) for entry, graph in graphs.items()}
    return {
        f"{call.name}.{name}": Wanted(value.type, terms[call.entry])
        for call in calls
        for name, value in graphs[call.entry].outputs
    }


def longest_sum(graph: Graph) -> int:
    """Terms of the longest sum in a graph: of a product, a convolution, over attention's keys or a whole video."""
    longest = max((math.prod(v.shape[1:]) for v in graph.inputs_at(Rate.WEIGHTS)), default=1)
    keys = [node.values[1].shape[1] for node in graph.nodes if node.op == "attention"]
    videos = [math.prod(node.values[0].shape[1:]) for node in graph.nodes if node.op == "cfg_zero_star"]
    return max([longest, *keys, *videos])
