"""Graphs and weights on disk: one JSON file for the graphs, one safetensors file beside it for the weights.

``block.json`` holds the format, the opset's version, the text form of each graph as a list of lines, and a digest over
them; ``block.safetensors`` holds the weights that were given, under the names of the graphs' inputs. Nothing in either
file is ever executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from helios import op
from helios.errors import GraphError
from helios.graph import Graph, Rate, TensorType, parse
from helios.ops import OPSET
from helios.passes import Plan

__all__ = ["FORMAT", "Saved", "load", "save"]

FORMAT = "helios-graphs-1"


@dataclasses.dataclass(frozen=True, slots=True)
class Saved:
    """What a file held: graphs by name, or the plan that they make; and weights by input name (host)."""

    graphs: Mapping[str, Graph]
    weights: Mapping[str, Tensor]
    plan: Plan | None = None

    def read(self, name: str) -> Tensor:
        """One weight, for ``Program.load``. Raises GraphError if the file has none of that name."""
        if name not in self.weights:
            raise GraphError(f"the saved weights hold no {name!r}", fix="save the graphs together with their weights")
        return self.weights[name]


def save(
    path: str | os.PathLike[str], graphs: Mapping[str, Graph] | Plan, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write graphs, or a plan, as ``path`` (JSON), and weights beside it with the suffix ``.safetensors``.

    Args:
        path: ends in ``.json``. Each file is whole or not there at all; the JSON is written last.
        graphs: by name; of a plan, phases and steps are kept apart.
        weights: by input name; each must have the shape and dtype of its input. ``None`` writes no second file.

    Raises:
        GraphError: the path does not end in ``.json``, or a weight is not what its input takes.
    """
    target = _json_path(path)
    sections = _sections(graphs)
    for graph in (graph for section in sections.values() for graph in section.values()):
        op.verify(graph)
    texts = {kind: {name: str(g).splitlines() for name, g in part.items()} for kind, part in sections.items()}
    document: dict[str, Any] = {"format": FORMAT, "opset": OPSET, "digest": _digest(texts), **texts}
    if weights is not None:
        _check_weights(weights, sections)
        beside = target.with_suffix(".safetensors")
        # Tensors may be views of one another, which the format cannot express.
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(weights.items())}
        _replace(beside, safetensors.torch.save(plain))
        document["weights"] = {"file": beside.name, "sha256": _file_digest(beside)}
    _replace(target, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def load(path: str | os.PathLike[str]) -> Saved:
    """Read what ``save`` wrote.

    Raises:
        GraphError: no such file, not this format, another opset, a digest that does not fit, a graph that does not
            verify, or weights that are missing, damaged or of other types than their inputs.
    """
    source = _json_path(path)
    document = _document(source)
    texts: dict[str, Any] = {kind: document[kind] for kind in ("graphs", "phases", "steps") if kind in document}
    if document.get("digest") != _digest(texts):
        raise GraphError(f"{source}: the graphs do not fit their digest", fix="copy the file again, or save it anew")
    sections: dict[str, dict[str, Graph]] = {kind: _graphs(part, source) for kind, part in texts.items()}
    for graph in (graph for section in sections.values() for graph in section.values()):
        op.verify(graph)
    weights = _read_weights(source, document["weights"]) if "weights" in document else {}
    _check_weights(weights, sections)
    if "graphs" in sections:
        return Saved(sections["graphs"], weights)
    rates = {rate.label: rate for rate in Rate}
    if set(sections) != {"phases", "steps"} or not set(sections["phases"]) <= set(rates):
        raise GraphError(f"{source}: neither graphs nor the phases and steps of a plan")
    plan = Plan({rates[name]: graph for name, graph in sections["phases"].items()}, sections["steps"])
    return Saved(plan.graphs, weights, plan)


def _json_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".json":
        raise GraphError(f"{target} does not end in .json", fix="name the JSON file; weights are written beside it")
    return target


def _sections(graphs: Mapping[str, Graph] | Plan) -> dict[str, dict[str, Graph]]:
    if isinstance(graphs, Plan):
        return {"phases": {rate.label: g for rate, g in graphs.phases.items()}, "steps": dict(graphs.steps)}
    return {"graphs": dict(graphs)}


def _digest(texts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _document(source: Path) -> dict[str, Any]:
    """The JSON, checked to be of this format and opset."""
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise GraphError(f"cannot read {source}: {error.strerror}") from error
    except ValueError as error:
        raise GraphError(f"{source} is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise GraphError(f"{source} holds no graphs: its format is not {FORMAT!r}")
    if document.get("opset") != OPSET:
        raise GraphError(
            f"{source} was written for opset {document.get('opset')}, this Helios has {OPSET}",
            fix="save the graphs anew with this version",
        )
    return document


def _graphs(texts: Any, source: Path) -> dict[str, Graph]:
    try:
        return {name: parse("\n".join(lines)) for name, lines in texts.items()}
    except (AttributeError, TypeError) as error:
        raise GraphError(f"{source}: the graphs are not lists of lines") from error


def _read_weights(source: Path, entry: Any) -> dict[str, Tensor]:
    name = entry.get("file") if isinstance(entry, dict) else None
    if name != source.with_suffix(".safetensors").name:
        raise GraphError(f"{source}: the weights are said to be in {name!r}, and not beside it")
    beside = source.with_name(name)
    try:
        damaged = entry.get("sha256") != _file_digest(beside)
        weights = {} if damaged else safetensors.torch.load_file(beside)
    except (OSError, SafetensorError) as error:
        raise GraphError(f"cannot read {beside}: {error}", fix="copy both files") from error
    if damaged:
        raise GraphError(f"{beside} does not fit its digest", fix="copy the file again, or save it anew")
    return weights


def _check_weights(weights: Mapping[str, Tensor], sections: Mapping[str, Mapping[str, Graph]]) -> None:
    """Each weight must be an input at rate weights, of the same type."""
    graphs = [graph for section in sections.values() for graph in section.values()]
    wanted = {v.name: v.type for graph in graphs for v in graph.inputs_at(Rate.WEIGHTS)}
    for name, tensor in weights.items():
        came = TensorType(tuple(tensor.shape), tensor.dtype)
        if name not in wanted:
            raise GraphError(f"no graph has a weight {name!r}")
        if came != wanted[name]:
            raise GraphError(f"weight {name!r} is {came}, the graphs take {wanted[name]}")


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise GraphError(f"cannot write {path}: {error.strerror}") from error
