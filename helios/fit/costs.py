"""FLOPs and bytes of a run's graphs, counted on shapes alone: no weight is made, no device is asked.

One *setting* is what a user asks for; its denoising graphs, one a pyramid stage, make one plan, and the plan's phases
say what is computed at each step, once a chunk, once a prompt and once at load.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable

import torch

from helios import op
from helios.errors import InputError
from helios.graph import Graph, Rate, TensorType, Value
from helios.model.presets import Size, Variant
from helios.model.transformer import DenoiseShape, HistoryShape, denoise_graph
from helios.model.vae import decode_graph
from helios.model.vae_split import live_bytes
from helios.passes import Plan, quantize
from helios.precision import PRECISIONS, Precision

__all__ = [
    "LATENT_FRAMES",
    "OpCost",
    "PhaseCost",
    "Setting",
    "activation_bytes",
    "op_costs",
    "phase_costs",
    "published_flops",
    "resident_weights",
    "stage_graphs",
    "stage_shape",
    "vae_flops",
    "weight_inputs",
]

LATENT_FRAMES = 9
"""Latent frames of a chunk."""


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """A run as far as its shapes go.

    Args:
        size, variant: presets.
        height, width: of the video in pixels.
        batch: videos that run together.
        text_tokens: length of a prompt's embedding.
        precision: of the transformer.
        decoding: dtype of the VAE's decoder.

    Raises:
        InputError: the pixels do not divide as the variant needs; names the nearest that do.
    """

    size: Size
    variant: Variant
    height: int = 384
    width: int = 640
    batch: int = 1
    text_tokens: int = 512
    precision: Precision = PRECISIONS["bf16"]
    decoding: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("batch", "text_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, wanted at least 1")
        multiple = self.multiple
        if self.height < 1 or self.width < 1 or self.height % multiple or self.width % multiple:
            near = [max(multiple, round(side / multiple) * multiple) for side in (self.height, self.width)]
            raise InputError(
                f"{self.height}×{self.width} pixels: variant {self.variant.name!r} needs multiples of {multiple}",
                fix=f"--height {near[0]} --width {near[1]}",
            )

    @property
    def dtype(self) -> torch.dtype:
        """The working dtype."""
        return self.precision.dtype

    @property
    def stages(self) -> int:
        """Pyramid stages; the last one is the full size."""
        return self.variant.scheduler.stages

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this: whole patches even at the coarsest stage."""
        patch = math.lcm(*self.size.transformer.patch_size[1:])
        return self.size.vae.scale_factor_spatial * patch * (1 << (self.stages - 1))

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of the full latents."""
        factor = self.size.vae.scale_factor_spatial
        return self.height // factor, self.width // factor


def stage_shape(setting: Setting, stage: int) -> DenoiseShape:
    """The shape of one pyramid stage; stage 0 is the coarsest.

    Raises:
        InputError: the variant has no such stage.
    """
    if not 0 <= stage < setting.stages:
        last = setting.stages - 1
        known = f"stages 0 to {last}" if last else "one stage, 0, at the full size"
        raise InputError(f"variant {setting.variant.name!r} has no pyramid stage {stage}: it has {known}")
    height, width = setting.latent
    shrink = 2 ** (setting.stages - 1 - stage)
    history = HistoryShape(height, width)
    return DenoiseShape(
        height // shrink, width // shrink, text_tokens=setting.text_tokens, history=history, batch=setting.batch
    )


def stage_graphs(setting: Setting, stages: Iterable[int] | None = None, *, published: bool = False) -> dict[str, Graph]:
    """Denoising graphs by entry name ``stage0``, ``stage1`` …; all stages unless some are named."""
    wanted = range(setting.stages) if stages is None else stages
    made = (
        denoise_graph(
            setting.size.transformer,
            stage_shape(setting, stage),
            dtype=setting.dtype,
            published=published,
            name=f"stage{stage}",
        )
        for stage in wanted
    )
    return {graph.name: quantize(graph, setting.precision)[0] for graph in made}


@dataclasses.dataclass(frozen=True, slots=True)
class PhaseCost:
    """One phase of a plan.

    Attributes:
        name: ``weights``, ``prompt``, ``chunk``, or an entry of the step phase.
        nodes: how many run.
        flops: of matrix products and convolutions, in one evaluation.
        moved: bytes read and written if every node goes to memory.
        held: bytes that the phase leaves for faster ones; for a step, its result.
    """

    name: str
    nodes: int
    flops: int
    moved: int
    held: int


def phase_costs(plan: Plan) -> list[PhaseCost]:
    """What each phase costs, slowest first."""
    return [_phase_cost(name, graph) for name, graph in plan.graphs.items()]


def _phase_cost(name: str, graph: Graph) -> PhaseCost:
    costs = [op.cost(node) for node in graph.nodes]
    held = sum(value.type.nbytes for _, value in graph.outputs)
    return PhaseCost(name, len(graph.nodes), sum(c.flops for c in costs), sum(c.bytes for c in costs), held)


@dataclasses.dataclass(frozen=True, slots=True)
class OpCost:
    """All nodes of one op in a graph."""

    op: str
    kind: str
    nodes: int
    flops: int
    moved: int


def op_costs(graph: Graph) -> list[OpCost]:
    """Cost by op, the most FLOPs first, then the most bytes."""
    totals: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for node in graph.nodes:
        cost = op.cost(node)
        for place, value in enumerate((1, cost.flops, cost.bytes)):
            totals[node.op][place] += value
    rows = [OpCost(name, op.get(name).kind, *counts) for name, counts in totals.items()]
    return sorted(rows, key=lambda row: (-row.flops, -row.moved, row.op))


def published_flops(setting: Setting, stage: int) -> int:
    """FLOPs of one forward as the published code runs it: every phase each time, the last block's dead rows too."""
    (graph,) = stage_graphs(setting, [stage], published=True).values()
    return sum(op.cost(node).flops for node in graph.nodes)


def vae_flops(setting: Setting) -> int:
    """FLOPs of decoding one chunk in one pass; cutting it into groups changes nothing but a percent."""
    graph = decode_graph(
        setting.size.vae,
        batch=setting.batch,
        latents=LATENT_FRAMES,
        height=setting.height,
        width=setting.width,
        dtype=setting.dtype,
        first=True,
        caches=False,
    )
    return sum(op.cost(node).flops for node in graph.nodes)


def weight_inputs(plan: Plan) -> dict[str, TensorType]:
    """Every weight that the plan reads, by name."""
    held = {value.name for graph in plan.phases.values() for _, value in graph.outputs}
    values: Iterable[Value] = (v for graph in plan.graphs.values() for v in graph.inputs_at(Rate.WEIGHTS))
    return {value.name: value.type for value in values if value.name not in held}


def resident_weights(plan: Plan) -> dict[str, TensorType]:
    """What stays after loading, by name: weights that a later phase reads, and what the phase at load made of weights.

    A weight that is held in a quantised form is read at load and by nobody later.
    """
    later = (graph for name, graph in plan.graphs.items() if name != Rate.WEIGHTS.label)
    return {v.name: v.type for graph in later for v in graph.inputs_at(Rate.WEIGHTS)}


def activation_bytes(graph: Graph) -> int:
    """Most bytes alive at once while a step graph runs in order, beyond the weights and what slower phases hold.

    Every node is charged its outputs: a backend that fuses needs less, one that makes attention's scores needs more.
    """
    held = sum(v.type.nbytes for v in graph.inputs if v.rate in (Rate.PROMPT, Rate.CHUNK))
    return live_bytes(graph) - held
