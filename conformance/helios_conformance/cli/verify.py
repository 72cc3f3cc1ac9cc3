"""``helios verify``: judge a bundle anew, without the device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helios.cli import output
from helios.cli.options import JsonOption
from helios.errors import InputError, unknown_name

if TYPE_CHECKING:
    from helios_conformance.verify import Outcome

__all__ = ["EXAMPLES", "verify"]

EXAMPLES = "Examples: helios verify out/certify/cpu; helios verify DIR --challenge 5f3a --signer vendor.pub"
LEVELS = ("ops", "blocks", "model", "pipeline", "realtime")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A bundle, as `helios certify` wrote it.")]
Challenge = Annotated[
    str | None,
    typer.Option(
        metavar="NONCE", help="The nonce that you issued; the run must have drawn from it.", show_default=False
    ),
]
Signer = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A public SSH key or a file of allowed signers; the bundle must be signed by one of them.",
        show_default=False,
    ),
]
Levels = Annotated[
    list[str] | None,
    typer.Option(
        "--levels", metavar="LEVEL", help="Judge only this level anew. Repeat it for more.", show_default="all"
    ),
]
Reproduced = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="A second bundle, by another signer and nonce, that came to the same.", show_default=False
    ),
]


def verify(
    folder: Folder,
    challenge: Challenge = None,
    signer: Signer = None,
    levels: Levels = None,
    reproduced: Reproduced = None,
    json: JsonOption = False,
) -> None:
    """Judge a bundle of evidence anew: inputs, oracle and every numeric verdict are computed again on this machine.

    Exit status: 0 accepted, 1 refused, 2 a mistake in the command. Accepted means consistent: the bundle's verdict,
    whatever it is, follows from its outputs.
    """
    strange = [level for level in levels or () if level not in LEVELS]
    if strange:
        raise InputError(unknown_name("level", strange[0], LEVELS))
    if reproduced is not None and signer is None:
        why = "--reproduced needs --signer: only signatures show that two parties ran it"
        raise InputError(why, "name a file of allowed signers that holds both")
    challenge = challenge and challenge.lower()  # as certify writes it
    first = _judge(folder, challenge, signer, levels or LEVELS)
    second = None if reproduced is None else _judge(reproduced, None, signer, levels or LEVELS)
    raise typer.Exit(_tell(first, second, json=json))


def _judge(folder: Path, challenge: str | None, signer: Path | None, levels: Any) -> Outcome:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from helios_conformance import verify as verifying

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    columns = (TextColumn("Judging anew", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    last = TextColumn("{task.fields[case]}", markup=False)
    with Progress(*columns, last, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, case="")

        def progress(done: int, total: int, case: str) -> None:
            bar.update(task, completed=done, total=total, case=case)

        return verifying.verify(folder, challenge=challenge, signer=signer, levels=levels, progress=progress)


def _tell(first: Outcome, second: Outcome | None, *, json: bool) -> int:
    """Print what was found; the exit status."""
    from helios_conformance import reproduced
    from helios_conformance.intake import shown

    lines = [str(finding) for finding in first.findings]
    if second is not None:
        lines += [f"the second bundle: {finding}" for finding in second.findings]
        if not lines:
            lines += reproduced.disagreements(first, second)
    tier = "reproduced" if second is not None and not lines else first.tier
    if json:
        output.print_json(_data(first, lines, tier))
        return int(bool(lines))
    for line in lines:
        output.line(line, "red")
    if lines or first.report is None:
        output.line(f"Refused: {output.count(len(lines), 'finding')}", "bold red")
        return 1
    output.line(shown(first.report["verdict"]["sentence"], 2000))
    if first.left:
        output.note(f"Not judged anew, as asked: {', '.join(first.left)}")
    output.line(
        f"Accepted: {output.count(first.recomputed, 'case')} judged anew; {_standing(first, tier)}", "bold green"
    )
    return 0


def _standing(outcome: Outcome, tier: str) -> str:
    if not outcome.signer:
        return f"{tier}; not signed, so anybody may have made it"
    return f"{tier}; signed by {outcome.signer}" + (
        "" if outcome.vouched else ", a key that --signer did not vouch for"
    )


def _data(outcome: Outcome, lines: list[str], tier: str) -> dict[str, Any]:
    return {
        "accepted": not lines,
        "findings": lines,
        "verdict": outcome.report["verdict"] if outcome.report and not lines else None,
        "tier": tier if not lines else None,
        "signer": outcome.signer or None,
        "vouched": outcome.vouched,
        "recomputed": outcome.recomputed,
        "not_recomputed": list(outcome.left),
    }
