"""The calls that make a chunk, as data: written down while the pipeline's own code runs on tensors that hold nothing.

They are ``{"given", "calls", "result"}``: what the caller gives, in words; the calls in order; what comes of them. A
call names its ``model``, the ``prompt`` that it runs with, if any, and where its ``inputs`` of rate step come from:

- ``{"given": name}``, from the caller; with ``axis``, ``start`` and ``stop`` a part of that;
- ``{"call": k, "output": name}``, from the k-th call;
- ``{"value": […]}``, these numbers; ``{"zeros": true}``, zeros in the shape of the input.

A result is one of these, or ``{"concat": […], "axis": n}``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from helios.backend import Backend
from helios.graph import Graph
from helios.model.config import PipelineConfig, SchedulerConfig, TransformerConfig, VaeConfig
from helios.model.presets import Variant
from helios.model.vae_run import VaeRunner
from helios.model.vae_split import Split
from helios.op import accumulator
from helios.passes import Plan
from helios.pipeline.denoise import Denoiser, Guidance, Layout
from helios.precision import Precision
from helios.program import EMPTY, Context, Coverage, Program, WeightReader
from helios.sampler import CounterNoise, Schedule

__all__ = ["Call", "Calls", "chunk_calls", "decode_calls", "encode_calls"]

Call: TypeAlias = dict[str, Any]
Calls: TypeAlias = dict[str, Any]

_FEW = 16
"""Numbers that are written down as they are; a tensor of more would be a surprise."""


class _Record:
    """Tensors by where they come from. They have a shape and one element of memory."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._known: dict[int, tuple[Tensor, dict[str, Any]]] = {}

    def make(self, shape: tuple[int, ...], dtype: torch.dtype, source: dict[str, Any]) -> Tensor:
        tensor = torch.zeros(1, dtype=dtype).expand(shape)
        self._known[id(tensor)] = tensor, source  # the tensor is kept, so that no other one gets its id
        return tensor

    def source(self, tensor: Tensor) -> dict[str, Any]:
        if id(tensor) in self._known:
            return self._known[id(tensor)][1]
        if tensor.numel() <= _FEW:
            return {"value": tensor.tolist()}
        assert not bool(tensor.any()), "a tensor that no call made"
        return {"zeros": True}

    def call(self, graph: Graph, inputs: Mapping[str, dict[str, Any]], **more: Any) -> dict[str, Tensor]:
        number = len(self.calls)
        self.calls.append({"model": graph.name, **more, "inputs": dict(inputs)})
        return {
            name: self.make(value.shape, value.dtype, {"call": number, "output": name}) for name, value in graph.outputs
        }


class _Recorder(Program):
    """Notes its runs."""

    def __init__(self, plan: Plan, backend: Backend, record: _Record) -> None:
        super().__init__(plan, backend, Coverage())
        self._record = record

    def load(self, weights: WeightReader) -> None:
        """There are none."""

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        sources = {name: self._record.source(tensor) for name, tensor in inputs.items()}
        prompt = {"prompt": next(iter(context.values))} if context.values else {}
        return self._record.call(self.plan.steps[entry], sources, **prompt)


class _Paper(Backend):
    name = "paper"

    def __init__(self, record: _Record) -> None:
        super().__init__()
        self._record = record

    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        return _Recorder(plan, self, self._record)


class _GivenNoise(CounterNoise):
    """Draws that the caller gives."""

    def __init__(self, record: _Record, dtype: torch.dtype) -> None:
        super().__init__(0)
        self._record, self._dtype = record, dtype

    def latents(self, chunk: int, shape: tuple[int, ...]) -> Tensor:
        return self._record.make(shape, self._dtype, {"given": "noise"})

    def block(self, chunk: int, stage: int, shape: tuple[int, ...]) -> Tensor:
        return self._record.make(shape, self._dtype, {"given": f"noise.{stage}"})


class _NoWeights:
    def read(self, name: str) -> Tensor:
        raise AssertionError(name)


def chunk_calls(
    transformer: TransformerConfig,
    scheduler: SchedulerConfig,
    pipeline: PipelineConfig,
    layout: Layout,
    precision: Precision,
    schedule: Schedule,
    variant: Variant,
) -> Calls:
    """From noise to the latents of one chunk, in the variant's published settings.

    Given are ``noise``, normals in the shape of a chunk's latents, and ``noise.i``, those on entering stage i. With
    guidance the forwards run with the prompts ``positive`` and ``negative``, otherwise with ``positive``.
    """
    record = _Record()
    small = dataclasses.replace(transformer, num_layers=1)  # the calls do not depend on the depth
    paper = _Paper(record)
    denoiser = Denoiser(small, scheduler, pipeline, layout, precision=precision, backend=paper, weights=_NoWeights())
    nothing = torch.zeros(0)
    guided = variant.guidance > 1.0
    guidance = Guidance(
        Context({"positive": nothing}),
        Context({"negative": nothing}) if guided else None,
        variant.guidance,
        variant.zero_init,
    )
    noise = _GivenNoise(record, accumulator(precision.dtype))
    latents = denoiser.chunk(0, schedule, noise, guidance, EMPTY)
    given = {"noise": "standard normal, in the shape of the latents"}
    if scheduler.stages > 1:
        given["noise.i"] = "standard normal, on entering stage i"
    return {"given": given, "calls": record.calls, "result": record.source(latents)}


def decode_calls(config: VaeConfig, shape: tuple[int, ...], dtype: torch.dtype, split: Split) -> Calls:
    """From the latents of a chunk ``[b, z, t, h, w]`` to its frames."""
    record = _Record()
    runner = VaeRunner(config, _grouped(record, "latents"), dtype=dtype, split=split)
    for _ in runner.decode_groups(_numbered(shape)):
        pass
    given = {"latents": "of the transformer, normalised"}
    return {"given": given, "calls": record.calls, "result": _joined(record, "video")}


def encode_calls(config: VaeConfig, shape: tuple[int, ...], dtype: torch.dtype, split: Split) -> Calls:
    """From frames ``[b, 3, f, h, w]`` to the moments of their latents."""
    record = _Record()
    runner = VaeRunner(config, _grouped(record, "video"), dtype=dtype, split=split)
    runner.moments(_numbered(shape))
    given = {"video": "frames, −1 … 1"}
    return {"given": given, "calls": record.calls, "result": _joined(record, "moments")}


def _numbered(shape: tuple[int, ...]) -> Tensor:
    """A video in which each frame holds its own number, so that a part of it says which one it is."""
    frames = torch.arange(shape[2], dtype=torch.float32)
    return frames.view(1, 1, -1, 1, 1).expand(shape)


def _grouped(record: _Record, what: str) -> Any:
    def run(graph: Graph, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        frames = inputs[what][0, 0, :, 0, 0].tolist()
        part = {"given": what, "axis": 2, "start": int(frames[0]), "stop": int(frames[-1]) + 1}
        caches = {name: record.source(tensor) for name, tensor in inputs.items() if name != what}
        return record.call(graph, {what: part, **caches})

    return run


def _joined(record: _Record, output: str) -> dict[str, Any]:
    parts = [{"call": number, "output": output} for number in range(len(record.calls))]
    return parts[0] if len(parts) == 1 else {"concat": parts, "axis": 2}
