"""The tiny network's program on the recorder beside the reference's, with the same weights and inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from trt_rig import RecordedTrt, recorded
from trt_strict import Strict

from helios.backend import ReferenceBackend
from helios.graph import Graph, Rate
from helios.lower import lower
from helios.pipeline.entries import Entries
from helios.pipeline.model import Model, sized_model
from helios.precision import precision
from helios.program import Context, Program
from helios_trt.program import TrtProgram

STAGES = ("denoise.0", "denoise.1", "denoise.2")


@functools.cache
def tiny() -> Model:
    return sized_model("tiny", "distilled")


@functools.cache
def forwards(name: str = "fp32") -> Mapping[str, Graph]:
    """The transformer at its three stages."""
    given = Entries(tiny(), 64, 64, text_tokens=16, precision=precision(name), parts=("transformer",))
    return given.graphs()


@dataclasses.dataclass
class Loaded:
    """A program with weights, the recorder that it ran on, and what was called while it was loaded."""

    strict: Strict
    backend: RecordedTrt
    program: TrtProgram
    calls: list[str]


@contextmanager
def loaded(major: int, name: str = "fp32", **options: str) -> Iterator[Loaded]:
    with recorded(major) as strict:
        backend = RecordedTrt(**options)
        program = lower(forwards(name), backend)
        assert isinstance(program, TrtProgram)
        program.load(tiny().transformer_weights)
        yield Loaded(strict, backend, program, [call for call, _ in strict.calls])


@functools.cache
def reference() -> Program:
    program = lower(forwards(), ReferenceBackend())
    program.load(tiny().transformer_weights)
    return program


def drawn(program: Program, rate: Rate, seed: int) -> dict[str, Tensor]:
    """Inputs of a phase."""
    values = {v.name: v for graph in program.plan.graphs.values() for v in graph.inputs_at(rate)}
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(values[n].shape, generator=generator) for n in sorted(program.input_names(rate))}


def step(program: Program, entry: str, seed: int) -> dict[str, Tensor]:
    """Inputs of an entry."""
    generator = torch.Generator().manual_seed(seed)
    return {v.name: torch.randn(v.shape, generator=generator) for v in program.plan.graphs[entry].inputs_at(Rate.STEP)}


def context(program: Program, seed: int = 0) -> Context:
    return program.bind(drawn(program, Rate.PROMPT, seed)) | program.bind(drawn(program, Rate.CHUNK, seed + 1))


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
