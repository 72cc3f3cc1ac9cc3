"""What ``helios doctor`` looks at. Each check is a function that gives findings and never fails itself."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import helios
from helios.cli.doctor import Finding
from helios.cli.output import gigabytes
from helios.errors import HeliosError, unknown_name
from helios.fit.host import read_host

__all__ = ["run"]

DISTRIBUTION = "helios-hal"
VARIABLES = ("HELIOS_BACKEND", "HELIOS_FALLBACK")
NEEDED = (
    "av",
    "ftfy",
    "huggingface_hub",
    "numpy",
    "PIL",
    "rich",
    "safetensors",
    "sentencepiece",
    "transformers",
    "typer",
)
PYTHON = (3, 11)
ROOM = 45_000_000_000
"""Bytes that the published repository takes, rounded up."""


def run() -> tuple[list[Finding], list[dict[str, Any]]]:
    """All findings in the order to mend them, and the backends as plain data, each with whether it is ``chosen``."""
    findings = [*_checked("This machine", machine), *_checked("Python", python), *_checked("Python", shadows)]
    torch_findings = _checked("torch", torch)
    findings += torch_findings
    findings += [*_checked("Packages", packages), *_checked("Packages", onnxruntime)]
    works = all(finding.state != "problem" for finding in torch_findings)
    found = backends() if works else []
    findings += [_backend_finding(backend) for backend in found]
    findings += [*_checked("Settings", lambda: variables(works)), *_checked("Settings", hub)]
    return findings, found


def _checked(topic: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """A check that breaks is a finding, too: whoever asks a doctor has trouble enough."""
    try:
        return list(check())
    except Exception as error:
        return [Finding(topic, "note", f"could not be looked at: {type(error).__name__}: {error}")]


def machine() -> Iterator[Finding]:
    """Cores, memory and disk, each as this process may use it."""
    topic, host = "This machine", read_host()
    yield Finding(topic, "ok", host.system)
    yield Finding(topic, "ok", f"{host.cpu}: {host.cores} cores, {host.usable_cores:g} usable")
    memory = f"memory: {gigabytes(host.memory)}, {gigabytes(host.available)} available"
    if host.memory_limit is not None:
        memory += f"; this process's cgroup allows {gigabytes(host.memory_limit)}"
    yield Finding(topic, "ok", memory)
    text = f"disk: {gigabytes(host.disk_free)} free in {host.cache}, where downloads go"
    if host.disk_free < ROOM:
        fix = "set HF_HOME to a folder on a larger disk, or use a small --size"
        yield Finding(topic, "note", f"{text}; the published model takes about {gigabytes(ROOM)}", fix)
    else:
        yield Finding(topic, "ok", text)


def python() -> Iterator[Finding]:
    """The interpreter, and which Helios it has."""
    text = f"Python {platform.python_version()} at {sys.executable}"
    if sys.version_info < PYTHON:
        yield Finding("Python", "problem", text, f"use Python {'.'.join(map(str, PYTHON))} or newer")
    else:
        yield Finding("Python", "ok", text)
    yield Finding("Python", "ok", f"{DISTRIBUTION} {helios.__version__} at {_home()}")


def shadows() -> Iterator[Finding]:
    """Other packages of the name ``helios`` that are, or could be, imported in place of ours."""
    for name in sorted(
        {name for name in importlib.metadata.packages_distributions().get("helios", ()) if name != DISTRIBUTION}
    ):
        why = f"the distribution {name!r} also installs a package named helios: its files may overwrite ours"
        fix = f"pip uninstall -y {name}; pip install --force-reinstall --no-deps {DISTRIBUTION}"
        yield Finding("Python", "problem", why, fix)
    for place, on_path in _other_homes():
        if on_path:
            why = f"{place} is another package named helios on Python's path: the order decides which is imported"
            yield Finding("Python", "problem", why, f"take {place.parent} off PYTHONPATH, or uninstall that package")
        else:
            why = f"{place} is another package named helios: a Python started in this folder imports that one"
            yield Finding("Python", "note", why, "start Python, and `python -m helios`, in another folder")


def _home() -> Path:
    return Path(helios.__file__).resolve().parent


def _other_homes() -> Iterator[tuple[Path, bool]]:
    """Packages or modules ``helios`` on the path, ours excepted; then in the working directory, with False."""
    seen = {_home()}
    path = dict.fromkeys(folder for folder in sys.path if folder)
    for folder in [*path, os.getcwd()]:
        spec = importlib.machinery.PathFinder.find_spec("helios", [folder])
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin).resolve()
        place = origin.parent if origin.name.startswith("__init__.") else origin
        if place not in seen:
            seen.add(place)
            yield place, folder in path


def torch() -> Iterator[Finding]:
    """Whether torch imports, and what keeps it from doing so."""
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "0"
    try:
        import torch as module
    except Exception as error:
        why = f"torch cannot be imported: {type(error).__name__}: {error}".strip().splitlines()[0]
        yield Finding("torch", "problem", why, _torch_fix(str(error), autoload))
        return
    threads = f"{module.get_num_threads()} threads"
    yield Finding("torch", "ok", f"torch {module.__version__}, {threads}, at {Path(module.__file__).parent}")
    if _installed("torch_npu"):
        yield from _npu(autoload)


def _torch_fix(message: str, autoload: bool) -> str:
    if "TORCH_DEVICE_BACKEND_AUTOLOAD" in message or (autoload and _installed("torch_npu")):
        return "export TORCH_DEVICE_BACKEND_AUTOLOAD=0 (or install the vendor's runtime, such as CANN for torch_npu)"
    return "pip install torch"


def _npu(autoload: bool) -> Iterator[Finding]:
    try:
        version = importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    if autoload:
        yield Finding("torch", "ok", f"torch_npu {version} is loaded by torch itself")
    else:
        fix = "unset TORCH_DEVICE_BACKEND_AUTOLOAD if CANN is installed and the NPU is to be used"
        yield Finding(
            "torch", "note", f"torch_npu {version} is installed, but TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set", fix
        )


def packages() -> Iterator[Finding]:
    """What generating video needs beside torch."""
    absent = [name for name in NEEDED if not _installed(name)]
    if absent:
        yield Finding("Packages", "problem", f"not installed: {', '.join(absent)}", f"pip install {DISTRIBUTION}")
    else:
        yield Finding("Packages", "ok", f"all {len(NEEDED)} that generating video needs are installed")


def onnxruntime() -> Iterator[Finding]:
    """Two builds of ONNX Runtime write to one folder, and the last one installed wins."""
    known = {"onnxruntime", "onnxruntime-gpu"}
    found = sorted(name for name in known if _distribution(name))
    if len(found) == len(known):
        why = "onnxruntime and onnxruntime-gpu are both installed: they overwrite each other"
        fix = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu"
        yield Finding("Packages", "problem", why, fix)


def backends() -> list[dict[str, Any]]:
    """Every backend as plain data, with whether it is the one that would be used."""
    from helios.backend import candidates, select
    from helios.cli.backends import describe

    try:
        chosen = select().name
    except HeliosError:
        chosen = ""
    return [describe(candidate) | {"chosen": candidate.name == chosen} for candidate in candidates()]


def _backend_finding(backend: dict[str, Any]) -> Finding:
    name = backend["name"]
    if backend["available"]:
        devices = ", ".join(device["name"] for device in backend["devices"])
        return Finding("Backends", "ok", f"{name}: {devices}" + (" (would be used)" if backend["chosen"] else ""))
    return Finding("Backends", "note", f"{name}: {backend['why']}", backend["fix"])


def variables(torch_works: bool) -> Iterator[Finding]:
    """``HELIOS_…`` in the environment: those that mean something, and those that nothing reads."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith("HELIOS_")}
    if not found:
        yield Finding("Settings", "ok", "no HELIOS_… variable is set")
    for name, value in found.items():
        if name not in VARIABLES:
            yield Finding("Settings", "note", unknown_name("variable", name, VARIABLES), f"unset {name}")
        else:
            yield _variable(name, value, torch_works)


def _variable(name: str, value: str, torch_works: bool) -> Finding:
    if name == "HELIOS_FALLBACK" and value not in ("error", "reference"):
        return Finding(
            "Settings",
            "problem",
            f"{name}={value}: {unknown_name('fallback', value, ('error', 'reference'))}",
            f"unset {name}",
        )
    if name == "HELIOS_BACKEND" and torch_works:
        from helios.backend import select

        try:
            select(value)
        except HeliosError as error:
            return Finding("Settings", "problem", f"{name}={value}: {error.why}", error.fix or f"unset {name}")
    return Finding("Settings", "ok", f"{name}={value}")


def hub() -> Iterator[Finding]:
    """Variables that decide whether and from where models are downloaded. A token is never shown."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            fix = f"unset {name} to download; folders and what is already in the cache work as it is"
            yield Finding("Settings", "note", f"{name} is set: nothing is downloaded", fix)
    for name in ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE"):
        if value := os.environ.get(name):
            yield Finding("Settings", "ok", f"{name}={value}")
    if os.environ.get("HF_TOKEN"):
        yield Finding("Settings", "ok", "HF_TOKEN is set: gated repositories can be downloaded if it has access")


def _installed(name: str) -> bool:
    """Whether a top-level module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _distribution(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
