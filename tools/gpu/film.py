"""The pipeline under the clock: weights drawn on the device, videos streamed, steps timed and profiled node by node."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import hashlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rates import Rates
from results import Record
from rig import Rig
from timing import measure
from torch import Tensor

from helios import op
from helios.backend import Backend, select
from helios.graph import Graph, Node, Rate
from helios.lower import lower
from helios.model.random_weights import RandomWeights, spread
from helios.model.vae_run import VaeRunner, decode_graphs
from helios.pipeline.codec import split_of
from helios.pipeline.history import CHUNK_LATENTS
from helios.pipeline.model import Model, sized_model
from helios.pipeline.pipeline import Pipeline
from helios.pipeline.request import Request
from helios.pipeline.run import Chunk
from helios.program import Context, Program
from helios_conformance.realtime.sensors import Sensors, allocator_peak, device_bytes

__all__ = ["DeviceWeights", "Scene", "by_op", "percentile", "summary"]

PROMPT = "a lighthouse above a stormy sea, waves breaking on dark rocks, slow camera flight at dusk"
ENDLESS = 1_000_000
"""Chunks that a request names where the clock decides when it is enough."""
WARM_UP = 2
"""Chunks of another video before the clock starts; one where only the plumbing is tested."""
SPLIT = ("text", "history", "denoise", "decode")


class DeviceWeights(RandomWeights):
    """Random weights of the same distributions, drawn where they are needed: no host memory and none of its time.

    Other numbers than ``RandomWeights`` of the same seed gives, since another generator draws them.

    Args:
        like: names, shapes, dtypes and seed.
        device: that draws.

    Attributes:
        seconds: that drawing took so far, the device waited for.
    """

    def __init__(self, like: RandomWeights, device: torch.device) -> None:
        super().__init__({}, seed=like.seed)
        self.tensors, self.device, self.seconds = like.tensors, device, 0.0
        self.origin = f"{like.origin}; drawn on {device.type}"

    def read(self, name: str) -> Tensor:
        begin, info = time.perf_counter(), self.tensors[name]
        key = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(key[:7], "little"))
        mean, deviation = spread(name, info.shape)
        drawn = torch.randn(info.shape, generator=generator, dtype=torch.float32, device=self.device)
        made = drawn.mul_(deviation).add_(mean).to(info.dtype)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - begin
        return made


def drawn_model(size: str, device: torch.device) -> Model:
    """The distilled model of a named size, its weights drawn on the device."""
    model = sized_model(size, "distilled")
    sources = model.transformer_weights, model.vae_weights
    assert all(isinstance(source, RandomWeights) for source in sources)
    transformer, vae = (DeviceWeights(source, device) for source in sources)  # type: ignore[arg-type]
    contents = f"{model.name} {transformer.origin}".encode()
    return dataclasses.replace(
        model, transformer_weights=transformer, vae_weights=vae, contents=lambda: contents, name=f"{size}, drawn here"
    )


class Scene:
    """One pipeline, loaded when it is first needed.

    Args:
        rig: the device.
        size: of the model.
        height, width: in pixels.
        tokens: of the prompt.
        precision: of the run. On a host what is quantised runs by the op bodies: its backend multiplies no e4m3.
    """

    def __init__(self, rig: Rig, size: str, height: int, width: int, tokens: int, precision: str = "bf16") -> None:
        self.rig, self.size, self.height, self.width, self.tokens = rig, size, height, width, tokens
        self.precision = precision
        self.loaded: Record = {}

    @functools.cached_property
    def backend(self) -> Backend:
        return select("cuda" if self.rig.cuda else "cpu" if self.precision == "bf16" else "reference")

    @functools.cached_property
    def pipeline(self) -> Pipeline:
        return Pipeline(drawn_model(self.size, self.backend.device), self.backend, self.precision)

    def release(self) -> None:
        """Free what it loaded: the device holds one of these at a time."""
        self.__dict__.pop("pipeline", None)
        self.loaded = {}
        gc.collect()
        if self.rig.cuda:
            torch.cuda.empty_cache()

    def request(
        self, steps: Sequence[int] = (1, 1, 1), prompt: str = PROMPT, seed: int = 1, chunks: int = ENDLESS
    ) -> Request:
        """A video in this size; the first chunk is not amplified."""
        return self.pipeline.request(
            prompt,
            seed=seed,
            steps=tuple(steps),
            height=self.height,
            width=self.width,
            max_sequence_length=self.tokens,
            chunks=chunks,
            amplify_first_chunk=False,
        )

    def ready(self) -> Program:
        """The transformer's program with its weights, its steps captured."""
        begin, fresh = time.perf_counter(), not self.loaded
        program = self.pipeline.denoiser(self.request()).program
        self.backend.synchronize()
        if fresh:
            loaded = time.perf_counter()
            getattr(program, "capture", lambda: None)()
            self.backend.synchronize()
            source = self.pipeline.model.transformer_weights
            assert isinstance(source, DeviceWeights)
            execution: Callable[[], Any] = getattr(program, "execution", dict)
            self.loaded = {
                "load_s": loaded - begin,
                "drawing_s": source.seconds,
                "capture_s": time.perf_counter() - loaded,
                "execution": execution(),
                "device_bytes": device_bytes(self.backend),
                "weights": source.origin,
                "within_90_s": loaded - begin < 90.0,
            }
        return program

    def load(self) -> Record:
        """What loading took."""
        self.ready()
        return {"ms_median": 1e3 * self.loaded["load_s"], **self.loaded}

    def film(self, steps: Sequence[int], seconds: float, most: int) -> Record:
        """Stream a video for so many seconds, or ``most`` chunks; two at least. The device is warm before."""
        self.ready()
        count = 1 if self.rig.tiny else WARM_UP
        for chunk in self.pipeline.run(self.request(steps, "a paper boat on a pond", 2, count)):
            del chunk
        if self.rig.cuda:
            torch.cuda.reset_peak_memory_stats()
        stamps, timings, wrong = [time.perf_counter()], [], ""
        with Sensors(self.backend) as sensors:
            for chunk in self.pipeline.run(self.request(steps)):
                stamps.append(time.perf_counter())
                timings.append(dict(chunk.timings))
                wrong = wrong or _wrong(chunk)
                if len(timings) >= most or (len(timings) > 1 and stamps[-1] - stamps[0] > seconds):
                    break
        record = summary(stamps, timings, chunk.frames.shape[1])
        memory = {"peak_allocated": allocator_peak(self.backend), "device_bytes": device_bytes(self.backend)}
        record |= memory | {"sensors": sensors.told(), "correct": not wrong, "steps": list(steps)}
        record |= {"precision": self.precision, "vae": self.pipeline.vae_precision}
        return record | ({"why": wrong} if wrong else {})

    def steps(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Each stage's forward as the pipeline runs it, replayed where it is captured."""
        program = self.ready()
        context = self.context(program)
        for name in sorted(n for n in program.plan.steps if n.startswith("denoise.")):
            inputs = self._drawn(program, Rate.STEP, name)
            yield name, functools.partial(program.run, name, inputs, context)

    def time_step(self, stage: str) -> Record:
        """Milliseconds of one forward of a stage."""
        call = dict(self.steps())[stage]
        timing = measure([call], self.rig.device, max(self.rig.seconds, 0.01))
        flops = sum(op.cost(node).flops for node in self.ready().plan.steps[stage].nodes)
        return {**timing.record(), "flops": flops, "tflops": flops / timing.median / 1e9}

    def profile_step(self, stage: str, rates: Rates) -> Record:
        """One forward node by node, the device waited for after each: single times are longer than in a replay."""
        program = self.ready()
        context = self.context(program)
        inputs = self._drawn(program, Rate.STEP, stage)
        program.profile(stage, inputs, context)  # libraries load in a first run
        return by_op(program.profile(stage, inputs, context), rates)

    def profile_decode(self, rates: Rates) -> Record:
        """The decoding of a chunk node by node, cut as the pipeline cuts it, in a program of its own."""
        self.ready()  # the split depends on what the transformer leaves free
        model, split = self.pipeline.model, split_of(self.pipeline.plan(self.request())["vae"])
        dtype, size = self.pipeline.codec.dtype, {"height": self.height, "width": self.width}
        graphs = decode_graphs(model.vae, batch=1, latents=CHUNK_LATENTS, dtype=dtype, split=split, **size)
        program = lower(graphs, self.backend)
        program.load(model.vae_weights)
        laps: list[tuple[Node, float]] = []

        def run(graph: Graph, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            out = program.run(graph.name, inputs)
            laps.extend(program.profile(graph.name, inputs, Context({})))
            return out

        factor = model.vae.scale_factor_spatial
        shape = (1, model.vae.z_dim, CHUNK_LATENTS, self.height // factor, self.width // factor)
        latents = torch.randn(shape, device=self.backend.device, dtype=dtype)
        VaeRunner(model.vae, run, dtype=dtype, split=split).decode(latents)
        return by_op(laps, rates)

    def context(self, program: Program) -> Context:
        """A drawn prompt and past."""
        text = program.bind(self._drawn(program, Rate.PROMPT))
        return text | program.bind(self._drawn(program, Rate.CHUNK), text)

    def _drawn(self, program: Program, rate: Rate, entry: str = "") -> dict[str, Tensor]:
        graphs = [program.plan.steps[entry]] if entry else program.plan.graphs.values()
        names = program.input_names(rate)
        values = {v.name: v for graph in graphs for v in graph.inputs_at(rate) if v.name in names}
        drawn = {n: torch.randn(v.shape, device=self.backend.device).to(v.dtype) for n, v in sorted(values.items())}
        return {n: torch.full_like(x, 500.0) if n == "timestep" else x for n, x in drawn.items()}


def _wrong(chunk: Chunk) -> str:
    """Why a chunk is no picture; empty where it is one."""
    latents, frames = chunk.latents.float(), chunk.frames[:, ::8, ::4, ::4].float()
    if not bool(latents.isfinite().all()):
        return f"chunk {chunk.index}: latents are not finite"
    if not (1e-3 < float(latents.std()) < 1e4 and float(frames.std()) > 0.5):
        return (
            f"chunk {chunk.index}: latents deviate by {float(latents.std()):.3g}, pixels by {float(frames.std()):.3g}"
        )
    return ""


def summary(stamps: Sequence[float], timings: Sequence[Mapping[str, float]], frames: int) -> Record:
    """Latencies by the host's clock, of chunks whose frames are in host memory.

    Args:
        stamps: seconds; the request, then the end of each chunk.
        timings: of each chunk.
        frames: of a chunk.

    Returns:
        ``first_s`` from the request; of the steady chunks, all but the first: ``ms_median``, ``p50_s``, ``p99_s``,
        ``fps``, and the mean seconds of each part.
    """
    laps = [later - earlier for earlier, later in itertools.pairwise(stamps)]
    steady = laps[1:]
    split = {name: statistics.fmean(t[name] for t in timings[1:]) for name in SPLIT}
    return {
        "first_s": laps[0],
        "first_split_s": {name: timings[0][name] for name in SPLIT},
        "ms_median": 1e3 * statistics.median(steady),
        "p50_s": percentile(steady, 0.5),
        "p99_s": percentile(steady, 0.99),
        "fps": frames * len(steady) / sum(steady),
        "chunks": len(laps),
        "split_s": split,
    }


def percentile(values: Sequence[float], part: float) -> float:
    """By nearest rank: with fewer than a hundred values the 99th is the largest.

    >>> percentile([3.0, 1.0, 2.0], 0.5), percentile([3.0, 1.0, 2.0], 0.99)
    (2.0, 3.0)
    """
    ordered = sorted(values)
    return ordered[math.ceil(part * len(ordered)) - 1]


def by_op(laps: Sequence[tuple[Node, float]], rates: Rates) -> Record:
    """Sums by op and dtype, the longest first; bytes as if nothing were a view."""
    sums: dict[tuple[str, torch.dtype], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0, 0, 0.0])
    for node, seconds in laps:
        cost, dtype = op.cost(node), node.outputs[0].dtype
        floor = rates.floor(node.op, dtype, cost.flops, cost.bytes) or 0.0
        for i, value in enumerate((1, 1e3 * seconds, cost.flops, cost.bytes, floor)):
            sums[node.op, dtype][i] += value
    rows: list[Record] = [
        {
            "op": name,
            "dtype": str(d).removeprefix("torch."),
            "n": n,
            "ms": ms,
            "flops": f,
            "bytes": b,
            "floor_ms": floor,
        }
        for (name, d), (n, ms, f, b, floor) in sums.items()
    ]
    rows.sort(key=lambda row: -float(row["ms"]))
    return {"ms_median": sum(seconds for _, seconds in laps) * 1e3, "nodes": len(laps), "ops": rows}
