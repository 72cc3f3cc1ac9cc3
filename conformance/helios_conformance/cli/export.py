"""``helios cases export``: cases as files, for a host that has neither this program nor torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from helios.cli import output
from helios.cli.options import NamedPrecisionOption

__all__ = ["EXAMPLES", "export"]

EXAMPLES = "Example: helios cases export out/cases --precision bf16 --level ops --filter linear"


def export(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.", show_default=False)],
    level: Annotated[str, typer.Option(metavar="ops|blocks|model|all", help="Cases of this level.")] = "ops",
    suite: Annotated[str, typer.Option(metavar="quick|full", help="Cases of this suite.")] = "quick",
    precision: NamedPrecisionOption = "bf16",
    filters: Annotated[
        list[str] | None, typer.Option("--filter", metavar="ID", help="Ids or patterns.", show_default=False)
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="safetensors|onnx", help="onnx adds the layout of ONNX' backend tests.")
    ] = "safetensors",
    seed: Annotated[int, typer.Option(metavar="N", help="Of all draws.")] = 0,
    nonce: Annotated[str, typer.Option(metavar="HEX", help="A challenge that somebody else chose.")] = "",
    most: Annotated[int, typer.Option("--max-mb", metavar="N", help="Leave out cases with larger inputs.")] = 256,
) -> None:
    """Write inputs, expected outputs and budgets of cases; `helios certify --from-results DIR` judges what comes back.

    The verdict on it says imported, and is never a certification.
    """
    from helios_conformance.cli.cases import chosen
    from helios_conformance.draws import Root
    from helios_conformance.export import export as write

    cases: list[Any] = chosen(level, suite, precision, filters or [])
    cases = [case for case in cases if suite == "full" or case.suite == "quick"]  # also of those that a filter names
    came = write(out, cases, Root(seed, nonce), suite=suite, precision=precision, form=form, most=most << 20)
    for name, reason in came.left_out:
        output.note(f"left out: {name}: {reason}")
    output.line(f"{output.count(len(came.folders), 'case')} in {out}; README.md there says how results come back")
