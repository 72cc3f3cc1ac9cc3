"""``helios diff``: the first node at which a backend leaves its budget, its inputs, and a command that runs it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helios.cli import output
from helios.cli.options import JsonOption, NamedPrecisionOption, VariantOption, setting
from helios.errors import InputError

if TYPE_CHECKING:
    from helios_conformance.diff import Comparison, Finding
    from helios_conformance.replay import Subject

__all__ = ["EXAMPLES", "diff"]

EXAMPLES = "Examples: helios diff cuda reference; helios diff cuda cpu --size mini --height 192 --width 320"

Spec = Annotated[str, typer.Argument(metavar="NAME[:PROVIDER][:INDEX]", help="A backend, or `reference`.")]


def diff(
    a: Spec,
    b: Spec,
    size: Annotated[str, typer.Option(metavar="tiny|mini|14b", help="Of the transformer.")] = "tiny",
    variant: VariantOption = "distilled",
    pyramid_stage: Annotated[
        int | None, typer.Option(metavar="N", help="Which; 0 is the coarsest.", show_default="the last")
    ] = None,
    precision: NamedPrecisionOption = "bf16",
    height: Annotated[int, typer.Option(metavar="PIXELS", help="Of the video.")] = 128,
    width: Annotated[int, typer.Option(metavar="PIXELS", help="Of the video.")] = 192,
    text_tokens: Annotated[int, typer.Option(metavar="N", help="Length of the prompt's embedding.")] = 64,
    seed: Annotated[int, typer.Option(metavar="N", help="Of weights and inputs.")] = 0,
    graph: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A graph instead: saved JSON, or text.", show_default=False)
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What an earlier comparison saved.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where a finding's inputs are saved.")] = Path("out/diff"),
    json: JsonOption = False,
) -> None:
    """Run one plan on two backends and name the first node that errs beyond its budget.

    Each node is judged on the operands that it was given, against float64; engines are bisected on block boundaries.
    Float64 results and reference errors are computed on the judged machine's host, with the torch installed there;
    `helios certify` takes the reference errors that are committed with the suite.
    Exit status: 0 none errs, 1 one does, 2 a mistake in the command.
    """
    from helios_conformance.diff import compare
    from helios_conformance.draws import Root
    from helios_conformance.replay import Subject
    from helios_conformance.session import Session
    from helios_conformance.subject import selected

    if replay is not None and graph is not None:
        raise InputError("--replay has its own graph", fix="leave --graph out")
    if replay is not None:
        subject = Subject.load(replay)
    elif graph is not None:
        subject = _of_file(graph, seed)
    else:
        asked = setting(size, variant, height, width, precision, text_tokens=text_tokens)
        subject = _of_setting(asked, pyramid_stage, seed)
    sessions = [Session(selected(spec), Root(seed)) for spec in (a, b)]
    came = compare(subject, *sessions)
    saved = {} if replay is not None else {f.label: _save(out, f, a, b) for f in came.findings}
    if json:
        output.print_json(_told(came, saved))
    else:
        _print(came, saved)
    raise typer.Exit(1 if came.findings else 0)


def _of_setting(asked: Any, stage: int | None, seed: int) -> Subject:
    """The graph of one forward with drawn weights and inputs."""
    from helios.fit.costs import stage_graphs
    from helios_conformance.draws import Root
    from helios_conformance.replay import Drawn, Subject

    chosen = asked.stages - 1 if stage is None else stage
    (graph,) = stage_graphs(asked, [chosen]).values()
    return Subject(graph, Drawn(graph, Root(seed)))


def _of_file(path: Path, seed: int) -> Subject:
    """A graph as ``helios graph`` prints it, or as it was saved, with the saved weights where there are any."""
    from helios import serialize
    from helios.graph import parse
    from helios_conformance.draws import Root
    from helios_conformance.replay import Drawn, Given, Subject

    if path.suffix == ".json":
        saved = serialize.load(path)
        if len(saved.graphs) != 1:
            raise InputError(f"{path} holds {len(saved.graphs)} graphs, wanted one: {', '.join(saved.graphs)}")
        (graph,) = saved.graphs.values()
        drawn = Drawn(graph, Root(seed))
        names = [v.name for v in graph.inputs if v.name not in saved.weights]
        return Subject(graph, Given({**saved.weights, **{name: drawn.read(name) for name in names}}))
    try:
        graph = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    return Subject(graph, Drawn(graph, Root(seed)))


def _save(out: Path, finding: Finding, a: str, b: str) -> dict[str, str]:
    """Write the inputs of a finding; the folder and the command that runs it again."""
    name = re.sub(r"[^\w.-]+", "-", f"{finding.label}-{finding.block or 'graph'}-{finding.where.split(':')[0]}")
    folder = out / name.strip("-")[:80]
    command = shlex.join(["helios", "diff", "--replay", str(folder), a, b])
    about = {"backend": finding.label, "where": finding.where, "block": finding.block, "reasons": [*finding.reasons]}
    finding.subject.save(folder, about | {"replay": command})
    return {"folder": str(folder), "replay": command}


def _told(came: Comparison, saved: dict[str, dict[str, str]]) -> dict[str, Any]:
    import dataclasses

    def side(one: Any) -> dict[str, Any]:
        told = {"backend": one.label, "kind": one.kind, "judged": one.places, "finding": None}
        if one.finding is not None:
            f = one.finding
            told["finding"] = {
                "where": f.where,
                "block": f.block,
                "reasons": [*f.reasons],
                "note": f.note,
                "judged": {name: dataclasses.asdict(j) for name, j in f.judged.items()},
            } | saved.get(f.label, {})
        return told

    return {"sides": [side(one) for one in came.sides], "apart": dict(came.apart)}


def _print(came: Comparison, saved: dict[str, dict[str, str]]) -> None:
    for side in came.sides:
        what = "nodes" if side.kind == "kernels" else "cuts"
        if side.finding is None and not side.places:
            output.line(f"{side.label}: is the reference itself, so nothing of it is judged")
            continue
        if side.finding is None:
            output.line(f"{side.label}: {side.places} {what} judged, none beyond its budget")
            continue
        block = f", {side.finding.block}" if side.finding.block else ""
        output.line(f"{side.label}: beyond its budget first at{block}")
        output.line(f"  {side.finding.where}")
        for line in (*side.finding.reasons, side.finding.note):
            if line:
                output.line(f"  {line}")
        if side.label in saved:
            output.line(f"  inputs: {saved[side.label]['folder']}")
            output.line("  replay:")
            output.command(shlex.split(saved[side.label]["replay"]))
    for name, apart in came.apart.items():
        if name.startswith("output "):
            output.line(f"{name}: {apart:.3g} apart, as ‖a − b‖ / ‖b‖")
