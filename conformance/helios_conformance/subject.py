"""The backend under judgement: selected, and what it says of itself, as a bundle records it."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from helios.backend import PRECISIONS, Backend, parse_spec, select
from helios.backend import entry_points as registered
from helios.errors import BackendUnavailable, HeliosError
from helios_conformance.session import Session

__all__ = ["checkpoint", "describe", "distribution", "kind_of", "refusal", "selected"]


def selected(spec: str) -> Backend:
    """The backend of that spec. Whatever goes wrong is a ``HeliosError`` that says whose fault it is."""
    try:
        return select(spec)
    except HeliosError:
        raise
    except BaseException as error:  # a stranger's constructor may do anything, sys.exit included
        if isinstance(error, KeyboardInterrupt):
            raise
        raise BackendUnavailable(
            f"the probe of backend {spec!r} raised {type(error).__name__}: {error}",
            "report this to the backend's maintainer",
        ) from error


def refusal(error: BaseException) -> dict[str, str]:
    """Why no case can run, as JSON values."""
    why = error.why if isinstance(error, HeliosError) else f"it raised {type(error).__name__}: {error}"
    return {"why": str(why)[:2000], "fix": str(getattr(error, "fix", ""))[:2000]}


def describe(backend: Backend, spec: str, session: Session) -> dict[str, Any]:
    """Name, label, class, distribution, version, api_version, kind, emulated, device, precisions, kernels, fusions,
    threads; JSON values. Attested by the device's host, not proved."""
    device = next(d for d in backend.devices() if d.index == backend.index)
    cls = type(backend)
    name = parse_spec(spec)[0]
    return {
        "name": name,
        "label": str(backend.label),
        "class": f"{cls.__module__}:{cls.__qualname__}",
        **distribution(name),
        "api_version": int(backend.api_version),
        "kind": kind_of(session),
        "emulated": str(backend.emulated or ""),
        "device": {
            "name": str(device.name),
            "index": int(device.index),
            "memory": None if device.memory is None else int(device.memory),
        },
        "precisions": [str(p) for p in backend.precisions],
        "kernels": len(backend.kernels),
        "fusions": [str(f) for f in backend.fusions],
        "threads": torch.get_num_threads(),
    }


def distribution(name: str) -> dict[str, Any]:
    """Which installed distribution registers the backend; the built-in one is of Helios itself."""
    points = registered().get(name, [])
    found = points[0].dist if points else None
    if found is None and name == "reference":
        found = importlib.metadata.distribution("helios-hal")
    return {"distribution": found.name if found else None, "version": found.version if found else None}


def checkpoint(folder: Path) -> dict[str, str]:
    """Name and SHA-256 of a model folder: over the paths and contents of all its files, every byte read."""
    sha = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            told = hashlib.file_digest(file, "sha256").hexdigest()
        sha.update(f"{path.relative_to(folder).as_posix()}\0{told}\n".encode())
    return {"name": folder.resolve().name, "sha256": sha.hexdigest()}


def kind_of(session: Session) -> str:
    """``kernels`` or ``engine``: who compiles with the base class's method, or to a program of single kernels, runs
    kernels."""
    from helios_conformance.one_node import OneNode, types_of

    backend = session.backend
    if type(backend).compile is Backend.compile:
        return "kernels"
    precision = next((p for p in backend.precisions if p in PRECISIONS), "fp32")
    sample = torch.zeros(8, dtype=PRECISIONS[precision])
    try:
        program = session.lower({"main": OneNode.of("add", types_of([sample, sample]), {}).graph})
    except Exception:  # an engine may refuse a lone addition; whoever lists kernels means to be called op by op
        return "kernels" if backend.kernels else "engine"
    return "engine" if session.is_engine(program) else "kernels"
