"""A plan as sessions: one a graph, inputs and outputs in torch's memory."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from helios import op
from helios.backend import Backend
from helios.errors import BackendError, UnsupportedNode
from helios.graph import Graph, Node, Rate, TensorType, Value
from helios.passes import Plan
from helios.program import Coverage, Program, WeightReader
from helios_ort.packed import Shared, grouped
from helios_ort.pieces import Piece, in_pieces, run_bodies
from helios_ort.providers import Provider
from helios_ort.sessions import Refused, Session, build, kept, plain

__all__ = ["OrtProgram"]

FIX = "`--fallback reference` (or HELIOS_FALLBACK=reference) runs such nodes by torch's ops, and counts them"

FIX_GRAPH = "choose another backend, see `helios backends`, or another version of ONNX Runtime"


class OrtProgram(Program):
    """The sessions of a plan.

    With weights ``shared`` they are inputs of every session: the one copy in torch's memory serves all. ``packed`` ones
    are built into sessions when they are loaded, and kept there alone, in whatever form the kernels prefer; graphs of
    one structure, such as the pyramid stages of a network, share a session.

    Args:
        plan: its graphs.
        backend: asked which nodes it runs.
        provider: for every session.
        fallback: as for ``lower``.
        packed: whether weights are built in.

    Raises:
        UnsupportedNode: a node that the provider does not run, and no fallback is allowed.
    """

    def __init__(self, plan: Plan, backend: Backend, provider: Provider, *, fallback: str, packed: bool) -> None:
        super().__init__(plan, backend, Coverage())
        self.provider = provider
        self._fallback = fallback == "reference"
        self._pieces = {name: in_pieces(graph, self._runs) for name, graph in plan.graphs.items()}
        self._sessions: dict[str, Session] = {}
        for graph in plan.graphs.values():
            self._count(graph)
        self._shared = self._built_in() if packed else []
        self._gone = {graph.name: shared.built_in for shared in self._shared for graph in shared.graphs}
        for piece in self._native():
            if piece.graph.name not in self._gone:
                with _told(piece.graph.name):
                    session = kept(piece.graph, provider)
                self._keep(piece.graph, session)

    def _native(self) -> Iterable[Piece]:
        return (piece for pieces in self._pieces.values() for piece in pieces if piece.native)

    def _runs(self, node: Node) -> bool:
        """Whether a session runs the node. Raises UnsupportedNode where none does and nothing else may."""
        reason = self.backend.supports(node)
        if reason is not None and not self._fallback:
            raise self._unsupported(node, reason)
        return reason is None

    def _unsupported(self, node: Node | str, reason: str) -> UnsupportedNode:
        return UnsupportedNode(f"backend {self.backend.label!r} cannot run: {node}\n  reason: {reason}", FIX)

    def _count(self, graph: Graph) -> None:
        for node in graph.nodes:
            if node.inputs:
                reason = self.backend.supports(node) or ""
                kind = "fused" if op.get(node.op).kind == "fused" else "native"
                self.coverage.count(node.op, "fallback" if reason else kind, reason)

    def _keep(self, graph: Graph, session: Session) -> None:
        """Take a session if all its nodes were placed where they belong, or may be elsewhere: then they are counted."""
        again = graph.name in self._sessions
        self._sessions[graph.name] = session
        counted: set[str] = set()
        for found in session.misplaced:
            reason = f"ONNX Runtime gives {found.kind} to {found.provider}, not to {self.provider.name}"
            if not self._fallback:
                raise self._unsupported(found.node or f"graph {graph.name}", reason)
            if found.node is not None and not again and found.node.outputs[0].name not in counted:
                counted.add(found.node.outputs[0].name)
                self._recount(found.node, reason)

    def _recount(self, node: Node, reason: str) -> None:
        counts = self.coverage.counts.setdefault(node.op, collections.Counter())
        native = "native" if counts["native"] else "fused"
        counts[native] -= 1
        self.coverage.count(node.op, "fallback", reason)

    # Weights.

    def _built_in(self) -> list[Shared]:
        """The graphs whose weights are built into sessions: not of the weights phase, which reads them once."""
        first = {piece.graph.name for piece in self._pieces[Rate.WEIGHTS.label]}
        read = (piece.graph for piece in self._native() if piece.graph.inputs_at(Rate.WEIGHTS))
        return grouped((graph for graph in read if graph.name not in first), self.provider)

    def load(self, weights: WeightReader) -> None:
        super().load(weights)
        for shared in self._shared:
            with _told(shared.graphs[0].name):
                session = build(shared.whole, self.provider, {name: self.weights[name] for name in shared.built_in})
            for graph in shared.graphs:
                self._keep(graph, session)
        read = {name for graph in self.plan.graphs if graph != Rate.WEIGHTS.label for name in self.wanted(graph)}
        self.weights = {name: tensor for name, tensor in self.weights.items() if name in read}

    def wanted(self, graph: str) -> Iterable[str]:
        read = {value.name for _, value in self.plan.graphs[graph].outputs}
        read |= {value.name for piece in self._pieces[graph] for value in self._reads(piece)}
        return [value.name for value in self.plan.graphs[graph].inputs if value.name in read]

    def _reads(self, piece: Piece) -> list[Value]:
        gone = self._gone.get(piece.graph.name, frozenset())
        return [value for value in piece.graph.inputs if value.name not in gone]

    # Running.

    def evaluate(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        env = dict(inputs)
        for piece in self._pieces[graph]:
            env |= self._run(piece, env)
        return {name: env[value.name] for name, value in self.plan.graphs[graph].outputs}

    def _run(self, piece: Piece, env: dict[str, Tensor]) -> dict[str, Tensor]:
        if not piece.native:
            return run_bodies(piece.graph, env, self.backend.device)
        given = [env[value.name] for value in self._reads(piece)]
        types = [value.type for _, value in piece.graph.outputs]
        made = run(self._sessions[piece.graph.name], given, types, self.backend.device)
        return {name: tensor for (name, _), tensor in zip(piece.graph.outputs, made, strict=True)}


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """What ONNX Runtime says of a whole graph whose nodes it takes one by one."""
    try:
        yield
    except Refused as error:
        why = f"ONNX Runtime takes each node of graph {name!r}, but not all of them together: {error.why}"
        raise BackendError(why, FIX_GRAPH) from error


def run(
    session: Session, inputs: Sequence[Tensor], outputs: Sequence[TensorType], device: torch.device
) -> list[Tensor]:
    """One evaluation, in torch's memory: inputs are read where they are, outputs written into new tensors.

    Args:
        inputs: in the order of the session's, of any strides; strided ones are copied.
        outputs: their types, in the order of the session's.
    """
    from helios.export.wire import element

    binding = session.runs.io_binding()
    held = [tensor.detach().contiguous() for tensor in inputs]  # until the run is over
    made = [torch.empty(kind.shape, dtype=kind.dtype, device=device) for kind in outputs]
    spare = torch.empty(64, dtype=torch.uint8, device=device)
    for bind, names, tensors in (
        (binding.bind_input, session.inputs, held),
        (binding.bind_output, session.outputs, made),
    ):
        for name, tensor in zip(names, tensors, strict=True):
            # ONNX Runtime wants an address for a tensor without elements, too; nothing is read or written there.
            place = tensor if tensor.numel() else spare
            at = place.device
            bind(name, at.type, at.index or 0, int(element(tensor.dtype)), tuple(tensor.shape), place.data_ptr())
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # ONNX Runtime has a stream of its own
    try:
        session.runs.run_with_iobinding(binding)
    except Exception as error:
        raise BackendError(f"ONNX Runtime failed: {plain(str(error))}") from error
    return made
