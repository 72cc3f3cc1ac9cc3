"""Whether a setting fits a device, and how fast it may run there: a prediction from counts, never a measurement."""

from __future__ import annotations

import dataclasses
import math

from helios.backend import ReferenceBackend
from helios.errors import InputError
from helios.fit.costs import (
    LATENT_FRAMES,
    Setting,
    activation_bytes,
    phase_costs,
    resident_weights,
    stage_graphs,
    vae_flops,
    weight_inputs,
)
from helios.graph import Rate
from helios.lower import plan_for
from helios.model.config import TextConfig
from helios.model.presets import Variant
from helios.model.room import RESERVE, encodes_first, keeps_encoder
from helios.model.shapes import transformer_shapes, vae_shapes
from helios.model.vae import frames_of
from helios.model.vae_split import Split, Tile, choose_split, peak_bytes

__all__ = [
    "MOMENTS",
    "Fit",
    "Part",
    "Repository",
    "Speed",
    "Work",
    "count_work",
    "fit_memory",
    "parse_steps",
    "predict",
    "repository",
    "text_parameters",
    "vae_shares",
]

SHARES = (0.40, 0.70)
"""Of a device's dense peak that whole denoising runs reach; the published Base run on an H100 is at 59 %."""
VAE_SHARES = {4: (0.10, 0.18), 2: (0.36, 0.50)}
"""The same for the VAE's convolutions, by the bytes of a number. A published decode in float32 of 1253 ms on an A100 is
at 18 % of the peak in 16 bits. Of decoding in 16 bits nothing is published or measured here: an H200 is predicted to
take 141 to 195 ms a chunk (docs/performance.md), which is 36 % to 50 %."""
VAE_ROOM = 0.5
"""Of the memory that is left, what the VAE's activations may take before it is cut into groups."""
HOST_BASE = 1_500_000_000
"""Host bytes of the process itself with torch and transformers imported: an assumption."""


def parse_steps(text: str | None, variant: Variant) -> tuple[int, ...]:
    """Solver steps by stage, from ``--steps 1,1,1``; one number serves every stage; nothing is the variant's own.

    Raises:
        InputError: not whole numbers from 1, or neither one nor one a stage.
    """
    if text is None:
        return variant.steps
    parts = [part.strip() for part in text.split(",")]
    stages = variant.scheduler.stages
    if not all(part.isdigit() and int(part) for part in parts) or len(parts) not in (1, stages):
        example = ",".join(map(str, variant.steps))
        wanted = f"one number ≥ 1, or {stages}, one a pyramid stage" if stages > 1 else "one number ≥ 1"
        raise InputError(f"--steps {text}: variant {variant.name!r} takes {wanted}", fix=f"--steps {example}")
    return tuple(map(int, parts)) * (1 if len(parts) == stages else stages)


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What a setting holds in memory, in bytes, and computes, in FLOP.

    Attributes:
        step_flops: one forward of each stage, coarsest first.
        chunk_flops: history embedding, once a chunk.
        prompt_flops: text keys and values, once a prompt.
        vae_flops: decoding one chunk.
        weights: transformer, as the graphs want it.
        step_weights: those of them that steps read.
        prompt: what one prompt holds.
        chunk: what one chunk's history holds.
        activations: of the largest step.
        vae_weights, text_weights: of the other two networks.
        largest_weight: the largest single tensor of all three, which passes through the host.
        frames: a decoded chunk as bytes on the host.
    """

    setting: Setting
    step_flops: tuple[int, ...]
    chunk_flops: int
    prompt_flops: int
    vae_flops: int
    weights: int
    step_weights: int
    prompt: int
    chunk: int
    activations: int
    vae_weights: int
    text_weights: int
    largest_weight: int
    frames: int


def count_work(setting: Setting) -> Work:
    """Count a setting's graphs, on shapes."""
    plan = plan_for(stage_graphs(setting), ReferenceBackend())
    phases = {phase.name: phase for phase in phase_costs(plan)}
    weights = {name: type_.nbytes for name, type_ in weight_inputs(plan).items()}
    stepped = {v.name: v.type.nbytes for graph in plan.steps.values() for v in graph.inputs_at(Rate.WEIGHTS)}
    width = setting.dtype.itemsize
    text = setting.size.text
    frames = frames_of(setting.size.vae, LATENT_FRAMES)
    return Work(
        setting=setting,
        step_flops=tuple(phases[name].flops for name in plan.steps),
        chunk_flops=phases["chunk"].flops,
        prompt_flops=phases["prompt"].flops,
        vae_flops=vae_flops(setting),
        weights=sum(type_.nbytes for type_ in resident_weights(plan).values()),
        step_weights=sum(stepped.values()),
        prompt=phases["prompt"].held,
        chunk=phases["chunk"].held,
        activations=max(activation_bytes(graph) for graph in plan.steps.values()),
        vae_weights=_count(vae_shapes(setting.size.vae)) * setting.decoding.itemsize,
        text_weights=text_parameters(text) * width,
        largest_weight=max(*weights.values(), text.vocab_size * text.d_model * width),
        frames=setting.batch * frames * setting.height * setting.width * 3,
    )


def text_parameters(config: TextConfig) -> int:
    """Parameters of the UMT5 encoder: 5,680,910,336 at the published size."""
    d, inner = config.d_model, config.num_heads * config.d_kv
    bias = config.relative_attention_num_buckets * config.num_heads
    layer = 4 * d * inner + bias + 3 * d * config.d_ff + 2 * d
    return config.vocab_size * d + config.num_layers * layer + d


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Repository:
    """The published folder of a size, computed from parameter counts: networks and their bytes on disk."""

    transformer: int
    text: int
    vae: int

    @property
    def total(self) -> int:
        return self.transformer + self.text + self.vae


def repository(setting: Setting) -> Repository:
    """Bytes to download: transformer and text encoder in bfloat16, VAE in float32, as such releases are stored."""
    size = setting.size
    return Repository(
        transformer=2 * _count(transformer_shapes(size.transformer)),
        text=2 * text_parameters(size.text),
        vae=4 * _count(vae_shapes(size.vae)),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One line of a memory budget, in bytes, at each of the three moments of ``MOMENTS``."""

    name: str
    encode: int = 0
    step: int = 0
    decode: int = 0


MOMENTS = ("encode", "step", "decode")
"""When memory is fullest: while the prompt is encoded, in a step, while frames are decoded. The text encoder leaves
once the prompt is encoded, unless there is plenty of room; the transformer is there all the time, or comes then if both
have no room at once; the VAE stays from its first use."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """A setting in a given amount of device memory.

    Attributes:
        parts: what lies on the device, at each moment.
        usable: device memory less the reserve.
        split: how the VAE is cut, or ``None`` if it has no room.
        host: what the host needs at its fullest, by part; nothing where device and host are one.
        apart: text is encoded before the transformer is loaded, since both have no room at once.
    """

    parts: tuple[Part, ...]
    usable: int
    split: Split | None
    host: tuple[tuple[str, int], ...]
    apart: bool = False

    def at(self, moment: str) -> int:
        """Bytes at a moment."""
        return sum(getattr(part, moment) for part in self.parts)

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return max(map(self.at, MOMENTS))

    @property
    def fits(self) -> bool:
        return self.split is not None and self.total <= self.usable

    @property
    def fits_without_text(self) -> bool:
        """Whether it fits for someone who brings the prompt's embedding from elsewhere."""
        return self.split is not None and max(self.at("step"), self.at("decode")) <= self.usable

    @property
    def short(self) -> int:
        """Bytes that are missing; 0 if it fits."""
        return max(0, self.total - self.usable)

    @property
    def host_total(self) -> int:
        return sum(size for _, size in self.host)


def fit_memory(work: Work, memory: int, *, shared: bool = False, resident: int | None = None, slots: int = 0) -> Fit:
    """Lay a setting out in memory. ``helios.fit.low`` says what ``resident`` and ``slots`` are with little of it.

    Args:
        work: counted.
        memory: bytes of the device.
        shared: device and host memory are one, so the process and the frames are on it as well.
        resident: bytes of the transformer that stay on the device, where the host keeps the others; None is all.
        slots: bytes for those on their way to it.
    """
    usable = int(memory * (1 - RESERVE)) - (HOST_BASE + work.frames if shared else 0)
    prompts = 2 if work.setting.variant.guidance > 1 else 1
    bound = prompts * work.prompt
    apart = encodes_first(work.weights, work.text_weights, usable)
    stays = work.text_weights if keeps_encoder(work.weights, work.text_weights, usable) else 0
    held = work.weights if resident is None else resident
    parts = [
        Part("transformer weights", 0 if apart else held, held, held),
        Part("text encoder weights", work.text_weights, stays, stays),
        Part(f"text keys and values, {'2 prompts' if prompts == 2 else '1 prompt'}", step=bound, decode=bound),
        Part("history of a chunk", step=work.chunk, decode=work.chunk),
        Part("VAE weights", step=work.vae_weights, decode=work.vae_weights),
    ]
    if slots:
        parts.append(Part("weights on their way from the host", step=slots, decode=slots))
    room = usable - sum(part.decode for part in parts)
    split = _vae_split(work.setting, int(VAE_ROOM * max(0, room)))
    parts.append(Part("activations", step=work.activations, decode=_vae_peak(work, split)))
    host = () if shared else _host_parts(work, work.weights - held)
    return Fit(tuple(parts), usable, split, host, apart)


def _host_parts(work: Work, kept: int) -> tuple[tuple[str, int], ...]:
    """The text encoder is read whole before it moves; the other networks pass tensor by tensor."""
    passing = max(work.text_weights, work.largest_weight)
    return (
        ("process", HOST_BASE),
        ("text encoder on its way to the device", passing),
        ("frames of a chunk", work.frames),
        *([("weights kept for the device", kept)] if kept else []),
    )


def _vae_split(setting: Setting, room: int) -> Split | None:
    try:
        return choose_split(
            setting.size.vae,
            latents=LATENT_FRAMES,
            height=setting.height,
            width=setting.width,
            dtype=setting.decoding,
            budget_bytes=room,
            batch=setting.batch,
        )
    except InputError:
        return None


def _vae_peak(work: Work, split: Split | None) -> int:
    """Activations of decoding a chunk cut that way; at its smallest where no cut was found."""
    setting = work.setting
    split = split or Split(1, Tile())
    tile = split.tiled(setting.height, setting.width)
    height, width = (min(tile.size, side) if tile else side for side in (setting.height, setting.width))
    whole = split.group >= LATENT_FRAMES
    return peak_bytes(
        setting.size.vae,
        latents=min(split.group, LATENT_FRAMES),
        height=height,
        width=width,
        dtype=setting.decoding,
        batch=setting.batch,
        first=whole,
        caches=not whole,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Speed:
    """A predicted range: seconds of a steady chunk and frames a second, slow end first.

    Attributes:
        forwards: of the transformer in a chunk.
        flops: of the transformer in a chunk.
        denoise, vae: seconds, slow and fast.
        fps: slow and fast.
        first_chunk: seconds of the first chunk, which some variants give twice the steps.
    """

    forwards: int
    flops: int
    denoise: tuple[float, float]
    vae: tuple[float, float]
    fps: tuple[float, float]
    first_chunk: tuple[float, float]


def vae_shares(setting: Setting) -> tuple[float, float]:
    """Shares of the peak at which the VAE is predicted to decode, slow and fast; wider than float32 as float32."""
    return VAE_SHARES[min(setting.decoding.itemsize, max(VAE_SHARES))]


def predict(work: Work, steps: tuple[int, ...], *, peak: float, bandwidth: float) -> Speed:
    """The roofline: each forward takes its FLOPs at a share of the peak, but at least one reading of the weights.

    Args:
        work: counted.
        steps: solver steps of each stage.
        peak: FLOP a second.
        bandwidth: bytes a second.
    """
    variant = work.setting.variant
    branches = 2 if variant.guidance > 1 else 1
    reading = work.weights / bandwidth if bandwidth else 0.0
    flops = work.chunk_flops + branches * sum(n * f for n, f in zip(steps, work.step_flops, strict=True))

    def seconds(share: float) -> float:
        rate = peak * share
        forwards = (n * max(f / rate, reading) for n, f in zip(steps, work.step_flops, strict=True))
        return work.chunk_flops / rate + branches * sum(forwards)

    denoise = (seconds(SHARES[0]), seconds(SHARES[1]))
    slow, fast = vae_shares(work.setting)
    vae = (work.vae_flops / (peak * slow), work.vae_flops / (peak * fast))
    frames = work.setting.batch * frames_of(work.setting.size.vae, LATENT_FRAMES)
    first = 2 if variant.amplify_first_chunk else 1
    return Speed(
        forwards=branches * sum(steps),
        flops=flops,
        denoise=denoise,
        vae=vae,
        fps=(frames / (denoise[0] + vae[0]), frames / (denoise[1] + vae[1])),
        first_chunk=(first * denoise[0] + vae[0], first * denoise[1] + vae[1]),
    )
