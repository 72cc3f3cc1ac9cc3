"""The plan of the published size as a backend lowers it, as text: what its kernels or its engine have to run.

``python -m helios_conformance.graphs BACKEND PRECISION FOLDER`` writes it. A process of its own, since it imports the
backend, which the judging process never does.
"""

from __future__ import annotations

import collections
import functools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from helios import op
from helios.backend import Backend, ReferenceBackend
from helios.errors import HeliosError
from helios.fit.costs import Setting, stage_graphs
from helios.graph import Graph, TensorType, Value, parse
from helios.lower import plan_for
from helios.model import presets
from helios.passes import Plan, expand
from helios.precision import PRECISIONS
from helios_conformance import subject

__all__ = ["contradictions", "of_backend", "of_spec"]

_SECONDS = 300

_NO_GRAPH = (HeliosError, ArithmeticError, LookupError, RecursionError, RuntimeError, TypeError, ValueError)
"""What parsing and inferring the types of a stranger's text can raise."""

_Shape = tuple[str, tuple[str, ...], tuple[str, ...]]
"""A node without its names: op with attributes, types of the inputs, types of the outputs."""


def _plan(precision: str, backend: Backend) -> Plan:
    setting = Setting(presets.size("14b"), presets.variant("distilled"), 384, 640, precision=PRECISIONS[precision])
    return plan_for(stage_graphs(setting), backend)


def of_backend(precision: str, backend: Backend) -> dict[str, str]:
    """Text by the graph's name: phases, and an entry for each stage. Shapes alone, no weight is made."""
    return {name: f"{graph}\n" for name, graph in _plan(precision, backend).graphs.items()}


def of_spec(spec: str, precision: str, folder: Path) -> str:
    """Write them as ``FOLDER/<name>.txt`` by another process; "" or, where that fails, why there are none."""
    command = [sys.executable, "-P", "-m", "helios_conformance.graphs", spec, precision, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"lowering the plan took more than {_SECONDS} s"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"status {done.returncode}")[:500]


def contradictions(texts: Mapping[str, str], precision: str) -> tuple[tuple[str, str], ...]:
    """Where graphs are not the plan of the published size, however it was fused: (name, what is wrong).

    Fused nodes are written out; what is left must be the nodes of the plan, node for node, up to their order and names.
    """
    return _contradictions(tuple(sorted(texts.items())), precision)


@functools.lru_cache(8)
def _contradictions(texts: tuple[tuple[str, str], ...], precision: str) -> tuple[tuple[str, str], ...]:
    wrong: list[tuple[str, str]] = []
    wanted = _nodes(precision)
    found: collections.Counter[_Shape] = collections.Counter()
    for name, text in texts:
        try:
            graph = parse(text)
            op.verify(graph)
            found.update(_shapes(expand(graph)[0]))
        except _NO_GRAPH as error:
            wrong.append((name, f"it is no graph: {str(error).splitlines()[0][:300]}"))
            continue
        if f"{graph}\n" != text:
            wrong.append((name, "it is not written as graphs are"))
    if not wrong and found != wanted:
        strange = next(iter([*(found - wanted), *(wanted - found)]))
        wrong.append(("", f"written out they are not the plan of the published size: see {strange[0]} {strange[1]}"))
    return tuple(wrong)


@functools.cache
def _nodes(precision: str) -> collections.Counter[_Shape]:
    plan = _plan(precision, ReferenceBackend())
    return collections.Counter(shape for graph in plan.graphs.values() for shape in _shapes(expand(graph)[0]))


def _shapes(graph: Graph) -> list[_Shape]:
    def types(values: tuple[Value, ...]) -> tuple[str, ...]:
        return tuple(str(TensorType(v.shape, v.dtype)) for v in values)

    return [(f"{node.op}{dict(node.attrs)}", types(node.values), types(node.outputs)) for node in graph.nodes]


def _main(spec: str, precision: str, folder: Path) -> None:
    texts = of_backend(precision, subject.selected(spec))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        _main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    except HeliosError as failure:
        sys.exit(failure.why.splitlines()[0])
