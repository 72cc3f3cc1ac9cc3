"""``helios trt``: build engines ahead of time, list them, and look into one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helios.cli import output
from helios.cli.options import (
    BackendOptionsOption,
    HeightOption,
    JsonOption,
    VaePrecisionOption,
    WidthOption,
    backend_options,
)
from helios.errors import InputError

if TYPE_CHECKING:
    from helios.pipeline import Pipeline
    from helios_trt.backend import TrtBackend
    from helios_trt.store import Entry, Store

__all__ = ["app"]

app = typer.Typer(
    help="Build TensorRT engines ahead of time, list them, and look into one.",
    epilog="Example: helios trt build --size 14b --precision bf16",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[
    str | None, typer.Option(metavar="PATH|REPO", help="A model folder, or a hub repository.", show_default=False)
]
RandomSizeOption = Annotated[
    str | None, typer.Option(metavar="tiny|mini|14b", help="Instead of a model: random weights.", show_default=False)
]
OwnVariantOption = Annotated[
    str | None,
    typer.Option(metavar="base|mid|distilled", help="Way to sample.", show_default="the model's, or distilled"),
]
EnginePrecisionOption = Annotated[
    str | None, typer.Option(metavar="bf16|fp16|fp32", help="Of the arithmetic.", show_default="bf16")
]
IndexOption = Annotated[int, typer.Option(metavar="N", help="Of the GPU.")]
EntryArgument = Annotated[str, typer.Argument(metavar="ENTRY", help="Its name, how that begins, or its file.")]


@app.command()
def build(
    model: ModelOption = None,
    size: RandomSizeOption = None,
    variant: OwnVariantOption = None,
    height: HeightOption = 384,
    width: WidthOption = 640,
    batch: Annotated[int, typer.Option(metavar="N", help="Videos that run together.")] = 1,
    precision: EnginePrecisionOption = None,
    vae_precision: VaePrecisionOption = None,
    index: IndexOption = 0,
    backend_option: BackendOptionsOption = None,
    json: JsonOption = False,
) -> None:
    """Build every engine that `helios generate` with these options needs, so that it starts at once.

    Engines that are there already are checked and kept. Needs the GPU: TensorRT times its kernels there.
    """
    backend = _backend(index, backend_options(backend_option))
    began = time.perf_counter()
    pipeline = _pipeline(backend, model, size, variant, precision, vae_precision)
    request = pipeline.request(["engines"] * batch, height=height, width=width, chunks=1)
    pipeline.denoiser(request)
    _decode(pipeline, request)
    seconds = time.perf_counter() - began
    store = backend.engines.store
    entries = [entry for entry in store.entries() if entry.name in backend.engines.used]
    if json:
        output.print_json({"engines": [_data(entry) for entry in entries], "seconds": seconds})
        return
    _print(entries)
    output.line(f"{output.count(len(entries), 'engine')} in {store.folder}, ready after {output.seconds(seconds)}")


def _backend(index: int, options: dict[str, str]) -> TrtBackend:
    """The backend, if it can run here. Raises BackendUnavailable."""
    from helios.backend import select

    return select(f"trt:{index}", options)  # type: ignore[return-value]


def _pipeline(
    backend: TrtBackend,
    model: str | None,
    size: str | None,
    variant: str | None,
    precision: str | None,
    vae_precision: str | None,
) -> Pipeline:
    from helios.pipeline import Pipeline
    from helios.pipeline.model import folder_model, sized_model
    from helios.precision import require_offered

    if (model is None) == (size is None):
        raise InputError("name either a model or a size", "--model PATH_OR_REPO, or --size tiny for random weights")
    name = precision or backend.precisions[0]
    require_offered(name, backend.label, backend.precisions)
    chosen = folder_model(model, variant) if model is not None else sized_model(str(size), variant)
    return Pipeline(chosen, backend, name, vae_precision=vae_precision)


def _decode(pipeline: Pipeline, request: Any) -> None:
    """One chunk of zeros: the split, and so the graphs, are those that a run would choose here."""
    import torch

    from helios.pipeline.history import CHUNK_LATENTS

    codec = pipeline.codec
    split = codec.choose(request.batch, CHUNK_LATENTS, request.height, request.width)
    scale = codec.config.scale_factor_spatial
    shape = (request.batch, codec.config.z_dim, CHUNK_LATENTS, request.height // scale, request.width // scale)
    codec.decode(torch.zeros(shape), split)


@app.command(name="list")
def list_entries(json: JsonOption = False) -> None:
    """List the engines on disk, the one that was not used for the longest time first. Needs no GPU."""
    store = _store()
    entries = store.entries()
    if json:
        output.print_json({"folder": str(store.folder), "engines": [_data(entry) for entry in entries]})
        return
    _print(entries)
    total = sum(entry.nbytes for entry in entries)
    output.line(f"{output.gigabytes(total)} of {output.gigabytes(store.budget)} in {store.folder}")


@app.command()
def inspect(
    entry: EntryArgument,
    all_layers: Annotated[bool, typer.Option("--layers", help="Every layer, not only kinds of them.")] = False,
    index: IndexOption = 0,
    json: JsonOption = False,
) -> None:
    """Show an engine's layers: what is fused, in which types they compute, by which kernels.

    Needs the GPU that it was built for.
    """
    from helios_trt import inspector, library

    found = _store().named(entry)
    backend, module = _backend(index, {}), library.tensorrt()
    _require_here(found, module.__version__, backend.machine.identity())
    with backend.machine.queue():  # which makes the device current
        told = inspector.information(module, found.path)
    if json:
        output.print_json({"entry": _data(found), "engine": told})
        return
    _print([found])
    layers = inspector.layers(told)
    output.heading("Layers, by kind and type of their outputs")
    columns = ["kind", "types", "layers", "ONNX nodes in them"]
    output.table(columns, inspector.by_kind(layers), right=columns[2:])
    if all_layers:
        output.heading("Every layer")
        rows = [(layer.name, ", ".join(layer.types), len(layer.nodes), layer.kernel) for layer in layers]
        output.table(["layer", "types", "nodes", "kernel"], rows, right=["nodes"])


def _require_here(entry: Entry, version: str, device: Mapping[str, str]) -> None:
    """Raises InputError where an engine was built for another TensorRT or GPU: it is good, and of no use here.

    The driver is not compared: an engine may well load with another one.
    """
    from helios_trt.store import differs

    here = {"tensorrt": version, "device": {key: device[key] for key in ("name", "capability")}}
    if differs(entry.facts["environment"], here):
        place = f"TensorRT {version} on {device['name']}, sm {device['capability']}"
        raise InputError(
            f"the engine {entry.name} was built {_place(entry)[0].lower()}{_place(entry)[1:]}; here is {place}",
            "inspect it on such a machine, or name another: helios trt list",
        )


def _store() -> Store:
    from helios_trt.store import Store

    return Store()


def _data(entry: Entry) -> dict[str, Any]:
    return {"entry": entry.name, "path": str(entry.path), **entry.facts}


def _print(entries: list[Entry]) -> None:
    """A table for each TensorRT and device."""
    places = dict.fromkeys(_place(entry) for entry in entries)
    for place in places:
        output.line(place)
        rows = [
            (entry.name, ", ".join(entry.facts["graphs"]), output.gigabytes(entry.nbytes), entry.facts["seconds"])
            for entry in entries
            if _place(entry) == place
        ]
        output.table(["entry", "graphs", "size", "seconds"], rows, right=["size", "seconds"])


def _place(entry: Entry) -> str:
    environment = entry.facts["environment"]
    device = environment["device"]
    return f"For TensorRT {environment['tensorrt']} on {device['name']}, sm {device['capability']}"
