"""What surrounds the numbers of one node: the same operands run several times, each time under other circumstances.

=========== ========= =========================================================================================
run         draws     what is different
=========== ========= =========================================================================================
``a``       first     nothing: this is the judged run, its outputs are ``o0``, ``o1`` …
``other``   second    other operands of the same shapes (weights stay); judged too, as ``o0@other``
``again``   first     at the addresses where ``other`` found its operands: the bits of ``a``
``anew``    first     a program of its own: the bits of ``a``
``padded``  first     every operand misaligned, its rows apart; weights enter with each step; judged, ``o0@padded``
``permuted`` first    every operand misaligned, its dimensions in reverse order in memory; judged, ``o0@permuted``
=========== ========= =========================================================================================

Each run finds NaN, zeros, or what the system left in memory that it did not write. Which is drawn when the case runs
and from nothing that the backend could know, so a kernel cannot be on its best behaviour in the poisoned runs only; the
facts say it under ``treatments``, and ``Session.options["treatments"]`` runs the same again.

Of large operands there is only run ``a``: *brief*.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from helios import op
from helios.errors import UnsupportedNode
from helios.graph import Rate, TensorType
from helios.op import Kind
from helios.program import Program
from helios_conformance.case import Case, Judged, Kept, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.guards import Allocations, Guarded, Layout, Treatment, dirty, share_memory
from helios_conformance.node_values import NodeValues
from helios_conformance.one_node import WEIGHTS, OneNode, types_of
from helios_conformance.references import References
from helios_conformance.session import Session

__all__ = [
    "JUDGED",
    "Subject",
    "draw_treatments",
    "judge",
    "judge_facts",
    "judge_values",
    "keep",
    "observe",
    "on_host",
    "same_bits",
    "split",
]

JUDGED = ("", "other", "padded", "permuted")
"""The runs whose numbers are judged; the empty one is ``a``."""

FACTS = {
    "inputs_unchanged": "it wrote to its operands",
    "guards_intact": "it wrote beyond its operands",
    "allocations_intact": "it wrote beyond memory that it had allocated",
    "outputs_typed": "its outputs are not what the op gives",
    "outputs_separate": "its outputs share memory with operands",
    "outputs_kept": "a later run wrote to outputs that were given away",
    "repeats_equal": "the same operands gave other bits",
}
"""What must be true, and what it means where it is not."""

_OF_SEVERAL = frozenset({"outputs_kept", "repeats_equal"})
"""What one run cannot show."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A node and two draws of its operands, host tensors in the order of the signature."""

    op: str
    attrs: Mapping[str, Any]
    first: Sequence[Any]
    second: Sequence[Any]

    def operands(self, run: str) -> list[Any]:
        """What a run gets: the second draw of what changes with each step where ``run`` is ``other``."""
        if run != "other":
            return list(self.first)
        pairs = zip(op.get(self.op).operands, self.first, self.second, strict=True)
        return [first if operand.name in WEIGHTS else second for operand, first, second in pairs]

    def node(self, *, packed: bool = True) -> OneNode:
        return OneNode.of(self.op, types_of(self.first), self.attrs, packed=packed)

    def values(self, run: str, brief: bool = False) -> NodeValues:
        """How the numbers of a run are kept and judged."""
        return NodeValues(op.get(self.op), self.operands(run), self.attrs, share_of(run, brief))


def split(name: str) -> tuple[str, str]:
    """``o0@other`` is output ``o0`` of run ``other``; plain ``o0`` is of run ``""``."""
    output, _, run = name.partition("@")
    return output, run


def share_of(run: str, brief: bool) -> int:
    """By how much a run shares the bytes that a case may keep: half is for the first."""
    return 1 if brief else 6 if run else 2


def draw_treatments() -> dict[str, Treatment]:
    """What memory holds in each run: NaN in exactly half of them; of equal runs one in NaN, one in zeros, one plain."""
    source = random.SystemRandom()
    equal: list[Treatment] = ["nan", "zero", "plain"]
    rest: list[Treatment] = ["nan", "nan", source.choice(("zero", "plain"))]
    loads: list[Treatment] = ["nan", "plain"]
    return {
        **dict(zip(("load", "load_anew"), source.sample(loads, 2), strict=True)),
        **dict(zip(("a", "again", "anew"), source.sample(equal, 3), strict=True)),
        **dict(zip(("other", "padded", "permuted"), source.sample(rest, 3), strict=True)),
    }


def observe(case: Case, session: Session, subject: Subject, *, brief: bool = False) -> Observation:
    """Run a node in all the ways above.

    Args:
        case: which decides what is kept.
        session: at work on a backend. Its option ``treatments`` is used where set, as the facts gave it.
        subject: the node.
        brief: only run ``a``, for operands that are large.

    Raises:
        UnsupportedNode: the backend declares that it cannot run it.
    """
    watch = _Watch(session, subject, session.options.get("treatments") or draw_treatments())
    node = subject.node()
    here = watch.place("", node, "contiguous")
    program = watch.load("load", node, here)
    first = watch.run("a", node, program, here)
    kept = on_host(first)
    outputs = {"": kept}
    if not brief:
        outputs |= watch.others(node, program, here, first, kept)
    values = {run: subject.values(run, brief) for run in outputs}
    return Observation(keep(case, session, values, outputs), watch.facts(program), program.coverage.rows())


def keep(
    case: Case, session: Session, values: Mapping[str, NodeValues], outputs: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Kept]:
    """What is kept of the outputs of several runs, by run and name."""
    return {
        _label(name, run): kept
        for run, tensors in outputs.items()
        for name, kept in values[run].keep(session, case, tensors).items()
    }


def judge(
    case: Case, observation: Observation, root: Root, references: References, subject: Subject, *, brief: bool = False
) -> Verdict:
    """Judge what ``observe`` saw: the numbers of every run, then what surrounds them."""
    values = {run: subject.values(run, brief) for run in (JUDGED[:1] if brief else JUDGED)}
    reasons, judged = judge_values(case, observation, root, references, values)
    reasons += judge_facts(observation.facts, op.get(subject.op).kind, brief=brief)
    return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)


def judge_values(
    case: Case, observation: Observation, root: Root, references: References, values: Mapping[str, NodeValues]
) -> tuple[list[str], dict[str, Judged]]:
    """The numbers of every run, by the budget: what is wrong, and the numbers. A run that is missing is wrong."""
    reasons: list[str] = []
    judged: dict[str, Judged] = {}
    for run, node in values.items():
        part = {split(name)[0]: kept for name, kept in observation.outputs.items() if split(name)[1] == run}
        verdict = node.judge(case, Observation(part), root, references)
        judged |= {_label(name, run): numbers for name, numbers in verdict.judged.items()}
        if verdict.reason:
            reasons.append(f"run {run!r}: {verdict.reason}" if run else verdict.reason)
    strange = sorted({split(name)[1] for name in observation.outputs} - set(values))
    return [*reasons, *(f"there is no run {run!r}" for run in strange)], judged


def _label(output: str, run: str) -> str:
    return f"{output}@{run}" if run else output


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two host tensors agree in shape, dtype and every bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


Placed = list[Any]
"""As operands are: ``Guarded``, lists of them, or None."""


class _Watch:
    """Runs, and what was found wrong in them."""

    def __init__(self, session: Session, subject: Subject, treatments: Mapping[str, Treatment]) -> None:
        self.session, self.subject, self.treatments = session, subject, treatments
        self.found: dict[str, list[str]] = {fact: [] for fact in FACTS}
        self.allocations: list[tuple[str, Allocations]] = []
        self.declined = ""
        self.ran: list[str] = []

    def place(self, run: str, node: OneNode, layout: Layout) -> Placed:
        """Operands in guarded buffers: loaded weights on the host, as readers give them, others on the device."""
        steps = {v.name for v in node.graph.inputs if v.rate == Rate.STEP}

        def one(name: str, host: Tensor) -> Guarded:
            # Loaded weights are contiguous, as in a checkpoint.
            loaded = name not in steps
            device = torch.device("cpu") if loaded else self.session.backend.device
            return Guarded.of(host, device, "contiguous" if loaded else layout)

        return _each(one, self.subject.operands(run))

    def load(self, label: str, node: OneNode, placed: Placed) -> Program:
        with self._treated(label, node):
            return node.load(self.session, _each(lambda _, g: g.tensor, placed))

    def run(self, label: str, node: OneNode, program: Program, placed: Placed) -> dict[str, Tensor]:
        """One run, and all that can be said right after it. The outputs, on the device."""
        self.ran.append(label)
        with self._treated(label, node):
            outputs = node.run(program, _each(lambda _, g: g.tensor, placed))
        self._typed(label, node, outputs)
        for name, guarded in _named(placed):
            changed, beyond = guarded.broken()
            self._note("inputs_unchanged", changed, f"{name} in run {label!r}")
            self._note("guards_intact", beyond, f"around {name} in run {label!r}")
            for output, tensor in outputs.items():
                shared = share_memory(tensor, guarded.tensor)
                self._note("outputs_separate", shared, f"{output} and {name} in run {label!r}")
        return outputs

    @contextlib.contextmanager
    def _treated(self, label: str, node: OneNode) -> Iterator[None]:
        """Memory as this run is to find it; on leaving, the device is done and the guards are checked."""
        treatment = self.treatments[label]
        if treatment == "plain":
            yield
        else:
            mode = Allocations(treatment, self.session.backend.device)
            self.allocations.append((label, mode))
            dirty(self.session.backend.device, _sizes(node), treatment)
            with mode:
                yield
        self.session.backend.synchronize()

    def _typed(self, label: str, node: OneNode, outputs: Mapping[str, Any]) -> None:
        here = self.session.backend.device
        for name, value in node.graph.outputs:
            came = outputs.get(name)
            if type(came) is not Tensor:
                raise TypeError(f"{name} in run {label!r} is a {type(came).__name__}, wanted a torch.Tensor")
            type_ = TensorType(tuple(came.shape), came.dtype)
            self._note("outputs_typed", type_ != value.type, f"{name} is {type_} in run {label!r}, wanted {value.type}")
            elsewhere = came.device.type != here.type or (here.index or 0) != (came.device.index or 0)
            self._note("outputs_typed", elsewhere, f"{name} is on {came.device} in run {label!r}, wanted {here}")

    def rewrite(self, placed: Placed, tensors: Sequence[Any]) -> None:
        for (_, guarded), host in zip(_named(placed), _flat(tensors), strict=True):
            guarded.write(host)

    def others(
        self,
        node: OneNode,
        program: Program,
        here: Placed,
        first: Mapping[str, Tensor],
        wanted: Mapping[str, Tensor],
    ) -> dict[str, dict[str, Tensor]]:
        """Every run but the first; outputs on the host, by run, of those that are judged.

        Args:
            node, program, here: of the first run.
            first: its outputs, on the device, which everything after it must leave alone.
            wanted: the same on the host.
        """
        there = self.place("other", node, "contiguous")
        outputs = {"other": on_host(self.run("other", node, program, there))}
        # Now: a later run of the same operands would write the same bits.
        self._same("outputs_kept", first, wanted)
        self.rewrite(there, self.subject.operands(""))
        self._same("repeats_equal", self.run("again", node, program, there), wanted, " in run 'again'")
        anew = self.load("load_anew", node, here)
        self._same("repeats_equal", self.run("anew", node, anew, here), wanted, " in run 'anew'")
        return outputs | self.strided(node, program)

    def _same(self, fact: str, outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str = "") -> None:
        for name, tensor in on_host(outputs).items():
            self._note(fact, not same_bits(tensor, wanted[name]), name + where)

    def strided(self, node: OneNode, program: Program) -> dict[str, dict[str, Tensor]]:
        """Runs on operands of other strides; weights take part as operands of the step, if the backend takes them."""
        free, runner = node, program
        if any(v.rate == Rate.WEIGHTS for v in node.graph.inputs):
            try:
                free = self.subject.node(packed=False)
                runner = free.load(self.session, self.subject.first)
            except UnsupportedNode as error:
                self.declined, free, runner = error.why, node, program
        layouts: tuple[Layout, ...] = ("padded", "permuted")
        return {at: on_host(self.run(at, free, runner, self.place("", free, at))) for at in layouts}

    def _note(self, fact: str, wrong: bool, where: str) -> None:
        if wrong:
            self.found[fact].append(where)

    def facts(self, program: Program) -> dict[str, Any]:
        """JSON values; what must be true, and under ``details`` where it was not."""
        for label, mode in self.allocations:
            broken = mode.broken()
            self._note("allocations_intact", bool(broken), f"{broken} of {mode.count} in run {label!r}")
        brief = "again" not in self.ran
        return {
            **{fact: not where for fact, where in self.found.items() if not (brief and fact in _OF_SEVERAL)},
            "engine": self.session.is_engine(program),
            "treatments": dict(self.treatments),
            # Kernels that are not written in Python allocate where nothing can be put around it.
            "allocations_guarded": sum(mode.count for _, mode in self.allocations),
            "declined": self.declined[:500],
            "details": {fact: where[:6] for fact, where in self.found.items() if where},
        }


def judge_facts(facts: Mapping[str, Any], kind: Kind, *, brief: bool = False) -> list[str]:
    """What is wrong with a case, from its facts; a fact that is missing counts as false.

    Args:
        facts: as ``observe`` made them, or as a bundle tells them.
        kind: of the op: one that only moves data may give views. So may an engine.
        brief: there was only one run.
    """
    excused = {"outputs_separate"} if kind == "move" or facts.get("engine") is True else set()
    if brief:
        excused |= _OF_SEVERAL
    details = facts.get("details")
    reasons = []
    for fact, words in FACTS.items():
        if fact not in excused and facts.get(fact) is not True:
            where = details.get(fact) if isinstance(details, Mapping) else None
            reasons.append(f"{words} ({', '.join(map(str, where))})" if where and isinstance(where, list) else words)
    return reasons


def _each(fn: Callable[[str, Any], Any], operands: Sequence[Any], prefix: str = "i", joint: str = "") -> list[Any]:
    """The function of every operand and its name, in the same structure."""
    made: list[Any] = []
    for i, x in enumerate(operands):
        name = f"{prefix}{joint}{i}"
        nested = isinstance(x, list | tuple)
        made.append(_each(fn, x, name, ".") if nested else None if x is None else fn(name, x))
    return made


def on_host(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, also where the device is the host."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in outputs.items()}


def _flat(operands: Sequence[Any]) -> list[Any]:
    return [x for item in operands for x in (item if isinstance(item, list | tuple) else (item,)) if x is not None]


def _named(placed: Placed) -> list[tuple[str, Guarded]]:
    pairs: list[tuple[str, Guarded]] = []
    _each(lambda name, guarded: pairs.append((name, guarded)), placed)
    return pairs


def _sizes(node: OneNode) -> list[int]:
    """Bytes of what a kernel of this node probably allocates: its outputs, and the same in float32; twice each."""
    shapes = [value.type for _, value in node.graph.outputs]
    return [size for t in shapes for size in (t.nbytes, t.nbytes // t.dtype.itemsize * 4) for _ in range(2)]
