"""The timed program itself on drawn inputs, one forward a stage: what ties its speed to right results.

Teacher-forced: text, history and sample are drawn from the root, so anyone can compute the oracle where size allows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from helios.backend import ReferenceBackend
from helios.errors import InputError
from helios.fit.costs import Setting, phase_costs, stage_graphs
from helios.graph import Graph, Rate, Value
from helios.lower import lower, plan_for
from helios.model import presets
from helios.pipeline.denoise import Layout, denoise_graphs
from helios.pipeline.history import Window
from helios.precision import PRECISIONS, Precision
from helios.program import Context, Program
from helios_conformance import draws
from helios_conformance.draws import Root
from helios_conformance.realtime.options import Options
from helios_conformance.realtime.scene import drawn_model

__all__ = [
    "AFFORDABLE",
    "SIZES",
    "bind",
    "contexts",
    "draw",
    "entries",
    "forward",
    "graphs_of",
    "oracle",
    "outputs_of",
    "setting_of",
]

AFFORDABLE = 1e12
"""FLOP of the oracle in float64 that a host computes within a minute: all of tiny and of small pictures, and of mini at
384×640 the first stage."""


SIZES = {"tiny": 32, "mini": 4}
"""Sizes whose whole network a host can compute, and of how many draws their reference errors are the largest: at 64×64
pixels. A narrow network has few weights, and one error of the timestep's embedding turns all of its output."""


def setting_of(options: Options, variant: str, precision: str = "bf16") -> Setting:
    """The options' shapes."""
    return Setting(
        presets.size(options.size),
        presets.variant(variant),
        options.height,
        options.width,
        text_tokens=options.tokens,
        precision=PRECISIONS[precision],
    )


def entries(options: Options, variant: str, *, limit: float = AFFORDABLE) -> list[str]:
    """Entries whose oracle together is affordable, coarsest first; none of a size without reference errors."""
    if options.size not in SIZES:
        return []
    plan = plan_for(stage_graphs(setting_of(options, variant)), ReferenceBackend())
    flops = {phase.name: phase.flops for phase in phase_costs(plan)}
    spent, chosen = flops["prompt"] + flops["chunk"], []
    for i, name in enumerate(plan.steps):
        spent += flops[name]
        if spent <= limit:
            chosen.append(f"denoise.{i}")
    return chosen


def graphs_of(options: Options, variant: str, precision: Precision | torch.dtype) -> dict[str, Graph]:
    """The denoising graphs of the pipeline's own program; in a dtype, nothing is quantised."""
    size, sampling = presets.size(options.size), presets.variant(variant)
    factor = size.vae.scale_factor_spatial
    layout = Layout(1, options.height // factor, options.width // factor, options.tokens, Window())
    made = denoise_graphs(size.transformer, sampling.scheduler, sampling.pipeline, layout, precision)
    return {name: graph for name, graph in made.items() if name.startswith("denoise.")}


def draw(graphs: Mapping[str, Graph], rate: Rate, root: Root) -> dict[str, Tensor]:
    """Inputs of one rate: normals in the declared dtypes, keyed by name; a timestep in the middle of its range."""
    values: dict[str, Value] = {v.name: v for g in graphs.values() for v in g.inputs_at(rate)}
    return {name: _drawn(value, root) for name, value in sorted(values.items())}


def _drawn(value: Value, root: Root) -> Tensor:
    if value.name == "timestep":
        return torch.full(value.shape, 500.0, dtype=value.dtype)
    return draws.normal(root.key("realtime golden", value.name, *value.shape), value.shape, value.dtype)


def contexts(graphs: Mapping[str, Graph], root: Root) -> dict[Rate, dict[str, Tensor]]:
    """Drawn inputs of the prompt and of the history."""
    return {rate: draw(graphs, rate, root) for rate in (Rate.PROMPT, Rate.CHUNK)}


def bind(program: Program, given: Mapping[Rate, Mapping[str, Tensor]]) -> Context:
    """Both phases on the device."""
    return program.bind(given[Rate.PROMPT]) | program.bind(given[Rate.CHUNK])


def forward(program: Program, graphs: Mapping[str, Graph], names: list[str], root: Root) -> dict[str, Tensor]:
    """Velocities of these entries on the drawn inputs, on the device."""
    context = bind(program, contexts(graphs, root))
    return {name: program.run(name, draw({name: graphs[name]}, Rate.STEP, root), context)["velocity"] for name in names}


def outputs_of(program: Program, graphs: Mapping[str, Graph], name: str, root: Root) -> dict[str, Tensor]:
    """All outputs of an entry on the drawn inputs, on the device."""
    context = bind(program, contexts(graphs, root))
    return program.run(name, draw({name: graphs[name]}, Rate.STEP, root), context)


def oracle(
    options: Options, variant: str, precision: str, names: list[str], root: Root, arithmetic: Precision | None = None
) -> dict[str, Tensor]:
    """The same on the host, by the op bodies.

    Args:
        options, variant: of the size.
        precision: in which the device computes: its inputs are rounded to it.
        names: of the entries.
        root: of the draws.
        arithmetic: ``None`` for the oracle in float64; the precision itself for the reference.

    Raises:
        InputError: there is no entry to compute.
    """
    if not names:
        raise InputError("no entry is affordable on this host")
    working = graphs_of(options, variant, PRECISIONS[precision])
    wide = graphs_of(options, variant, arithmetic or torch.float64)
    graphs = {name: wide[name] for name in names}
    program = lower(graphs, ReferenceBackend())
    program.load(drawn_model(options.size, variant, root).transformer_weights)
    given = contexts({name: working[name] for name in names}, root)
    context = bind(program, given)
    return {
        name: program.run(name, draw({name: working[name]}, Rate.STEP, root), context)["velocity"] for name in names
    }
