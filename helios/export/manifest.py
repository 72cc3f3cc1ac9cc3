"""``manifest.json`` of an export: what its models are, how they join, and where each weight lies.

``manifest.schema.json`` describes it. Whoever reads it needs neither Helios nor PyTorch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema

from helios.errors import GraphError
from helios.export.weights import Place
from helios.graph import Graph, TensorType, dtype_name
from helios.ops import OPSET, opset_hash
from helios.passes import Plan

if TYPE_CHECKING:
    import onnx_ir as ir

    from helios.export.emitter import Options

__all__ = ["AGAIN", "DATA", "FORMAT", "MANIFEST", "NOTICE", "About", "Written", "document", "places", "read", "schema"]

FORMAT = "helios-onnx-1"
MANIFEST, DATA = "manifest.json", "weights.data"
AGAIN = "copy the folder again, or export it anew"
NOTICE = "RANDOM WEIGHTS: what these models compute means nothing"


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    """What stands in the manifest and not in the graphs.

    Args:
        model: ``name``, ``variant``, ``identity`` (16 hexadecimal digits) and ``random_weights``.
        precision: of the transformer, by name; ``vae_precision`` of the decoder, where there is one.
        sizes: ``height`` and ``width`` in pixels, ``batch`` and ``text_tokens``; of models of free size also
            ``dynamic``, the names of those that may vary, with ``multiple`` and ``largest`` of each.
        given: inputs of slower rates that the caller supplies, in words.
        programs: the calls of the steps; see ``helios.pipeline.calls``. Inputs and outputs by their names in Helios.
        version: of Helios.
    """

    model: Mapping[str, Any]
    precision: str
    sizes: Mapping[str, Any]
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)
    programs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    vae_precision: str = ""
    version: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """One model as it is on the disk.

    Attributes:
        graph: that it was made from; of a model of free size at the size that the manifest names.
        weights: names of the weights built into it.
        data: the file's bytes.
    """

    graph: Graph
    model: ir.Model
    weights: tuple[str, ...]
    data: bytes

    @property
    def file(self) -> str:
        return f"{self.graph.name}.onnx"

    @property
    def inputs(self) -> dict[str, ir.Value]:
        """The model's inputs by their names in the graph."""
        names = [value.name for value in self.graph.inputs if value.name not in self.weights]
        return dict(zip(names, self.model.graph.inputs, strict=True))

    @property
    def outputs(self) -> dict[str, ir.Value]:
        """The model's outputs by their names in the graph."""
        return dict(zip((name for name, _ in self.graph.outputs), self.model.graph.outputs, strict=True))


def document(
    plan: Plan,
    models: Mapping[str, Written],
    weights: Mapping[str, Place],
    digests: Mapping[str, str],
    about: About,
    options: Options,
) -> dict[str, Any]:
    """The manifest.

    Args:
        plan: whose graphs the models are.
        models: by graph name, in the order of the plan.
        weights: places by name.
        digests: SHA-256 of the bytes of each weight.
        about: what only the caller knows.
        options: how the models are written.
    """
    made: dict[str, Any] = {
        "format": FORMAT,
        **({"helios": about.version} if about.version else {}),
        "opset": OPSET,
        "opset_sha256": opset_hash(),
        "plan_sha256": plan.digest,
        "form": options.form,
        "onnx_opset": options.opset,
        "precision": about.precision,
        **({"vae_precision": about.vae_precision} if about.vae_precision else {}),
        "model": dict(about.model),
        **({"notice": NOTICE} if about.model["random_weights"] else {}),
        "sizes": dict(about.sizes),
        "given": dict(about.given),
        "phases": {_OFTEN[rate.label]: [rate.label] for rate in plan.phases if rate.label in models},
        "programs": {name: _named(program, models) for name, program in about.programs.items()},
        "models": [_model(written, plan, models) for written in models.values()],
        "data": {"file": DATA, "bytes": max((place.end for place in weights.values()), default=0)},
        "weights": {name: _weight(place, digests[name]) for name, place in weights.items()},
    }
    return {**made, "sha256": digest(made)}


_OFTEN = {"weights": "load", "prompt": "prompt", "chunk": "chunk"}


def _model(written: Written, plan: Plan, models: Mapping[str, Written]) -> dict[str, Any]:
    graph = written.graph
    rates = {rate.label for rate in plan.phases}
    values = {value.name: value for value in graph.inputs}
    return {
        "name": graph.name,
        "rate": graph.name if graph.name in rates else "step",
        "file": written.file,
        "bytes": len(written.data),
        "sha256": hashlib.sha256(written.data).hexdigest(),
        "graph_sha256": graph.digest,
        "inputs": [
            {**_value(name, value), "rate": values[name].rate.label, "source": _source(name, plan, models)}
            for name, value in written.inputs.items()
        ],
        "outputs": [_value(name, value) for name, value in written.outputs.items()],
        "weights": list(written.weights),
    }


def _value(name: str, value: ir.Value) -> dict[str, Any]:
    """Name in the model and in Helios, dtype, and shape: a text where a size is free."""
    from helios.export.wire import torch_dtype

    assert value.shape is not None
    shape = [size if isinstance(size, int) else str(size.value) for size in value.shape]
    return {"name": value.name, "helios": name, "dtype": dtype_name(torch_dtype(value.dtype)), "shape": shape}


def _source(name: str, plan: Plan, models: Mapping[str, Written]) -> dict[str, str]:
    """From which phase an input comes; all others the caller gives, those of a step as the programs say."""
    for rate, graph in plan.phases.items():
        if any(name == output for output, _ in graph.outputs):
            return {"model": rate.label, "output": str(models[rate.label].outputs[name].name)}
    return {"from": "caller"}


def _weight(place: Place, sha256: str) -> dict[str, Any]:
    kind = {"dtype": dtype_name(place.type.dtype), "shape": list(place.type.shape)}
    return {"offset": place.offset, "bytes": place.type.nbytes, **kind, "sha256": sha256}


def _named(program: Mapping[str, Any], models: Mapping[str, Written]) -> dict[str, Any]:
    """A program with the names that inputs and outputs have in the models."""
    called = [call["model"] for call in program["calls"]]

    def source(told: Mapping[str, Any]) -> dict[str, Any]:
        if "concat" in told:
            return {**told, "concat": [source(part) for part in told["concat"]]}
        if "call" not in told:
            return dict(told)
        return {**told, "output": models[called[told["call"]]].outputs[told["output"]].name}

    def inputs(call: Mapping[str, Any]) -> dict[str, Any]:
        known = models[call["model"]].inputs
        return {str(known[name].name): source(told) for name, told in call["inputs"].items()}

    calls = [{**call, "inputs": inputs(call)} for call in program["calls"]]
    return {**program, "calls": calls, "result": source(program["result"])}


def digest(told: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own digest."""
    rest = {key: value for key, value in told.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def schema() -> dict[str, Any]:
    """The JSON schema of a manifest."""
    text = resources.files("helios.export").joinpath("manifest.schema.json").read_text(encoding="utf-8")
    made: dict[str, Any] = json.loads(text)
    return made


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, checked against the schema, its own digest and this opset.

    Raises:
        GraphError: it is not there, not a manifest, was changed, or is of another opset.
    """
    path = folder / MANIFEST
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GraphError(f"cannot read {path}: {error.strerror}", "name the folder that an export wrote") from error
    except ValueError as error:
        raise GraphError(f"{path} is not JSON: {error}", AGAIN) from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise GraphError(f"{path} is no manifest of models: its format is not {FORMAT!r}")
    for wrong in jsonschema.Draft202012Validator(schema()).iter_errors(told):
        raise GraphError(f"{path}, {wrong.json_path}: {wrong.message[:200]}", AGAIN)
    if told["sha256"] != digest(told):
        raise GraphError(f"{path} does not fit its own digest: it was changed", AGAIN)
    if (told["opset"], told["opset_sha256"]) != (OPSET, opset_hash()):
        came = f"opset {told['opset']} ({told['opset_sha256'][:12]})"
        wanted = f"{OPSET} ({opset_hash()[:12]})"
        raise GraphError(f"{path} was written for {came}, this Helios has {wanted}", "export the model anew")
    return told


def places(told: Mapping[str, Any]) -> list[tuple[Place, str]]:
    """Every weight's place and digest, in the order of the file."""
    from helios.graph import DTYPES

    found = [
        (Place(name, TensorType(tuple(w["shape"]), DTYPES[w["dtype"]]), w["offset"]), w["sha256"])
        for name, w in told["weights"].items()
    ]
    return sorted(found, key=lambda item: item[0].offset)
