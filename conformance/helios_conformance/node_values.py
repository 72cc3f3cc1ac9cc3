"""One node on given operands: what is kept of its outputs, and how that is judged by the error budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from helios import op
from helios.graph import TensorType
from helios_conformance import budget, rows, selection, terms
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Judged, Kept, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.one_node import run_body, types_of
from helios_conformance.references import References
from helios_conformance.selection import Selection
from helios_conformance.session import Session

__all__ = ["NodeValues"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class NodeValues:
    """An op, its operands on the host, and its attributes.

    Attributes:
        record: the op.
        tensors: operands in the order of the signature: tensors, lists of them, or None.
        attrs: by name.
        share: by how many such nodes the bytes that a case may keep are shared.
    """

    record: op.Op[Any, Any]
    tensors: Sequence[Any]
    attrs: Mapping[str, Any]
    share: int = 1

    @property
    def outputs(self) -> dict[str, TensorType]:
        """Types of the outputs by name, as the op's record has them."""
        types = tuple(tuple(t) if isinstance(t, list) else t for t in types_of(self.tensors))
        attrs = tuple(sorted((dict(self.record.attrs) | dict(self.attrs)).items()))
        found, _ = op.infer(self.record, types, attrs)
        return {f"o{i}": type_ for i, type_ in enumerate(found)}

    def keep(self, session: Session, case: Case, result: Mapping[str, Tensor]) -> dict[str, Kept]:
        """What is kept of the device's outputs."""
        return {
            name: selection.keep(
                session.root,
                case.id,
                name,
                session.to_host(tensor),
                rows.layout(self.record.name, self.tensors, self.attrs, name),
                share=len(result) * self.share,
            )
            for name, tensor in result.items()
        }

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        """Every output that the op's record promises must be there, of its type, and within its budget."""
        wanted = self.outputs
        reasons = [*_absent(wanted, observation.outputs)]
        judged: dict[str, Judged] = {}
        for name, type_ in wanted.items():
            kept = observation.outputs.get(name)
            if kept is None:
                continue
            chosen = self._selection(root, case, name, kept.digest, len(wanted) * self.share)
            wrong = _strange(kept, type_, chosen)
            if not wrong and self.record.kind == "move":
                wrong, judged[name] = self._exact(name, kept, chosen)
            elif not wrong:
                wrong, judged[name] = self._near(name, kept, chosen, references.get(case.id, name))
            reasons += [f"{name}: {line}" for line in wrong]
        return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)

    def reference(self, case: Case, root: Root) -> dict[str, Errors]:
        """Errors of the body in the working dtype, on elements chosen as they are in a run; {} for data movement."""
        if self.record.kind == "move":
            return {}
        names = self.outputs
        found = {}
        for name in names:
            chosen = self._selection(root, case, name, "reference", len(names))
            oracle, came = (self._take(name, chosen, wide=wide) for wide in (True, False))
            found[name] = budget.measure(came, oracle)
        return found

    def _take(self, name: str, chosen: Selection, *, wide: bool) -> Tensor:
        return rows.take(self.record, self.tensors, self.attrs, name, chosen, wide=wide)

    def _selection(self, root: Root, case: Case, name: str, digest: str, share: int) -> Selection:
        """As ``keep`` chose, if the output has the type that it should."""
        type_ = self.outputs[name]
        seen = rows.layout(self.record.name, self.tensors, self.attrs, name)
        return selection.selection(root, case.id, name, type_.shape, type_.dtype, digest, seen, share=share)

    def _exact(self, name: str, kept: Kept, chosen: Selection) -> tuple[list[str], Judged]:
        """Data movement: the whole output, bit by bit, by its digest."""
        right = run_body(self.record, self.tensors, self.attrs)[name]
        oracle = chosen.take(selection.as_matrix(right, rows.layout(self.record.name, self.tensors, self.attrs, name)))
        numbers = Judged(budget.measure(kept.values, oracle.double()), budget.NONE, None)
        lines = []
        if not budget.exact(kept.values, oracle):
            lines.append("data movement must be exact, and some kept elements differ")
        elif selection.digest(right) != kept.digest:
            lines.append("data movement must be exact, and the digest of the whole output differs")
        return lines, numbers

    def _near(self, name: str, kept: Kept, chosen: Selection, reference: Errors) -> tuple[list[str], Judged]:
        oracle = self._take(name, chosen, wide=True)
        errors = budget.measure(kept.values, oracle)
        k = terms.of_tensors(self.record, self.tensors, self.attrs)
        shared = terms.factors(self.record, self.tensors)
        if terms.narrow_sums(self.record):
            reference = dataclasses.replace(reference, misrounded=1.0)
        allowed = budget.allowed(self.record.kind, kept.values.dtype, k, oracle, reference, shared)
        return budget.exceeded(errors, allowed), Judged(errors, allowed, reference)


def _absent(wanted: Mapping[str, TensorType], came: Mapping[str, Kept]) -> list[str]:
    if wanted.keys() == came.keys():
        return []
    return [f"outputs are {', '.join(sorted(came)) or 'none'}, wanted {', '.join(sorted(wanted))}"]


def _strange(kept: Kept, type_: TensorType, chosen: Selection) -> list[str]:
    """What is wrong with an output before any number is looked at."""
    if misfit := kept.misfit(type_.shape, type_.dtype):
        return [f"it is {misfit}"]
    if kept.values.numel() != chosen.count(torch.Size(type_.shape).numel()):
        return [f"{kept.values.numel()} elements were kept, the selection takes {chosen.count(0)}"]
    return [] if kept.finite else ["not every element of the whole output is finite"]
