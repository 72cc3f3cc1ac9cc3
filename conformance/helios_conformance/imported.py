"""Results that came back as files, judged here: *imported*, which is never a certification of a device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from helios.errors import InputError
from helios.graph import TensorType
from helios_conformance import FORMAT, portable, suite
from helios_conformance.case import LEVELS, PRECISIONS, SUITES, Case, Observation
from helios_conformance.draws import Root
from helios_conformance.intake import Refused, read_json
from helios_conformance.portable import IMPORTED
from helios_conformance.record import record, tensors_of
from helios_conformance.references import References, committed
from helios_conformance.run import RunFolder, RunResult, Setup, now
from helios_conformance.runner import judged

__all__ = ["run"]

_LONGEST = 200
"""Characters of what the results say of themselves."""


def run(folder: Path, out: Path, references: References | None = None) -> RunResult:
    """Judge the results in an exported folder.

    Args:
        folder: of an export, with results in ``results/``.
        out: new or empty folder, for the run and its bundle.
        references: reference errors; those of the suite unless given.

    Returns:
        the run, whose setup says ``imported``. Cases without a result have not run.

    Raises:
        InputError: no export, made by another version of the suite, or without any result.
    """
    index, started = _index(folder), now()
    about, root = _about(folder), Root(index["seed"], index["nonce"])
    cases = [(suite.find(entry["id"]), entry["folder"]) for entry in index["cases"]]
    scope = {case.id for case in suite.all_cases(index["precision"])}
    if odd := [case.id for case, _ in cases if case.id not in scope]:
        raise InputError(f"{folder / 'index.json'} is of {index['precision']}, and {odd[0]} is not", "export it again")
    if not any((folder / "results" / f"{name}.safetensors").is_file() for _, name in cases):
        raise InputError(f"{folder / 'results'} holds no result", "README.md in that folder says how to write them")
    setup = _setup(index, [case for case, _ in cases], about, root, out)
    kept, _ = RunFolder.create(setup, suite.suite_hash())
    records = []
    for case, name in cases:
        observation = _observation(case, folder / "results" / f"{name}.safetensors", root)
        verdict = judged(case, observation, root, references or committed())
        told = json.loads(json.dumps(record(case, observation, verdict, 0.0)))
        kept.add(told, tensors_of(case.id, observation))
        records.append(told)
    return RunResult(setup, records, _backend(about), {}, started, now())


def _index(folder: Path) -> dict[str, Any]:
    try:
        index = read_json(folder / "index.json", "index.json")
    except (Refused, OSError) as error:
        raise InputError(f"{folder} is no folder of exported cases: {error}", "helios cases export DIR") from error
    kinds = {"seed": int, "nonce": str, "cases": list, "suite": str, "precision": str, "suite_hash": str}
    if not isinstance(index, dict) or any(type(index.get(name)) is not kind for name, kind in kinds.items()):
        raise InputError(f"{folder / 'index.json'} is damaged", "export the cases again")
    if index.get("format") != FORMAT or index["suite_hash"] != suite.suite_hash():
        raise InputError(f"{folder} was exported by another version of the suite", "export the cases with this one")
    entries = [e for e in index["cases"] if isinstance(e, dict) and type(e.get("id")) is type(e.get("folder")) is str]
    plain = all(Path(e["folder"]).name == e["folder"] for e in entries)
    if len(entries) != len(index["cases"]) or not plain or len({e["id"] for e in entries}) != len(entries):
        raise InputError(f"{folder / 'index.json'} is damaged", "export the cases again")
    if index["suite"] not in SUITES or index["precision"] not in PRECISIONS:
        raise InputError(f"{folder / 'index.json'} names no suite or precision that there is", "export the cases again")
    return index


def _about(folder: Path) -> dict[str, str]:
    """What the results say of themselves, cut to a length; all of it hearsay."""
    path = folder / "results" / "about.json"
    if not path.is_file():
        return {}
    try:
        told = read_json(path, "about.json")
    except Refused as error:
        raise InputError(f"{path} is damaged: {error}") from error
    return {str(k): str(v)[:_LONGEST] for k, v in told.items()} if isinstance(told, dict) else {}


def _setup(index: Mapping[str, Any], cases: list[Case], about: Mapping[str, str], root: Root, out: Path) -> Setup:
    highest = max(LEVELS.index(case.level) for case in cases)
    ids = tuple(case.id for case in cases)
    options = {IMPORTED: True, "told": dict(about)}
    return Setup(
        "imported", index["precision"], index["suite"], LEVELS[: highest + 1], ids, root, options=options, out=out
    )


def _backend(about: Mapping[str, str]) -> dict[str, Any]:
    """As a worker would tell it, of a backend that nobody asked."""
    name = about.get("device") or "a device that nobody named"
    return {
        "name": "imported",
        "label": "imported",
        "kind": "engine" if about.get("kind") == "engine" else "kernels",
        "device": {"name": name, "index": 0, "memory": None},
        "precisions": [],
    }


def _observation(case: Case, path: Path, root: Root) -> Observation:
    """What a file holds: whole outputs, of which the judged elements are kept."""
    if not path.is_file():
        return Observation(facts={"not_run": f"there is no {path.name}"})
    made = portable.of(case, root)
    if made is None:
        return Observation(facts={"not_run": "no result of this case can be imported"})
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        return Observation(facts={IMPORTED: True, "wrong": f"{path.name} cannot be read: {error}"[:_LONGEST]})
    if wrong := _strange(tensors, made.wanted()):
        return Observation(facts={IMPORTED: True, "wrong": f"{path.name}: {wrong}"})
    return Observation(made.keep(tensors), {IMPORTED: True})


def _strange(tensors: Mapping[str, Tensor], wanted: Mapping[str, TensorType]) -> str:
    if set(tensors) != set(wanted):
        odd = sorted(set(tensors) ^ set(wanted))
        return f"outputs missing or unknown: {', '.join(odd[:5])}"[:_LONGEST]
    for name, type_ in wanted.items():
        came = TensorType(tuple(tensors[name].shape), tensors[name].dtype)
        if came != type_:
            return f"{name} is {came}, wanted {type_}"
    return ""
