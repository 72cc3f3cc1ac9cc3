"""``helios cases``: what the suite holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from helios.cli import output
from helios.cli.options import OF_ARITHMETIC, JsonOption
from helios_conformance.cli import export

__all__ = ["app", "chosen", "listing"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _group() -> None:
    """List the cases of the conformance suite, or export them."""


@app.command("list", epilog="Example: helios cases list --level ops --precision bf16 --filter 'attention'")
def listing(
    level: Annotated[
        str, typer.Option(metavar="ops|blocks|model|pipeline|realtime|all", help="Cases of this level.")
    ] = "all",
    suite: Annotated[str, typer.Option(metavar="quick|full", help="Cases of this suite.")] = "full",
    precision: Annotated[str | None, typer.Option(metavar="NAME", help=OF_ARITHMETIC, show_default="all")] = None,
    filters: Annotated[
        list[str] | None, typer.Option("--filter", metavar="ID", help="Ids or patterns.", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    """List the cases: ids that --filter of certify takes."""
    found = chosen(level, suite, precision, filters or [])
    if json:
        output.print_json([_told(case) for case in found])
        return
    rows = [(case.id, case.level, case.suite, "" if case.required else "optional") for case in found]
    output.table(["case", "level", "suite", ""], rows)
    output.note(output.count(len(found), "case"))


def chosen(level: str, suite: str, precision: str | None, filters: list[str]) -> list[Any]:
    """Cases in run order. Raises InputError for names that nobody knows."""
    from helios.errors import InputError, unknown_name
    from helios_conformance.case import LEVELS, PRECISIONS, SUITES
    from helios_conformance.runner import check_filters
    from helios_conformance.suite import choose

    for kind, name, known in (
        ("level", level, (*LEVELS, "all")),
        ("suite", suite, SUITES),
        ("precision to certify", precision or "bf16", PRECISIONS),
    ):
        if name not in known:
            raise InputError(unknown_name(kind, name, known))
    check_filters(filters, precision or "")
    levels = [one for one in LEVELS if level in ("all", one)]
    names = [precision] if precision else PRECISIONS
    wanted = "quick" if suite == "quick" else "full"
    return [case for name in names for case in choose(name, wanted, levels, filters)]  # type: ignore[arg-type]


def _told(case: Any) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(case)


app.command("export", epilog=export.EXAMPLES)(export.export)
