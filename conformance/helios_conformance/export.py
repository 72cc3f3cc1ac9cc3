"""Cases as files for hosts without torch, and the files that come back.

::

    DIR/
      README.md          what is here, and how results are written
      helios_results.py  reads inputs and writes results; needs numpy alone
      index.json         suite, root of all draws, and the cases with their folders
      cases/<folder>/    case.json, inputs.safetensors, expected.safetensors; or the layout of ONNX' backend tests
      results/           where what comes back is put, one file a case: <folder>.safetensors
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

import helios
from helios.errors import InputError
from helios.graph import dtype_name
from helios.media.storage import atomic, writing
from helios_conformance import FORMAT, onnx_cases, portable
from helios_conformance.case import Case, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.portable import Portable
from helios_conformance.record import record
from helios_conformance.references import committed
from helios_conformance.suite import suite_hash

__all__ = ["FORMATS", "Export", "export"]

FORMATS = ("safetensors", "onnx")

LARGEST = 256 << 20
"""Bytes of a case's inputs above which it is left out."""


@dataclasses.dataclass(frozen=True, slots=True)
class Export:
    """What was written: ids by folder, and (id, reason) of what was left out."""

    folders: Mapping[str, str]
    left_out: Sequence[tuple[str, str]]


def export(
    out: Path,
    cases: Iterable[Case],
    root: Root,
    *,
    suite: str,
    precision: str = "",
    form: str = "safetensors",
    most: int = LARGEST,
) -> Export:
    """Write cases of one precision's scope.

    Args:
        out: new or empty folder.
        cases: any; those that cannot leave the program are left out, with the reason.
        root: of all draws.
        suite: ``quick`` or ``full``, which the index remembers.
        precision: whose scope it is, which the index remembers; "" for that of the cases, where they have one.
        form: ``safetensors`` or ``onnx``.
        most: bytes of a case's inputs.

    Raises:
        InputError: no such format, the folder is in use, nothing can be exported, or ``onnx`` is not installed.
        StorageError: the disk.
    """
    if form not in FORMATS:
        raise InputError(f"unknown format {form!r}", fix=f"choose one of {', '.join(FORMATS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty", fix="choose another folder")
    if form == "onnx":
        onnx_cases.need()
    folders: dict[str, str] = {}
    left_out: list[tuple[str, str]] = []
    told: list[dict[str, Any]] = []
    with writing(out):
        (out / "results").mkdir(parents=True)
        for case in cases:
            made, reason = _portable(case, root, most)
            if made is None:
                left_out.append((case.id, reason))
                continue
            folder = f"{len(told):04d}-{''.join(c if c.isalnum() else '_' for c in case.id).strip('_')}"
            _write(out / "cases" / folder, case, made, form)
            folders[case.id] = folder
            told.append({"id": case.id, "folder": folder})
        if not told:
            raise InputError("none of these cases can leave the program", "cases of values, plan nodes, blocks can")
        _frame(out, told, left_out, root, suite, precision or case.precision, form)
    return Export(folders, left_out)


def _portable(case: Case, root: Root, most: int) -> tuple[Portable | None, str]:
    made = portable.of(case, root)
    if made is None:
        return None, "it needs the device at hand"
    if made.size() > most:
        return None, f"its inputs have {made.size() / 1e6:.0f} MB, the limit is {most / 1e6:.0f} MB"
    return made, ""


def _write(folder: Path, case: Case, made: Portable, form: str) -> None:
    folder.mkdir(parents=True)
    told = {"id": case.id, "level": case.level, "precision": case.precision, **made.about()}
    inputs, expected = made.inputs(), made.expected()
    told["inputs"] = {name: [dtype_name(t.dtype), list(t.shape)] for name, t in inputs.items()}
    told["outputs"] = {name: [dtype_name(t.dtype), list(t.shape)] for name, t in made.wanted().items()}
    told["bounds"] = budgets(case, made, expected)
    _json(folder / "case.json", told)
    save(folder / "inputs.safetensors", inputs)
    save(folder / "expected.safetensors", expected)
    graph = made.graph() if form == "onnx" else None
    if graph is not None:  # of many nodes the text in case.json is all there is
        onnx_cases.write(folder, graph, told, inputs, expected)


def budgets(case: Case, made: Portable, expected: Mapping[str, Tensor]) -> dict[str, Any]:
    """What each output may err, by the statistics of the budget: of the oracle rounded, judged as a result would be."""
    wanted = made.wanted()
    rounded = {name: expected[name].to(type_.dtype) for name, type_ in wanted.items()}
    observation = Observation(made.keep(rounded), {portable.IMPORTED: True})
    judged, reasons = made.judge(observation, committed())
    told = record(case, observation, Verdict("fail" if reasons else "pass", "", judged), 0.0)
    return {name: output["bounds"] for name, output in told["outputs"].items() if "bounds" in output}


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; it appears whole."""
    # Tensors may be views of one another, which the format cannot express.
    plain = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    with atomic(path) as part:
        safetensors.torch.save_file(plain, part)


def _json(path: Path, told: Any) -> None:
    with atomic(path) as part:
        part.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _frame(
    out: Path,
    told: Sequence[Mapping[str, Any]],
    left_out: Sequence[tuple[str, str]],
    root: Root,
    suite: str,
    precision: str,
    form: str,
) -> None:
    """Everything that is not a case."""
    index = {
        "format": FORMAT,
        "helios": helios.__version__,
        "suite_hash": suite_hash(),
        "suite": suite,
        "precision": precision,
        "layout": form,
        "seed": root.seed,
        "nonce": root.nonce,
        "cases": list(told),
        "left_out": [list(row) for row in left_out],
    }
    _json(out / "index.json", index)
    for name in ("README.md", "helios_results.py"):
        text = resources.files("helios_conformance").joinpath("templates", "export", name).read_text(encoding="utf-8")
        (out / name).write_text(text, encoding="utf-8")
