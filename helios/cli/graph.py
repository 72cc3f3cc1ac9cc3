"""``helios graph``: what a device has to run, as text, as counts, and as a backend sees it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helios.cli import output
from helios.cli.options import (
    HeightOption,
    JsonOption,
    NamedPrecisionOption,
    PyramidStageOption,
    SizeOption,
    VariantOption,
    WidthOption,
    setting,
)
from helios.errors import InputError

if TYPE_CHECKING:
    from helios.backend import Backend
    from helios.fit.costs import Setting
    from helios.graph import Graph
    from helios.passes import Plan

__all__ = ["EXAMPLES", "graph"]

EXAMPLES = "Example: helios graph --size 14b --pyramid-stage 2 --flops"


def graph(
    size: SizeOption = "14b",
    variant: VariantOption = "distilled",
    pyramid_stage: PyramidStageOption = None,
    height: HeightOption = 384,
    width: WidthOption = 640,
    batch: Annotated[int, typer.Option(metavar="N", help="Videos that run together.")] = 1,
    text_tokens: Annotated[int, typer.Option(metavar="N", help="Length of the prompt's embedding.")] = 512,
    precision: NamedPrecisionOption = "bf16",
    published: Annotated[
        bool, typer.Option("--published", help="As the published code runs it: one phase, dead rows too.")
    ] = False,
    flops: Annotated[
        bool, typer.Option("--flops", help="FLOPs and bytes, by phase and by op, instead of the text.")
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:PROVIDER]", help="Fuse as this backend wants, and say what it covers.", show_default=False
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the text there.", show_default=False)] = None,
    json: JsonOption = False,
) -> None:
    """Print the graphs of a forward; or their FLOPs and bytes; or what a backend covers of them.

    Shapes alone: no weight is made, no device is needed.
    """
    asked = setting(size, variant, height, width, precision, batch=batch, text_tokens=text_tokens)
    if published and backend:
        raise InputError("--published shows the graph before any backend sees it", fix="leave one of the two out")
    stages = range(asked.stages) if pyramid_stage is None else [pyramid_stage]
    chosen = _backend(backend)
    plan = None if published else _plan(asked, stages, chosen)
    if out is not None:
        _write(out, _text(asked, stages, plan))
    if json:
        output.print_json(_data(asked, stages, plan, chosen, flops))
        return
    if flops:
        _print_costs(asked, stages, plan)
    if plan is not None and chosen is not None:
        _print_coverage(plan, chosen)
    if not flops and backend is None and out is None:
        typer.echo(_text(asked, stages, plan))


def _backend(spec: str | None) -> Backend | None:
    """The backend whether or not it can run here: its kernels are listed all the same."""
    from helios.backend import load, parse_spec

    if spec is None:
        return None
    name, provider, index = parse_spec(spec)
    return load(name)(provider, index)


def _plan(asked: Setting, stages: Any, backend: Backend | None) -> Plan:
    from helios.backend import ReferenceBackend
    from helios.fit.costs import stage_graphs
    from helios.lower import plan_for

    return plan_for(stage_graphs(asked, stages), backend or ReferenceBackend())


def _graphs(asked: Setting, stages: Any, plan: Plan | None) -> dict[str, Graph]:
    from helios.fit.costs import stage_graphs

    return plan.graphs if plan is not None else stage_graphs(asked, stages, published=True)


def _text(asked: Setting, stages: Any, plan: Plan | None) -> str:
    return "\n\n".join(str(graph) for graph in _graphs(asked, stages, plan).values())


def _write(path: Path, text: str) -> None:
    from helios.media.storage import atomic

    with atomic(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
    typer.echo(f"wrote {path}", err=True)


def _data(asked: Setting, stages: Any, plan: Plan | None, backend: Backend | None, flops: bool) -> dict[str, Any]:
    """Everything that the tables say, as plain data; the text itself only where no table was asked for."""
    from dataclasses import asdict

    from helios.fit.costs import op_costs, phase_costs, published_flops, weight_inputs
    from helios.fit.coverage import coverage

    graphs = _graphs(asked, stages, plan)
    data: dict[str, Any] = {"size": asked.size.name, "variant": asked.variant.name}
    data |= {"height": asked.height, "width": asked.width, "batch": asked.batch, "text_tokens": asked.text_tokens}
    data |= {"digests": {name: graph.digest for name, graph in graphs.items()}}
    if flops:
        data["published_flops"] = {f"stage{stage}": published_flops(asked, stage) for stage in stages}
        data["ops"] = {name: [asdict(row) for row in op_costs(graph)] for name, graph in graphs.items()}
    if flops and plan is not None:
        data["phases"] = [asdict(phase) for phase in phase_costs(plan)]
        weights = weight_inputs(plan).values()
        data["weights"] = {"parameters": sum(t.numel for t in weights), "bytes": sum(t.nbytes for t in weights)}
    if plan is not None and backend is not None:
        data["backend"] = backend.label
        data["coverage"] = [asdict(row) for row in coverage(plan, backend)]
    if not flops and backend is None:
        data["graphs"] = {name: str(graph) for name, graph in graphs.items()}
    return data


def _print_costs(asked: Setting, stages: Any, plan: Plan | None) -> None:
    from helios.fit.costs import op_costs

    if plan is None:
        _print_published(asked, stages)
    else:
        _print_phases(asked, stages, plan)
    for name, graph in _graphs(asked, stages, plan).items():
        rows = op_costs(graph)
        if plan is not None and name not in plan.steps:
            continue
        total = sum(row.flops for row in rows) or 1
        output.heading(f"{name}, by op")
        output.table(
            ["op", "kind", "nodes", "TFLOP", "share", "moved"],
            [
                (r.op, r.kind, r.nodes, output.teraflops(r.flops), f"{r.flops / total:.1%}", output.gigabytes(r.moved))
                for r in rows
            ],
            right=["nodes", "TFLOP", "share", "moved"],
        )


def _print_published(asked: Setting, stages: Any) -> None:
    from helios.fit.costs import published_flops

    output.line("One forward as the published code runs it: nothing held, the last block's history rows computed.")
    rows = [(f"stage{stage}", output.teraflops(published_flops(asked, stage))) for stage in stages]
    output.table(["stage", "TFLOP"], rows, right=["TFLOP"])


def _print_phases(asked: Setting, stages: Any, plan: Plan) -> None:
    from helios.fit.costs import phase_costs, published_flops, weight_inputs

    weights = weight_inputs(plan).values()
    phases = phase_costs(plan)
    often = {"weights": "once, at load", "prompt": "once a prompt", "chunk": "once a chunk"}
    output.line(
        f"Helios {asked.size.name}, {asked.variant.name}, {asked.height}×{asked.width}, batch {asked.batch}: "
        f"{sum(t.numel for t in weights):,} parameters, {output.gigabytes(sum(t.nbytes for t in weights))} of weights"
    )
    output.heading("By phase")
    output.table(
        ["phase", "runs", "nodes", "TFLOP", "moved", "held"],
        [
            (
                p.name,
                often.get(p.name, "every step"),
                p.nodes,
                output.teraflops(p.flops),
                output.gigabytes(p.moved),
                output.gigabytes(p.held) if p.name in often else "",
            )
            for p in phases
        ],
        right=["nodes", "TFLOP", "moved", "held"],
    )
    output.heading("A forward, as it is run here and as published")
    by_name = {phase.name: phase for phase in phases}
    history, prompt = by_name["chunk"].flops, by_name["prompt"].flops
    rows = []
    for stage in stages:
        step, known = by_name[f"stage{stage}"].flops, published_flops(asked, stage)
        rows.append(
            (
                f"stage{stage}",
                *map(output.teraflops, (step, step + history, known)),
                f"{1 - (step + history) / known:.1%}",
            )
        )
    columns = ["stage", "step", "step + history", "published", "saved"]
    output.table(columns, rows, right=columns[1:])
    output.note(
        "In TFLOP of matrix products and convolutions. The history's embedding "
        f"({output.teraflops(history)}) runs once a chunk, the text's keys and values ({output.teraflops(prompt)}) "
        "once a prompt; the published code runs both in every forward. Moved: bytes if every node reads and writes "
        "memory. Held: bytes kept for faster phases."
    )


def _print_coverage(plan: Plan, backend: Backend) -> None:
    from helios.fit.coverage import coverage

    rows = coverage(plan, backend)
    output.heading(f"Coverage by backend {backend.label}")
    output.table(
        ["op", "native", "fused", "unsupported", "reason"],
        [(r.op, r.native or "", r.fused or "", r.unsupported or "", "; ".join(r.reasons)) for r in rows],
        right=["native", "fused", "unsupported"],
    )
    missing = sum(r.unsupported for r in rows)
    total = sum(r.native + r.fused + r.unsupported for r in rows)
    verdict = "all of them run" if not missing else f"{missing:,} do not; --fallback reference would run those by torch"
    output.line(f"{output.count(total, 'node')}: {verdict}")
