"""Tensors of more than 2³¹ elements, on which an index of 32 bits wraps around.

An operand is one drawn block of prime length, repeated: an element that was read or written 2³¹ or 2³² places off has
another place in its block. Nothing but the chosen elements is computed by the oracle, and no second copy is made of
anything large. A device that has too little memory does not run these cases, with that as the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helios import op
from helios.fit.host import read_host
from helios_conformance import budget
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Judged, Kept, Observation, Verdict
from helios_conformance.draws import Root, normal
from helios_conformance.one_node import OneNode, run_body, types_of, widened
from helios_conformance.references import References
from helios_conformance.selection import all_finite
from helios_conformance.session import Session

__all__ = ["OpLarge"]

ELEMENTS = 2**31 + 2**24
EDGES = (2**30, 2**31)
BLOCK = 4_194_319
"""A prime."""
_WINDOW = 32
_DRAWN = 512
_PIECE = 1 << 26
_COLUMNS = 4099

Index = np.ndarray[Any, np.dtype[np.int64]]


@dataclasses.dataclass(frozen=True, slots=True)
class Large:
    """How an op is run on so many elements.

    Attributes:
        shapes: of the operands, for at least so many elements in the larger of input and output.
        attrs: of the node.
        sources: from flat indices of the output to those of the elements of each operand that they are made of.
        gigabytes: that operands, result and what the body makes in between take at most.
        again: how often the first operand is given, as a list; 0 where it is no list.
    """

    shapes: Callable[[int], list[tuple[int, ...]]]
    attrs: Mapping[str, Any]
    sources: Callable[[Index, Sequence[tuple[int, ...]]], list[Index]]
    gigabytes: float
    again: int = 0


def _rows(elements: int, columns: int = _COLUMNS) -> int:
    return elements // columns + 1


def _up_source(at: Index, shapes: Sequence[tuple[int, ...]]) -> list[Index]:
    """Of a pixel the one that it repeats."""
    h, w = shapes[0][3:]
    rest, x = np.divmod(at, 2 * w)
    rest, y = np.divmod(rest, 2 * h)
    return [(rest * h + y // 2) * w + x // 2]


def _last_source(at: Index, shapes: Sequence[tuple[int, ...]]) -> list[Index]:
    frames, h, w = shapes[0][2:]
    channel, pixel = np.divmod(at, h * w)
    return [(channel * frames + frames - 1) * (h * w) + pixel]


LARGE = {
    "add": Large(lambda n: [(_rows(n), _COLUMNS), (1, _COLUMNS)], {}, lambda at, _: [at, at % _COLUMNS], 9.0),
    "concat": Large(
        lambda n: [(_rows(n // 2), _COLUMNS)], {"dim": 0}, lambda at, s: [at % math.prod(s[0])], 7.0, again=2
    ),
    "last_frames": Large(lambda n: [(1, _rows(n, 61_440), 64, 24, 40)], {"count": 1}, _last_source, 5.0),
    "upsample_nearest": Large(lambda n: [(1, _rows(n, 15_360), 4, 24, 40)], {}, _up_source, 6.0),
}
"""Indices into what a kernel reads (``last_frames``), into what it writes (``upsample_nearest``), and into both."""


class OpLarge:
    """One op on more elements than 32 bits count; not required, since a device may have too little memory."""

    name = "op_large"

    def cases(self, precision: str) -> Iterator[Case]:
        if precision == "bf16":  # the indices are the same in float32, at twice the memory
            for name in LARGE:
                params = {"op": name, "elements": ELEMENTS, "edges": list(EDGES)}
                label = f"{name}[{precision},int32]"
                yield Case(label, "ops", self.name, precision, params, "full", required=False, timeout=900.0)

    def observe(self, case: Case, session: Session) -> Observation:
        large = LARGE[case.params["op"]]
        needed, free = int(large.gigabytes * 1e9 * case.params["elements"] / ELEMENTS), _free(session)
        if free is None or free < needed:
            shown = "is not known" if free is None else f"is {free / 1e9:.1f} GB"
            why = f"it needs {needed / 1e9:.1f} GB of free memory, and what is free {shown}"
            return Observation(facts={"not_run": why, "needed": needed, "free": free})
        operands = self._operands(case, session, large)
        node = OneNode.of(case.params["op"], types_of(operands), large.attrs)
        program = node.load(session, operands)
        result = node.run(program, operands)["o0"]
        session.backend.synchronize()
        return Observation({"o0": _keep(session, case, result)}, {}, program.coverage.rows())

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        if observation.facts.get("not_run"):
            return Verdict("not_run", str(observation.facts["not_run"]))
        if set(observation.outputs) != {"o0"}:
            return Verdict("fail", f"outputs are {', '.join(sorted(observation.outputs)) or 'none'}, wanted o0")
        kept, shape = observation.outputs["o0"], self._result_shape(case)
        chosen = _chosen(root, case, math.prod(shape), kept.digest)
        reasons = _strange(kept, shape, chosen)
        if reasons:
            return Verdict("fail", "; ".join(reasons))
        record = op.get(case.params["op"])
        operands = self._sources(case, root, chosen)
        if record.kind == "move":
            wrong = int((kept.values != operands[0]).sum())
            return _exact(wrong, kept, operands[0])
        oracle = run_body(record, *widened(operands, LARGE[record.name].attrs))["o0"]
        reference = references.get(f"{record.name}[{case.precision},odd]", "o0")
        errors = budget.measure(kept.values, oracle)
        allowed = budget.allowed(record.kind, kept.values.dtype, 1, oracle, reference)
        reasons = [f"o0: {line}" for line in budget.exceeded(errors, allowed)]
        return Verdict("fail" if reasons else "pass", "; ".join(reasons), {"o0": Judged(errors, allowed, reference)})

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        return {}  # those of a small sample: each element stands alone

    def _operands(self, case: Case, session: Session, large: Large) -> list[Any]:
        shapes = large.shapes(case.params["elements"])
        dtype, device = session.dtype(case.precision), session.backend.device
        made = [_filled(_block(session.root, case, i, dtype), shape, device) for i, shape in enumerate(shapes)]
        return [made[:1] * large.again] if large.again else made

    def _result_shape(self, case: Case) -> tuple[int, ...]:
        large, dtype = LARGE[case.params["op"]], torch.bfloat16
        made = [torch.empty(shape, dtype=dtype, device="meta") for shape in large.shapes(case.params["elements"])]
        node = OneNode.of(case.params["op"], types_of([made * large.again] if large.again else made), large.attrs)
        return node.graph.outputs[0][1].shape

    def _sources(self, case: Case, root: Root, chosen: Index) -> list[Tensor]:
        """The elements of each operand that the chosen ones are made of."""
        large = LARGE[case.params["op"]]
        places = large.sources(chosen, large.shapes(case.params["elements"]))
        blocks = (_block(root, case, i, torch.bfloat16) for i in range(len(places)))
        return [block[torch.from_numpy(at % BLOCK)] for block, at in zip(blocks, places, strict=True)]


def _free(session: Session) -> int | None:
    memory = session.backend.memory()
    if memory is not None:
        return memory[0]
    return read_host().available if session.backend.device.type == "cpu" else None


def _block(root: Root, case: Case, operand: int, dtype: torch.dtype) -> Tensor:
    return normal(root.key("large", case.params["op"], operand), (BLOCK,), dtype)


def _filled(block: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The block repeated, piece by piece: no index into more than one block is needed."""
    flat = torch.empty(math.prod(shape), dtype=block.dtype, device=device)
    there = block.to(device)
    for piece in flat.split(BLOCK):
        piece.copy_(there[: piece.numel()])
    return flat.reshape(shape)


def _keep(session: Session, case: Case, result: Tensor) -> Kept:
    """Chosen windows, and the digest of the whole, which decides which; a piece at a time."""
    flat = result.detach().contiguous().reshape(-1)
    sha, finite = hashlib.sha256(), True
    for piece in flat.split(_PIECE):
        host = piece.to("cpu")
        sha.update(memoryview(host.view(torch.uint8).numpy()))
        finite = finite and all_finite(host)
    told = sha.hexdigest()
    starts = _chosen(session.root, case, flat.numel(), told)[::_WINDOW]
    values = torch.cat([flat.narrow(0, int(at), _WINDOW).to("cpu", copy=True) for at in starts])
    return Kept(values, tuple(result.shape), str(result.dtype).removeprefix("torch."), told, finite)


def _chosen(root: Root, case: Case, size: int, digest: str) -> Index:
    """Flat indices: windows at both ends, around the edges, and where the digest says."""
    key = root.key("selection", case.id, "o0", digest)
    words = np.array([key & (2**64 - 1), key >> 64], np.uint64)
    drawn = np.random.Philox(key=words).random_raw(_DRAWN) % np.uint64(size - _WINDOW)
    always = [0, size - _WINDOW, *(at for edge in case.params["edges"] for at in (edge - _WINDOW, edge))]
    starts = np.unique([at for at in (*always, *drawn.tolist()) if 0 <= at <= size - _WINDOW])
    return np.asarray((starts.astype(np.int64)[:, None] + np.arange(_WINDOW)).reshape(-1), np.int64)


def _strange(kept: Kept, shape: tuple[int, ...], chosen: Index) -> list[str]:
    if misfit := kept.misfit(shape, torch.bfloat16):
        return [f"o0 is {misfit}"]
    if kept.values.numel() != len(chosen):
        return [f"o0: {kept.values.numel()} elements were kept, the selection takes {len(chosen)}"]
    return [] if kept.finite else ["o0: not every element of the whole output is finite"]


def _exact(wrong: int, kept: Kept, right: Tensor) -> Verdict:
    numbers = {"o0": Judged(budget.measure(kept.values, right.double()), budget.NONE, None)}
    if not wrong:
        return Verdict("pass", "", numbers)
    return Verdict("fail", f"o0: data movement must be exact, and {wrong} of {right.numel()} elements differ", numbers)
