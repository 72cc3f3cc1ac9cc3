"""``helios backends``: what there is to run on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from helios.cli import output
from helios.cli.options import JsonOption

if TYPE_CHECKING:
    from helios.backend import Candidate

__all__ = ["backends", "describe"]


def backends(json: JsonOption = False) -> None:
    """List the backends: which can run here, and why the others cannot."""
    from helios import op
    from helios.backend import candidates, explain_automatic

    probed = list(candidates())
    found = [describe(candidate) for candidate in probed]
    auto = [{"name": name, "reason": reason} for name, reason in explain_automatic(probed)]
    variable = os.environ.get("HELIOS_BACKEND")
    if json:
        output.print_json({"backends": found, "auto": auto, "HELIOS_BACKEND": variable, "ops": len(op.names())})
        return
    output.table(["backend", "state", "devices", "precisions", "kernels"], [_row(b, len(op.names())) for b in found])
    for backend in found:
        if not backend["available"]:
            output.line(f"\n{backend['name']}: {backend['why']}")
            if backend["fix"]:
                output.fix(backend["fix"], "  ")
            continue
        if backend["options"]:
            options = (f"--backend-option {name}={'|'.join(values)}" for name, values in backend["options"].items())
            output.line(f"\n{backend['name']} takes {', '.join(options)}; the first value is the default")
        for precision, why in backend["withheld"].items():
            output.line(f"\n{backend['name']} has no {precision}: {why}")
    _say_choice(auto, variable)


def describe(candidate: Candidate) -> dict[str, Any]:
    """A backend as plain data; one whose own members fail is told as unavailable, like one that fails its probe."""
    data: dict[str, Any] = {
        "name": candidate.name,
        "available": candidate.available,
        "why": candidate.why,
        "fix": candidate.fix,
        "devices": [{"index": d.index, "name": d.name, "memory": d.memory} for d in candidate.devices],
        "precisions": [],
        "withheld": {},
        "fusions": [],
        "options": {},
        "kernels": 0,
    }
    if candidate.cls is not None:
        try:
            backend = candidate.cls()
            data["precisions"], data["fusions"] = list(backend.precisions), list(backend.fusions)
            data["withheld"] = dict(backend.withheld)
            data["kernels"] = len(backend.kernels)
            data["options"] = {name: list(values) for name, values in backend.options.items()}
        except Exception as error:
            why = f"it raised {type(error).__name__}: {error}"
            data |= {"available": False, "why": why, "fix": "report this to the backend's maintainer"}
    if not data["available"] and not data["why"]:
        data["why"] = "it names no device"
    return data


def _row(backend: dict[str, Any], opset: int) -> list[str]:
    devices = [f"{d['index']}: {d['name']}" + _memory(d["memory"]) for d in backend["devices"]]
    kernels = f"{backend['kernels']} of {opset} ops" if backend["kernels"] else ""
    state = "available" if backend["available"] else "not here"
    return [backend["name"], state, "\n".join(devices), ", ".join(backend["precisions"]), kernels]


def _memory(size: int | None) -> str:
    return "" if size is None else f", {output.gigabytes(size)}"


def _refused(spec: str) -> str:
    """Why what the variable names cannot be used; empty where it can. A table of names does not tell of providers."""
    from helios.backend import select
    from helios.errors import HeliosError

    try:
        select(spec)
    except HeliosError as error:
        return f", but cannot be used: {error.why}" + (f" (fix: {error.fix})" if error.fix else "")
    return ""


def _say_choice(auto: list[dict[str, str]], variable: str | None) -> None:
    output.line()
    if variable and variable != "auto":
        output.line(f"HELIOS_BACKEND={variable} is set, and decides{_refused(variable)}. Without it:")
    if auto[-1]["reason"] != "chosen":
        output.line("auto finds none that can run here")
        return
    chosen = auto[-1]["name"]
    lost = [f"{entry['name']} ({entry['reason']})" for entry in auto[:-1]]
    output.line(
        f"auto chooses {chosen}" + (f"; before it came {'; '.join(lost)}" if lost else "; no better one is installed")
    )
