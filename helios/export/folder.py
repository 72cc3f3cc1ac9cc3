"""A folder of ONNX models: one a phase and entry, the weights that they share, and the manifest that joins them.

The folder appears whole or not at all. It is written beside its place under another name, synced, and renamed last;
what a killed export left is removed by the next one into the same place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helios.errors import GraphError, HeliosError, InputError, StorageError
from helios.export import manifest as manifests
from helios.export import weights as files
from helios.export.manifest import DATA, MANIFEST, About, Written
from helios.export.weights import Place
from helios.graph import Graph, Rate, TensorType
from helios.media.storage import need_space, writing
from helios.passes import Plan
from helios.program import WeightReader

if TYPE_CHECKING:
    import onnx_ir as ir

    from helios.export.emitter import Options

__all__ = ["Exported", "OnBytes", "export", "load", "require_onnx"]

OnBytes = Callable[[int, int], None]
"""Told how many bytes of weights are written, and how many there are."""


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """A folder of models.

    Attributes:
        path: of the folder.
        manifest: as ``manifest.schema.json`` describes it.
    """

    path: Path
    manifest: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Of models and weights."""
        models = sum(model["bytes"] for model in self.manifest["models"])
        return int(models + self.manifest["data"]["bytes"])

    def model(self, name: str) -> Path:
        """The file of one model. Raises GraphError if there is none of that name."""
        known = {model["name"]: model["file"] for model in self.manifest["models"]}
        if name not in known:
            raise GraphError(f"{self.path} has no model {name!r}; it has {', '.join(known)}")
        return self.path / str(known[name])


def export(
    out: str | os.PathLike[str],
    plans: Sequence[Plan],
    weights: WeightReader,
    about: About,
    options: Options | None = None,
    *,
    progress: OnBytes = lambda written, total: None,
) -> Exported:
    """Write a plan as a folder of models.

    The host holds the models without weights, and one weight at a time.

    Args:
        out: the folder, which must not exist.
        plans: of one, the models have exact sizes. Of several, which differ in sizes alone and hold no constants
            (``build_plan(…, local_constants=True)``), they are open in what differs; the manifest speaks of the first.
        weights: read in the order of the file.
        about: for the manifest.
        options: the form, and how it is written.
        progress: called after each weight.

    Raises:
        InputError: the folder exists.
        UnsupportedNode: an op without a form in ONNX; names it, with its operands' types.
        GraphError: sizes that cannot be left open.
        StorageError: too little room, another export into the same folder, any other failure to write.
        CheckpointError: whatever the source of the weights has to say.
        HeliosError: onnx is not installed.
    """
    require_onnx()
    from helios.export.emitter import Options as Chosen

    target, chosen = Path(out), options or Chosen()
    _require_new(target)
    places = files.arrange(_weight_types(plans[0]))
    models = _models(plans, places, about, chosen)
    total = files.total_bytes(places)
    known = total + sum(len(written.data) for written in models.values())
    _remove_left(target)  # before room is counted: it may be as large as what comes
    need_space(target, known + _MANIFEST_ROOM, purpose=f"the export {target.name}")
    with _appearing(target) as part:
        digests = files.write(part / DATA, places, weights, lambda written: progress(written, total))
        for written in models.values():
            _write(part / written.file, written.data)
            _check(part / written.file)
        made = manifests.document(plans[0], models, places, digests, about, chosen)
        _write(part / MANIFEST, (json.dumps(made, indent=1, ensure_ascii=False) + "\n").encode())
    return Exported(target, made)


_MANIFEST_ROOM = 1 << 20


def require_onnx() -> None:
    """Raise HeliosError, with what to install, unless the libraries that write models are here."""
    try:
        import onnx
        import onnx_ir
    except ImportError as error:
        raise HeliosError(
            f"ONNX models need the package {error.name or 'onnx'!r}, which is not installed",
            "pip install 'helios-hal[onnx]'",
        ) from error
    del onnx, onnx_ir


def load(path: str | os.PathLike[str], *, whole: bool = True) -> Exported:
    """A folder that ``export`` wrote, checked.

    Args:
        path: of the folder.
        whole: read every file and compare it with its digest; otherwise compare those of the models and the manifest,
            and of the weights the size of their file.

    Raises:
        GraphError: the manifest is missing, changed, or of another opset; a model or the weights are missing, cut off
            or changed: names the file, and the weight.
    """
    folder = Path(path)
    told = manifests.read(folder)
    for model in told["models"]:
        _require_model(folder / model["file"], model)
    files.require_whole(folder / DATA, manifests.places(told), size=told["data"]["bytes"], digests=whole)
    return Exported(folder, told)


def _require_model(path: Path, told: Mapping[str, Any]) -> None:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise GraphError(f"cannot read the model {path}: {error.strerror}", manifests.AGAIN) from error
    if hashlib.sha256(data).hexdigest() != told["sha256"]:
        raise GraphError(f"the model {path} does not fit its digest: it was changed", manifests.AGAIN)


# Before anything is written.


def _require_new(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists already", "choose another --out, or remove it first")
    file = next((folder for folder in target.parents if folder.is_file()), None)
    if file is not None:
        raise InputError(f"{target} cannot be made: {file} is a file", "choose an --out in a folder")


def _weight_types(plan: Plan) -> dict[str, TensorType]:
    """Every weight that the plan's nodes read, in the order of use."""
    held = {name for graph in plan.phases.values() for name, _ in graph.outputs}
    values = [value for graph in plan.graphs.values() if graph.nodes for value in graph.inputs_at(Rate.WEIGHTS)]
    return {value.name: value.type for value in values if value.name not in held}


def _models(plans: Sequence[Plan], places: Mapping[str, Place], about: About, options: Options) -> dict[str, Written]:
    """The models of all graphs that compute something. First all are looked through for what cannot be written."""
    from helios.export.model import require_forms

    graphs = {name: [plan.graphs[name] for plan in plans] for name, graph in plans[0].graphs.items() if graph.nodes}
    for samples in graphs.values():
        require_forms(samples[0])
    return {name: _built(samples, places, plans[0], about, options) for name, samples in graphs.items()}


def _built(
    samples: Sequence[Graph], places: Mapping[str, Place], plan: Plan, about: About, options: Options
) -> Written:
    import onnx_ir as ir

    from helios.export.dynamic import unify
    from helios.export.model import METADATA, to_model

    graph = samples[0]
    built_in = {v.name: files.external(places[v.name], DATA) for v in graph.inputs if v.name in places}
    whole = graph if all(other == graph for other in samples) else unify(samples)
    model = to_model(whole, options, initializers=built_in)
    told = {"plan.sha256": plan.digest, "model": about.model["identity"], "precision": about.precision}
    model.metadata_props.update({METADATA + key: str(value) for key, value in told.items()})
    if about.model["random_weights"]:
        model.doc_string = manifests.NOTICE
    _require_shapes(model)
    return Written(graph, model, tuple(built_in), ir.to_proto(model).SerializeToString(deterministic=True))


def _require_shapes(model: ir.Model) -> None:
    """An engine should not have to guess: each value says its dtype and its shape."""
    for node in model.graph:
        for value in node.outputs:
            if value.type is None or value.shape is None:
                raise GraphError(f"graph {model.graph.name}: %{value.name} of {node.op_type} has no shape in ONNX")


# Writing.


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder beside the target, which becomes the target at the end; after a mistake or Ctrl-C it is gone.

    A lock on it says that its writer lives: what it leaves when it is killed is no longer locked.
    """
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        try:
            with _locked(part):
                yield part
                _sync(part)
                _require_new(target)
                part.rename(target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        _sync(target.parent)


def _remove_left(target: Path) -> None:
    """Remove what killed exports left."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.part-*"):
        with writing(left), _locked(left):
            shutil.rmtree(left)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises StorageError where another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            why = f"another export writes {folder} just now"
            raise StorageError(why, "wait for it, or choose another --out") from error
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check(path: Path) -> None:
    """ONNX's own checker with strict shape inference; by path, so that it reads no weights. What it refuses is a defect
    of ours and keeps its traceback."""
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
