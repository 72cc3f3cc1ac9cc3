"""``helios doctor``: what is wrong on this machine, with one thing to do about each."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import typer

from helios.cli import output
from helios.cli.options import JsonOption

__all__ = ["Finding", "doctor"]

State = Literal["ok", "note", "problem"]
STYLES: dict[str, str] = {"ok": "green", "note": "yellow", "problem": "bold red"}


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: how it stands, and what to do about it."""

    topic: str
    state: State
    text: str
    fix: str = ""


def doctor(json: JsonOption = False) -> None:
    """Say what this machine has, and what is wrong with it.

    Exits with 0 if something here can run Helios, and with 1 if nothing can.
    """
    from helios.cli import checks

    findings, backends = checks.run()
    able = any(backend["available"] for backend in backends)
    if json:
        output.print_json({"able": able, "findings": [dataclasses.asdict(f) for f in findings], "backends": backends})
    else:
        _print(findings, backends, able)
    if not able:
        raise typer.Exit(1)


def _print(findings: list[Finding], backends: list[dict[str, Any]], able: bool) -> None:
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            output.heading(topic)
        output.line(f"{_mark(finding.state)} {finding.text}", STYLES[finding.state] if finding.state != "ok" else None)
        if finding.fix:
            output.fix(finding.fix, "     ")
    problems = sum(finding.state == "problem" for finding in findings)
    best = next((b["name"] for b in backends if b["available"] and b["chosen"]), "")
    output.line()
    if able:
        output.line(f"Helios can run here, by backend {best}." if best else "Helios can run here.", "bold")
    else:
        output.line("Helios cannot run here: mend the first problem above.", "bold red")
    if problems and able:
        output.line(f"{output.count(problems, 'problem')} above.")


def _mark(state: State) -> str:
    return {"ok": " ok ", "note": "note", "problem": "BAD "}[state]
