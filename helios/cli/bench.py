"""``helios bench``: how long a forward takes here, phase by phase and op by op."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helios.cli import output
from helios.cli.options import (
    BackendOption,
    BackendOptionsOption,
    FallbackOption,
    HeightOption,
    JsonOption,
    PrecisionOption,
    PyramidStageOption,
    SizeOption,
    VaePrecisionOption,
    VariantOption,
    WidthOption,
    backend_options,
    setting,
)
from helios.errors import BackendError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from helios.backend import Backend
    from helios.graph import Rate
    from helios.program import Context, Program

__all__ = ["EXAMPLES", "bench"]

EXAMPLES = "Example: helios bench --size mini --pyramid-stage 0 --repeat 10"
SEED = 0


def bench(
    size: SizeOption = "mini",
    variant: VariantOption = "distilled",
    pyramid_stage: PyramidStageOption = None,
    height: HeightOption = 384,
    width: WidthOption = 640,
    precision: PrecisionOption = None,
    vae_precision: VaePrecisionOption = None,
    backend: BackendOption = None,
    backend_option: BackendOptionsOption = None,
    fallback: FallbackOption = None,
    repeat: Annotated[int, typer.Option(metavar="N", help="Timed runs of each step, after one to warm up.")] = 5,
    json: JsonOption = False,
) -> None:
    """Time a forward with seeded random weights, by phase and by op; with --vae-precision decoding a chunk as well.

    The weights are random and no video is made: this is speed alone.
    """
    if repeat < 1:
        raise InputError(f"--repeat {repeat}: wanted at least 1", fix="--repeat 5")
    from helios.backend import select
    from helios.model.vae_precision import choose_vae_precision
    from helios.precision import require_offered

    chosen = select(backend, backend_options(backend_option))
    name = precision or chosen.precisions[0]
    asked = setting(size, variant, height, width, name)
    require_offered(name, chosen.label, chosen.precisions, chosen.withheld)
    stages = range(asked.stages) if pyramid_stage is None else [pyramid_stage]
    decoding = None if vae_precision is None else choose_vae_precision(vae_precision, name, chosen)
    report = measure(asked, stages, chosen, fallback, repeat, quiet=json)
    if decoding is not None:
        _decode(report, asked, chosen, fallback, decoding)
    report = {"machine": machine(chosen, name), **report}
    output.print_json(report) if json else _print(report)


def machine(backend: Backend, precision: str) -> dict[str, Any]:
    """What ran: everything that a figure needs beside it."""
    import torch

    import helios
    from helios.fit.host import read_host

    host = read_host()
    device = next((d.name for d in backend.devices() if d.index == backend.index), "")
    return {
        "backend": backend.label,
        "options": dict(backend.chosen),
        "device": device,
        "precision": precision,
        "cpu": host.cpu,
        "cores": host.usable_cores,
        "threads": torch.get_num_threads(),
        "system": host.system,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "helios": helios.__version__,
    }


def measure(
    asked: Any, stages: Sequence[int], backend: Backend, fallback: str | None, repeat: int, *, quiet: bool = False
) -> dict[str, Any]:
    """Load, bind, warm up, time, and profile once; seconds."""
    from helios.fit.costs import phase_costs, stage_graphs
    from helios.graph import Rate
    from helios.lower import lower
    from helios.model.random_weights import RandomWeights
    from helios.model.shapes import transformer_shapes

    say: Callable[[str], None] = (lambda text: None) if quiet else (lambda text: typer.echo(text, err=True))
    weights = RandomWeights(transformer_shapes(asked.size.transformer), seed=SEED, dtype=asked.dtype)
    program = lower(stage_graphs(asked, stages), backend, fallback=_fallback(fallback))
    say(f"loading {asked.size.name}, {weights.origin}")
    load = _timed(backend, lambda: program.load(weights))[0]
    prompt, first = _bind(program, Rate.PROMPT, repeat)
    history, second = _bind(program, Rate.CHUNK, repeat)
    context = prompt | history
    timed = {"prompt": first, "chunk": second}
    slowest: dict[str, list[dict[str, Any]]] = {}
    for entry in program.plan.steps:
        say(f"{entry}: {repeat} runs")
        timed[entry] = _steps(program, entry, context, repeat)
        slowest[entry] = _by_op(program, entry, context)
    flops = {phase.name: phase.flops for phase in phase_costs(program.plan)}
    return {
        "size": asked.size.name,
        "variant": asked.variant.name,
        "height": asked.height,
        "width": asked.width,
        "weights": weights.origin,
        "repeat": repeat,
        "load_seconds": load,
        "fallback_nodes": program.coverage.fallbacks,
        "phases": {name: _statistics(laps, flops[name]) for name, laps in timed.items()},
        "ops": slowest,
    }


def _decode(report: dict[str, Any], asked: Any, backend: Backend, fallback: str | None, vae: str) -> None:
    """Add decoding the latents of a chunk, in groups as a run would cut them."""
    import torch

    from helios.fit.costs import LATENT_FRAMES, vae_flops
    from helios.model.random_weights import RandomWeights
    from helios.model.shapes import vae_shapes
    from helios.model.vae_precision import VAE_DTYPES
    from helios.pipeline.codec import Codec

    size, (height, width) = asked.size.vae, asked.latent
    codec = Codec(size, RandomWeights(vae_shapes(size), seed=SEED), backend, VAE_DTYPES[vae], _fallback(fallback))
    split = codec.choose(1, LATENT_FRAMES, asked.height, asked.width)
    generator = torch.Generator().manual_seed(SEED)
    latents = torch.randn(1, size.z_dim, LATENT_FRAMES, height, width, generator=generator).to(backend.device)
    laps = [_timed(backend, lambda: codec.decode(latents, split))[0] for _ in range(report["repeat"] + 1)]
    told = _statistics(laps[1:], vae_flops(asked))  # the first run loads the weights
    report["phases"][f"decode {vae}"] = told | {"group": split.group}
    report["fallback_nodes"] += sum(coverage.fallbacks for coverage in codec.coverage)


def _fallback(asked: str | None) -> str:
    import os

    return asked or os.environ.get("HELIOS_FALLBACK") or "error"


def _inputs(program: Program, rate: Rate, entry: str | None = None) -> dict[str, Tensor]:
    """Seeded normal inputs of one rate; a timestep in the middle of its range."""
    import torch

    graphs = [program.plan.steps[entry]] if entry else list(program.plan.graphs.values())
    names = program.input_names(rate)
    generator = torch.Generator().manual_seed(SEED)
    values = {v.name: v for graph in graphs for v in graph.inputs_at(rate) if v.name in names}
    drawn = {name: torch.randn(v.shape, generator=generator).to(v.dtype) for name, v in sorted(values.items())}
    return {name: torch.full_like(x, 500.0) if name == "timestep" else x for name, x in drawn.items()}


def _bind(program: Program, rate: Rate, repeat: int) -> tuple[Context, list[float]]:
    inputs = _inputs(program, rate)
    context = program.bind(inputs)
    return context, [_timed(program.backend, lambda: program.bind(inputs))[0] for _ in range(repeat)]


def _steps(program: Program, entry: str, context: Context, repeat: int) -> list[float]:
    """Seconds of each run after one to warm up, whose result must be what a network gives."""
    import torch

    from helios.graph import Rate

    inputs = _inputs(program, Rate.STEP, entry)
    result = program.run(entry, inputs, context)["velocity"].float()
    if result.device.type != "meta" and not (torch.isfinite(result).all() and result.std() > 0):
        raise BackendError(
            f"backend {program.backend.label!r} computed {entry} with values that are not finite, or all the same",
            fix="its speed means nothing like this; compare it with --backend reference first",
        )
    return [_timed(program.backend, lambda: program.run(entry, inputs, context))[0] for _ in range(repeat)]


def _timed(backend: Backend, call: Callable[[], Any]) -> tuple[float, Any]:
    backend.synchronize()
    start = time.perf_counter()
    result = call()
    backend.synchronize()
    return time.perf_counter() - start, result


def _by_op(program: Program, entry: str, context: Context) -> list[dict[str, Any]]:
    """Seconds by op in one profiled step, the slowest first; empty for a program that runs as a whole."""
    from helios import op
    from helios.graph import Rate

    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0])
    for node, lap in program.profile(entry, _inputs(program, Rate.STEP, entry), context):
        rows[node.op][0] += 1
        rows[node.op][1] += lap
        rows[node.op][2] += op.cost(node).flops
    made = [{"op": name, "nodes": n, "seconds": lap, "flops": flops} for name, (n, lap, flops) in rows.items()]
    return sorted(made, key=lambda row: -float(row["seconds"]))


def _statistics(laps: list[float], flops: int) -> dict[str, Any]:
    """Nearest-rank percentiles: with fewer than a hundred runs p99 is the slowest."""
    ordered = sorted(laps)
    middle = statistics.median(ordered)
    p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
    return {"p50": middle, "p99": p99, "runs": len(laps), "flops": flops, "flop_per_second": flops / middle}


def _print(report: dict[str, Any]) -> None:
    m = report["machine"]
    output.line(
        f"Backend {m['backend']} on {m['device']}; host: {m['cpu']}, {m['cores']:g} cores usable, {m['system']}"
    )
    versions = f"Python {m['python']}, torch {m['torch']}, helios-hal {m['helios']}"
    output.line(f"{versions}; {output.count(m['threads'], 'torch thread')}")
    sizes = f"{report['size']}, {report['variant']}, {report['height']}×{report['width']}, {m['precision']}"
    output.line(f"Helios {sizes}; {report['weights']}")
    if report["fallback_nodes"]:
        output.line(
            f"{report['fallback_nodes']} nodes ran by the fallback: this is no figure of the backend.", "bold red"
        )
    output.heading("By phase")
    rows = [
        (name, output.seconds(p["p50"]), output.seconds(p["p99"]), p["runs"], *_rate(p["flops"], p["flop_per_second"]))
        for name, p in report["phases"].items()
    ]
    columns = ["phase", "p50", "p99", "runs", "TFLOP", "GFLOP/s"]
    output.table(columns, rows, right=columns[1:])
    output.note(f"Load and weights phase: {output.seconds(report['load_seconds'])}, once.")
    for entry, ops in report["ops"].items():
        _print_ops(entry, ops)


def _print_ops(entry: str, ops: list[dict[str, Any]]) -> None:
    output.heading(f"{entry}, by op, one profiled run")
    if not ops:
        output.line("This backend runs the graph as a whole and tells no single op.")
        return
    total = sum(row["seconds"] for row in ops)
    rows = [
        (
            r["op"],
            r["nodes"],
            output.seconds(r["seconds"]),
            f"{r['seconds'] / total:.1%}",
            *_rate(r["flops"], r["flops"] / r["seconds"])[1:],
        )
        for r in ops
    ]
    columns = ["op", "nodes", "time", "share", "GFLOP/s"]
    output.table(columns, rows, right=columns[1:])


def _rate(flops: float, rate: float) -> tuple[str, str]:
    return (output.teraflops(flops), f"{rate / 1e9:.0f}") if flops else ("", "")
