"""One session a graph: how it is built, where its nodes were placed, and the sessions that are kept."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from helios.errors import BackendError
from helios.graph import Graph, Node
from helios.ops import opset_hash
from helios_ort.dialect import forms
from helios_ort.installed import runtime
from helios_ort.providers import CPU, Provider

if TYPE_CHECKING:
    from helios.export.dynamic import Unified

__all__ = ["KEPT", "Misplaced", "Refused", "Session", "build", "kept", "plain"]

KEPT = 64
"""How many sessions on the CPU the process keeps beyond their use: weights are inputs, and memory between nodes comes
from one pool, so that one is little more than its list of nodes. Elsewhere each has device memory of its own."""


LONG = 360
"""Characters of a reason that are shown; some providers tell the places in their source first."""


class Refused(BackendError):
    """ONNX Runtime builds no session for a graph; ``why`` is its own reason."""


@dataclasses.dataclass(frozen=True, slots=True)
class Misplaced:
    """A node of ONNX that runs elsewhere than asked for.

    Attributes:
        node: of Helios, that it stands for; None where ONNX Runtime made it of several.
        kind: its op in ONNX.
        provider: that runs it.
    """

    node: Node | None
    kind: str
    provider: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Session:
    """A graph, ready to run.

    Attributes:
        runs: ``onnxruntime.InferenceSession``.
        inputs: its names for the graph's inputs, in their order, without those that are built in.
        outputs: its names for the graph's outputs, in their order.
        misplaced: the nodes that run by another provider.
    """

    runs: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    misplaced: tuple[Misplaced, ...]


_lock = threading.Lock()
_alive: weakref.WeakValueDictionary[tuple[Any, ...], Session] = weakref.WeakValueDictionary()
_recent: collections.OrderedDict[tuple[Any, ...], Session] = collections.OrderedDict()


def kept(graph: Graph, provider: Provider) -> Session:
    """The session of a graph whose weights are inputs; one that the process has already is taken.

    Raises:
        Refused: as ``build``.
    """
    key = (graph.digest, opset_hash(), runtime().__version__, provider, torch.get_num_threads())
    with _lock:
        session = _alive.get(key) or build(graph, provider)
        _alive[key] = session
        if provider.name == CPU:
            _recent[key] = session
            _recent.move_to_end(key)
            while len(_recent) > KEPT:
                _recent.popitem(last=False)
        return session


def build(
    graph: Graph | Unified,
    provider: Provider,
    built_in: Mapping[str, Tensor] | None = None,
    *,
    optimise: bool = True,
) -> Session:
    """A new session.

    Args:
        graph: with at least one node, or several of one structure unified into one; each of its inputs is read.
        provider: to run every node.
        built_in: weights by name, on the host: ONNX Runtime copies them, into whatever form its kernels want.
        optimise: False where only the placement is asked for.

    Raises:
        Refused: ONNX Runtime does not take the graph.
    """
    weights = dict(built_in or {})
    model, inputs, outputs = _model(graph, weights, provider)
    options = _options(provider, optimise)
    values = {name: _value(tensor) for name, tensor in weights.items()}
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    try:
        session = runtime().InferenceSession(
            model, options, providers=[(provider.name, provider.options)], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        raise Refused(plain(str(error))) from error
    nodes = graph.nodes if isinstance(graph, Graph) else graph.graph.nodes
    return Session(session, inputs, outputs, _misplaced(session, nodes, provider))


def _model(
    graph: Graph | Unified, weights: Mapping[str, Tensor], provider: Provider
) -> tuple[bytes, tuple[str, ...], tuple[str, ...]]:
    """The serialised model, whose nodes are called by what they make; its names of inputs and outputs."""
    import onnx_ir as ir

    from helios.export.emitter import Options
    from helios.export.model import to_model

    absent = {name: _absent(name, tensor) for name, tensor in weights.items()}
    model = to_model(graph, Options(opset=provider.opset), initializers=absent, forms=forms(provider))
    for node in model.graph:
        node.name = node.outputs[0].name
    inputs = tuple(str(value.name) for value in model.graph.inputs)
    outputs = tuple(str(value.name) for value in model.graph.outputs)
    return bytes(ir.to_proto(model).SerializeToString()), inputs, outputs


def _absent(name: str, tensor: Tensor) -> Any:
    """A tensor of a model that stands nowhere: the session gets it from memory."""
    import onnx_ir as ir

    from helios.export.wire import element

    return ir.ExternalTensor(
        "in-memory", 0, tensor.nbytes, element(tensor.dtype), shape=ir.Shape(tuple(tensor.shape)), name=name
    )


def _value(tensor: Tensor) -> Any:
    """A host tensor as ONNX Runtime takes it; it reads torch's memory."""
    return runtime().OrtValue.from_dlpack(tensor.detach().cpu().contiguous())


def _options(provider: Provider, optimise: bool) -> Any:
    module = runtime()
    _share_arena()
    options = module.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = 4  # what it would print is raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Its threads would otherwise burn the cores on which torch computes between two evaluations.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimise:
        options.graph_optimization_level = module.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


@functools.cache
def _share_arena() -> None:
    """One pool of host memory for all sessions: each of its own would keep the most that it ever took."""
    module = runtime()
    kind = module.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    module.create_and_register_allocator(module.OrtMemoryInfo("Cpu", kind, 0, module.OrtMemType.DEFAULT), None)


def _misplaced(session: Any, nodes: Sequence[Node], provider: Provider) -> tuple[Misplaced, ...]:
    placed = [
        (part.ep_name, node) for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()
    ]
    by_output = {value.name: node for node in nodes for value in node.outputs}
    return tuple(
        Misplaced(_origin(node.name, by_output), node.op_type, name) for name, node in placed if name != provider.name
    )


def _origin(name: str, by_output: Mapping[str, Node]) -> Node | None:
    """The node of Helios whose form a node of ONNX belongs to: it is called by its output, or by that and a number."""
    first = name.partition("/")[0]  # behind the slash stands what ONNX Runtime made of it
    return by_output.get(first) or by_output.get(first.rpartition(".")[0])


def plain(message: str) -> str:
    """Without the code in front, in one line, and of a long one beginning and end.

    >>> plain("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for Sigmoid(13)")
    'NOT_IMPLEMENTED: Could not find an implementation for Sigmoid(13)'
    """
    head, mark, rest = " ".join(message.split()).partition("[ONNXRuntimeError] : ")
    told = head
    if mark:
        _, kind, text = rest.split(" : ", 2)
        told = f"{kind}: {text}"
    return told if len(told) <= LONG else f"{told[: LONG // 3]} … {told[-2 * LONG // 3 :]}"
