"""What the ceilings allow beside what was measured, op by op and in all. Shown, never judged."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from helios import op
from helios.backend import ReferenceBackend
from helios.errors import InputError
from helios.fit.costs import LATENT_FRAMES, op_costs, stage_graphs
from helios.graph import Graph, Rate
from helios.lower import plan_for
from helios.model.vae_run import VaeRunner, decode_graphs
from helios.pipeline.codec import decoding_of, split_of
from helios.program import Context, Program
from helios_conformance import draws
from helios_conformance.realtime.ceilings import decoder, kind_of
from helios_conformance.realtime.golden import bind, contexts, draw, setting_of
from helios_conformance.realtime.options import Options
from helios_conformance.realtime.scene import Scene
from helios_conformance.session import Session

__all__ = ["best", "chunk_flops", "least_seconds", "median", "profile", "rows"]


def profile(
    session: Session, scene: Scene, program: Program, graphs: Mapping[str, Graph], split: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One profiled forward of each stage and one decoded chunk, as the backend runs them.

    Rows have ``entry`` (``denoise.i`` or ``decode``), ``op``, ``dtype``, ``nodes``, ``flops``, ``bytes``, ``seconds``;
    none where the backend runs graphs whole.
    """
    context = bind(program, contexts(graphs, session.root))
    found = []
    for name, graph in graphs.items():
        inputs = draw({name: graph}, Rate.STEP, session.root)
        program.run(name, inputs, context)  # warm
        found += _by_op(name, program.profile(name, inputs, context))
    return [*found, *_decoding(session, scene, split)]


def _by_op(entry: str, laps: Sequence[tuple[Any, float]]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0, 0.0])
    for node, seconds in laps:
        cost = op.cost(node)
        dtype = str(node.outputs[0].dtype).removeprefix("torch.")
        for i, value in enumerate((1, cost.flops, cost.bytes, seconds)):
            rows[node.op, dtype][i] += value
    return [
        {"entry": entry, "op": name, "dtype": dtype, "nodes": n, "flops": f, "bytes": b, "seconds": s}
        for (name, dtype), (n, f, b, s) in rows.items()
    ]


def _decoding(session: Session, scene: Scene, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The decoder cut as the timed run cut it and in its arithmetic, in a program of its own."""
    o, model, split = scene.options, scene.pipeline.model, split_of(plan)
    dtype = decoding_of(plan, scene.pipeline.precision)
    graphs = decode_graphs(
        model.vae, batch=1, latents=LATENT_FRAMES, height=o.height, width=o.width, dtype=dtype, split=split
    )
    program = session.lower(graphs)
    program.load(model.vae_weights)
    laps: list[tuple[Any, float]] = []

    def run(graph: Graph, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        laps.extend(program.profile(graph.name, inputs, Context({})))
        return program.run(graph.name, inputs)

    factor = model.vae.scale_factor_spatial
    shape = (1, model.vae.z_dim, LATENT_FRAMES, o.height // factor, o.width // factor)
    latents = draws.normal(session.root.key("realtime latents"), shape, torch.float32).to(session.backend.device)
    VaeRunner(model.vae, run, dtype=dtype, split=split).decode(latents)
    return _by_op("decode", laps)


def best(ceilings: Sequence[Mapping[str, Any]], what: str) -> float:
    """The best window of a kind."""
    return max((float(row["best"]) for row in ceilings if row["what"] == what and row["best"]), default=0.0)


def median(ceilings: Sequence[Mapping[str, Any]], what: str) -> float:
    """The highest sustained rate of a kind."""
    return max((float(row["rate"]) for row in ceilings if row["what"] == what and row["rate"]), default=0.0)


def rows(
    measured: Sequence[Mapping[str, Any]], ceilings: Sequence[Mapping[str, Any]], steps: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """Share of the roofline by op of a steady chunk, and in all.

    Args:
        measured: rows of ``profile``.
        ceilings: rows of ``ceilings.measure``.
        steps: of each stage.
        seconds: of a steady chunk under the clock.

    Returns:
        ``op``, ``flops``, ``bytes``, ``seconds``, ``share`` (predicted over measured; None without a ceiling, and for
        views; above 1 where caches serve what is counted as memory) and ``bound``; the slowest first, and last ``all``
        of them against the chunk under the clock.
    """
    times = {f"denoise.{i}": n for i, n in enumerate(steps)} | {"decode": 1}
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for row in measured:
        for i, value in enumerate((row["flops"], row["bytes"], row["seconds"])):
            sums[row["op"]][i] += times.get(row["entry"], 0) * value
    made = [_row(name, ceilings, *values) for name, values in sums.items()]
    made.sort(key=lambda row: -float(row["seconds"]))
    predicted = sum(row["predicted"] for row in made)
    whole = {"op": "all", "flops": sum(r["flops"] for r in made), "bytes": sum(r["bytes"] for r in made)}
    share = predicted / seconds if seconds > 0 and predicted else None
    return [*made, whole | {"seconds": seconds, "predicted": predicted, "share": share, "bound": ""}] if made else []


def _row(
    name: str, ceilings: Sequence[Mapping[str, Any]], flops: float, moved: float, seconds: float
) -> dict[str, Any]:
    kind = kind_of(name) or "linear"
    rate, width = median(ceilings, kind), median(ceilings, "copy")
    compute = flops / rate if rate else 0.0
    memory = moved / width if width else 0.0
    predicted = max(compute, memory)
    if op.get(name).kind == "move" and predicted > seconds:
        predicted = 0.0  # a view: nothing was moved
    return {
        "op": name,
        "flops": int(flops),
        "bytes": int(moved),
        "seconds": seconds,
        "predicted": predicted,
        "share": predicted / seconds if seconds > 0 and predicted else None,
        "bound": (kind if compute >= memory and flops else "copy") if predicted else "",
    }


@functools.lru_cache(maxsize=32)
def chunk_flops(
    size: str, variant: str, height: int, width: int, tokens: int, steps: tuple[int, ...]
) -> dict[str, int]:
    """FLOPs of a steady chunk by kind of ceiling, counted from the shapes alone.

    Raises:
        InputError: there is no such size, variant or picture, or the steps are not one a stage.
    """
    options = Options.of({"size": size, "height": height, "width": width, "tokens": tokens})
    setting = setting_of(options, variant)
    if len(steps) != setting.stages:
        raise InputError(f"steps {list(steps)}: variant {variant!r} has {setting.stages} stages")
    plan = plan_for(stage_graphs(setting), ReferenceBackend())
    found: dict[str, int] = defaultdict(int)
    for times, graph in (
        *zip(steps, plan.steps.values(), strict=True),
        (1, plan.phases[Rate.CHUNK]),
        (1, decoder(setting)),
    ):
        for row in op_costs(graph):
            found[kind_of(row.op) or "linear"] += times * row.flops
    return dict(found)


def least_seconds(flops: Mapping[str, int], ceilings: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that the best windows allow for these FLOPs; kinds without a ceiling cost nothing."""
    rates = {kind: best(ceilings, kind) for kind in flops}
    return sum(count / rates[kind] for kind, count in flops.items() if rates[kind])
