"""Where two backends part on one plan: the first node that errs beyond its budget.

A program of kernels is run once with the result of every node of its own plan given out: with the fusions that it
wants, in its place among the others. Each node is then judged on the operands that it was really given, against its
body in float64, so an error is found where it arises and not where it has grown. A program that runs whole shows no
inner value: it is run up to chosen cuts of the graph, and the cut is bisected at which it leaves its budget.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from helios import op
from helios.backend import Backend, ReferenceBackend
from helios.errors import HeliosError
from helios.graph import Graph, Node, Operand, TensorType, Value
from helios.passes import expand, fuse, prune
from helios_conformance import budget, causes, terms
from helios_conformance.budget import Errors
from helios_conformance.case import Judged
from helios_conformance.cuts import Cut, blocks, cuts, prefix, segment
from helios_conformance.draws import Root, normal
from helios_conformance.graph_runs import largest, longest_sum
from helios_conformance.one_node import outputs_of, run_body, widened
from helios_conformance.replay import Given, Subject, node_graph, run
from helios_conformance.session import Session

__all__ = ["Comparison", "Finding", "Side", "compare", "examine", "walk"]

_WINDOW = 1 << 30
"""Bytes of inner values that one run gives out."""

_SMALL = 4096
"""Elements below which one draw says too little of what rounding may do."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """The first place at which a backend leaves its budget.

    Attributes:
        label: of the backend.
        where: the node as text, or the part of the graph between two cuts.
        block: of the network, such as ``blocks.3``; may be empty.
        judged: the numbers, by output.
        reasons: what is beyond which bound.
        subject: the node, or the part, with its very inputs.
        note: what else is to be known; may be empty.
    """

    label: str
    where: str
    block: str
    judged: Mapping[str, Judged]
    reasons: Sequence[str]
    subject: Subject
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Side:
    """What one backend did with the graph.

    Attributes:
        label: of the backend.
        kind: ``kernels``, judged node by node, or ``engine``, judged from cut to cut.
        outputs: of the whole graph, by name.
        values: inner values by name in the core graph, those that fit into one window.
        places: how many nodes, or cuts, were judged.
        finding: the first beyond its budget, or None.
    """

    label: str
    kind: str
    outputs: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    places: int
    finding: Finding | None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Both sides, and how far apart they are: ``apart`` holds ‖a − b‖ / ‖b‖ by value, in the order of the graph, for
    values that both gave out; the graph's outputs last."""

    sides: tuple[Side, Side]
    apart: Mapping[str, float]

    @property
    def findings(self) -> list[Finding]:
        return [side.finding for side in self.sides if side.finding is not None]


def compare(subject: Subject, a: Session, b: Session) -> Comparison:
    """Run and judge a graph on two backends, which may be two of the same."""
    core = Subject(_core(subject.graph), subject.source)
    sides = (examine(core, a), examine(core, b))
    x, y = ({**side.values, **{f"output {k}": v for k, v in side.outputs.items()}} for side in sides)
    return Comparison(sides, {name: _apart(x[name], y[name]) for name in x if name in y})


def examine(subject: Subject, session: Session) -> Side:
    """One backend on a graph of core ops. Raises UnsupportedNode where it does not run it."""
    try:
        outputs = run(session, subject)
    except HeliosError:
        raise
    except Exception as error:
        return _raising(subject, session, error)
    program = session.lower({subject.graph.name: subject.graph})
    if session.is_engine(program):
        return _engine(subject, session, outputs, "engine")
    watched = _watched(subject, session)
    if any(not budget.exact(watched.outputs[name], outputs[name]) for name in outputs):
        # Giving inner values out changed the result: memory that is used again, for instance.
        return _engine(subject, session, outputs, "kernels", "it gives another result when its inner values are read")
    return dataclasses.replace(watched, outputs=outputs)


def _raising(subject: Subject, session: Session, error: Exception) -> Side:
    """The first node with which the graph cannot be run: bisected over prefixes of the backend's own plan."""
    plan = _fused(subject.graph, session.backend)

    def raises(i: int) -> bool:
        shown = tuple((f"o{j}", v) for j, v in enumerate(plan.nodes[i].outputs))
        part = prune(dataclasses.replace(plan, nodes=plan.nodes[: i + 1], outputs=shown))[0]
        try:
            run(session, Subject(part, subject.source))
        except Exception:
            return True
        return False

    at = bisect.bisect_left(range(len(plan.nodes) - 1), True, key=raises)
    node = plan.nodes[at]
    values = walk(Subject(plan, subject.source), {v.name for v in node.values}, wide=False)
    label, reason = session.backend.label, f"it raised {type(error).__name__}: {error}"[:2000]
    part = Subject(node_graph(node), Given(values))
    finding = Finding(label, str(node), blocks(plan)[node.outputs[0].name], {}, [reason], part)
    return Side(label, "kernels", {}, {}, at + 1, finding)


def _core(graph: Graph) -> Graph:
    return expand(prune(graph)[0])[0]


def _apart(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    difference, size = float((a.double() - b.double()).norm()), float(b.double().norm())
    return difference / size if size else (0.0 if difference == 0 else math.inf)


# Programs of kernels.


def _watched(subject: Subject, session: Session) -> Side:
    """The program with inner values given out, window by window, until one errs."""
    plan = _fused(subject.graph, session.backend)
    named = blocks(plan)
    values: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    places, finding = 0, None
    for nodes in _windows(plan.nodes):
        seen = _look(plan, subject, session, nodes)
        values, outputs = {k: v for k, v in seen.items() if not k.startswith("out.")}, _own(seen)
        operands = values | {v.name: subject.read(v.name) for v in plan.inputs if _reads(nodes, v)}
        for node in () if is_reference(session.backend) else nodes:
            places += 1
            finding = _judge(node, operands, session, named[node.outputs[0].name])
            if finding is not None:
                return Side(session.backend.label, "kernels", outputs, values, places, finding)
    return Side(session.backend.label, "kernels", outputs, values, places, finding)


def _fused(graph: Graph, backend: Backend) -> Graph:
    """The graph as the backend's plan has it. Names of values stay, so all plans of a graph share them."""
    return fuse(graph, backend.fusions, backend.supports)[0]


def _windows(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    window: list[Node] = []
    room = _WINDOW
    for node in nodes:
        size = sum(v.type.nbytes for v in node.outputs)
        if window and size > room:
            yield window
            window, room = [], _WINDOW
        window.append(node)
        room -= size
    if window:
        yield window


def _reads(nodes: Iterable[Node], value: Value) -> bool:
    return any(value in node.values for node in nodes)


def _look(plan: Graph, subject: Subject, session: Session, nodes: Sequence[Node]) -> dict[str, Tensor]:
    """Results of these nodes and what they read, by name; the graph's own outputs under ``out.``."""
    made = {v.name for node in plan.nodes for v in node.outputs}
    shown = {v.name: v for node in nodes for v in (*node.values, *node.outputs) if v.name in made}
    outputs = [(f"at.{name}", value) for name, value in shown.items()]
    outputs += [(f"out.{name}", value) for name, value in plan.outputs]
    seen = run(session, Subject(dataclasses.replace(plan, outputs=tuple(outputs)), subject.source))
    return {name.removeprefix("at."): tensor for name, tensor in seen.items()}


def _own(seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("out."): x for name, x in seen.items() if name.startswith("out.")}


def _judge(node: Node, values: Mapping[str, Tensor], session: Session, block: str) -> Finding | None:
    """One node on the operands that it was given."""
    operands = [_fetch(x, values) for x in node.inputs]
    came = {f"o{i}": values[v.name] for i, v in enumerate(node.outputs)}
    judged, reasons = judge_node(node, operands, came)
    if not reasons:
        return None
    given = Given({v.name: values[v.name] for v in node.values})
    label, where = session.backend.label, session.backend.device.type
    cause = causes.likely(node.op, node.outputs[0].type.dtype, where) if judged else ""
    return Finding(label, str(node), block, judged, reasons, Subject(node_graph(node), given), cause)


def _fetch(operand: Operand, values: Mapping[str, Tensor]) -> Any:
    if isinstance(operand, Value):
        return values[operand.name]
    return None if operand is None else [values[v.name] for v in operand]


def judge_node(node: Node, operands: Sequence[Any], came: Mapping[str, Tensor]) -> tuple[dict[str, Judged], list[str]]:
    """The numbers of a node's outputs, and what is beyond its bound.

    Args:
        node: core or fused.
        operands: on the host, in the order of the signature.
        came: outputs ``o0``, ``o1`` … on the host.
    """
    record, attrs = op.get(node.op), node.attributes
    types = {f"o{i}": v.type for i, v in enumerate(node.outputs)}
    strange = [name for name, type_ in types.items() if TensorType(tuple(came[name].shape), came[name].dtype) != type_]
    if strange:
        return {}, [f"{n}: {came[n].dtype}{list(came[n].shape)} came, wanted {types[n]}" for n in strange]
    if record.kind == "move":
        wanted = run_body(record, operands, attrs)
        wrong = [name for name in wanted if not budget.exact(came[name], wanted[name])]
        return {}, [f"{name}: data movement must be exact, and is not" for name in wrong]
    judged, reasons = {}, []
    oracle = run_body(record, *widened(operands, attrs))
    references = _references(record, operands, attrs, oracle)
    longest = terms.of_tensors(record, operands, attrs)
    for name, right in oracle.items():
        errors = budget.measure(came[name], right)
        shared = terms.factors(record, operands)
        bounds = budget.allowed(record.kind, came[name].dtype, longest, right, references[name], shared)
        judged[name] = Judged(errors, bounds, references[name])
        reasons += [f"{name}: {line}" for line in budget.exceeded(errors, bounds)]
    return judged, reasons


def _references(
    record: op.Op[Any, Any], operands: Sequence[Any], attrs: Mapping[str, Any], oracle: Mapping[str, Tensor]
) -> dict[str, Errors]:
    """What the body in the working dtype errs on these operands; of small outputs the largest of several draws near
    them, since a few elements may round well by luck."""
    came = run_body(record, operands, attrs)
    rows = {name: [budget.measure(came[name], oracle[name])] for name in oracle}
    if max(x.numel() for x in oracle.values()) < _SMALL:
        for draw in range(8):
            near = [_jittered(x, draw, i) for i, x in enumerate(operands)]
            right, ours = run_body(record, *widened(near, attrs)), run_body(record, near, attrs)
            for name in oracle:
                rows[name].append(budget.measure(ours[name], right[name]))
    return {name: largest(errors) for name, errors in rows.items()}


def _jittered(x: Any, draw: int, place: int) -> Any:
    """Operands a few per cent away, with other roundings."""
    if isinstance(x, list):
        return [_jittered(t, draw, 100 * place + i) for i, t in enumerate(x)]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    noise = normal(Root(draw).key("near", place), tuple(x.shape), torch.float32, 0.03, 1.0)
    return (x.float() * noise).to(x.dtype)


# Programs that run whole.


def _engine(subject: Subject, session: Session, outputs: Mapping[str, Tensor], kind: str, note: str = "") -> Side:
    """Bisect the cut at which it leaves the budget of a prefix; then judge the part before that cut alone."""
    golden = _Golden(subject)
    label, found = session.backend.label, golden.cuts

    def wrong(i: int) -> bool:
        """Whether the prefix up to cut i is beyond its budget; behind the last stands the whole graph."""
        if i == len(found):
            return bool(golden.judge(subject, outputs, None)[1])
        part = Subject(prefix(subject.graph, found[i]), subject.source)
        return bool(golden.judge(part, run(session, part), found[i])[1])

    if not wrong(len(found)):
        return Side(label, kind, outputs, {}, len(found) + 1, None)
    low, high = -1, len(found)  # right up to low, wrong at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wrong(middle) else (middle, high)
    start, end = found[low] if low >= 0 else None, found[high] if high < len(found) else None
    finding = _part(subject, session, golden, start, end, note)
    return Side(label, kind, outputs, {}, len(found) + 1, finding)


def _part(
    subject: Subject, session: Session, golden: _Golden, start: Cut | None, end: Cut | None, note: str
) -> Finding:
    """The part between two cuts, from the reference's own value at the first."""
    given = {} if start is None else {start.value.name: golden.narrow[start.value.name]}
    graph = segment(subject.graph, start, end)
    inputs = {v.name: given[v.name] if v.name in given else subject.read(v.name) for v in graph.inputs}
    part = Subject(graph, Given(inputs))
    judged, reasons = _Golden(part).judge(part, run(session, part), None)
    if not reasons:
        note = "; ".join(filter(None, (note, "alone this part is within its budget: the error has grown up to here")))
    first = "its inputs" if start is None else str(start.value)
    last = "its outputs" if end is None else str(end.value)
    where = f"from {first} to {last}, {len(graph.nodes)} nodes"
    block = end.block if end is not None else ""
    return Finding(session.backend.label, where, block, judged, reasons, part, note)


class _Golden:
    """The reference's values at the cuts of a graph, in float64 and in the working dtype."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.cuts = subject, cuts(subject.graph)
        self._wanted = {c.value.name for c in self.cuts} | {v.name for _, v in subject.graph.outputs}

    @functools.cached_property
    def wide(self) -> dict[str, Tensor]:
        return walk(self.subject, self._wanted, wide=True)

    @functools.cached_property
    def narrow(self) -> dict[str, Tensor]:
        return walk(self.subject, self._wanted, wide=False)

    def judge(self, part: Subject, came: Mapping[str, Tensor], end: Cut | None) -> tuple[dict[str, Judged], list[str]]:
        """What a device gave for a part of the graph that begins where the graph does and ends at a cut."""
        longest = longest_sum(part.graph)
        judged, reasons = {}, []
        for name, value in (("at", end.value),) if end is not None else self.subject.graph.outputs:
            oracle = self.wide[value.name]
            errors, reference = budget.measure(came[name], oracle), budget.measure(self.narrow[value.name], oracle)
            bounds = budget.allowed("fused", came[name].dtype, longest, oracle, reference)
            judged[name] = Judged(errors, bounds, reference)
            reasons += [f"{name}: {line}" for line in budget.exceeded(errors, bounds)]
        return judged, reasons


def walk(subject: Subject, wanted: set[str], *, wide: bool) -> dict[str, Tensor]:
    """Values of a graph by its bodies on the host, in float64 or as the graph says; each is forgotten after its last
    use unless it is wanted."""
    graph = subject.graph
    last = {v.name: i for i, node in enumerate(graph.nodes) for v in node.values}
    values: dict[str, Any] = {}
    kept = {v.name: subject.read(v.name) for v in graph.inputs if v.name in wanted}
    for i, node in enumerate(graph.nodes):
        for value in node.values:
            if value.name not in values:
                values[value.name] = subject.read(value.name)
        operands: list[Any] = [_fetch(x, values) for x in node.inputs]
        attrs: Mapping[str, Any] = node.attributes
        if wide:
            operands, attrs = widened(operands, attrs)
        with torch.no_grad():
            results = outputs_of(op.get(node.op).fn(*operands, **attrs))
        for j, value in enumerate(node.outputs):
            values[value.name] = results[f"o{j}"]
            if value.name in wanted:
                kept[value.name] = results[f"o{j}"]
        for value in (*node.values, *node.outputs):
            if last.get(value.name, -1) <= i:
                values.pop(value.name, None)
    return {name: x.double() if wide else x for name, x in kept.items()}


def is_reference(backend: Backend) -> bool:
    """Whether a backend is the bodies themselves on the host: it cannot err."""
    return type(backend) is ReferenceBackend and backend.device.type == "cpu"
