"""A whole forward with quantised products and attention by the CUDA backend's kernels, in the interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

from helios.backend import Backend, ReferenceBackend, select
from helios.graph import Rate
from helios.lower import lower
from helios.model import presets
from helios.model.random_weights import RandomWeights
from helios.model.transformer import DenoiseShape, HistoryShape, denoise_graph, frame_indices
from helios.passes import quantize
from helios.precision import precision

SHAPE = DenoiseShape(4, 4, 5, frame_indices((4, 2, 1), 2), HistoryShape(8, 8))
QUANTISED = {"adaln_quantize", "gelu_quantize", "quantized_attention", "quantized_linear", "quantized_qkv_linear"}


def velocity(backend: Backend, name: str) -> tuple[Tensor, frozenset[str]]:
    """What a forward in a precision gives, and the ops that ran as one kernel."""
    asked = precision(name)
    graph = denoise_graph(presets.size("tiny").transformer, SHAPE, dtype=asked.dtype)
    program = lower({"main": quantize(graph, asked)[0]}, backend)
    program.load(RandomWeights({name: v.shape for name, v in program.weight_inputs().items()}, seed=0))
    draw = torch.Generator().manual_seed(1)
    values = {v.name: v for one in program.plan.graphs.values() for v in one.inputs}

    def inputs(rate: Rate) -> dict[str, Tensor]:
        return {n: torch.randn(values[n].shape, generator=draw) for n in sorted(program.input_names(rate))}

    context = program.bind(inputs(Rate.PROMPT))
    context = context | program.bind(inputs(Rate.CHUNK), context)
    step = {"sample": torch.randn(values["sample"].shape, generator=draw), "timestep": torch.tensor([500.0])}
    fused = frozenset(name for name, counts in program.coverage.counts.items() if counts["fused"])
    return program.run("main", step, context)["velocity"].double(), fused


def error(out: Tensor, wanted: Tensor) -> float:
    return float((out - wanted).norm() / wanted.norm())


def test_a_forward_with_quantised_attention_errs_as_the_bodies_do() -> None:
    """Measured here: 0.0283 of the velocity, where the bodies of the ops err with 0.0276."""
    ours, fused = velocity(select("cuda:interpret"), "fp8-attention")
    wanted, _ = velocity(ReferenceBackend(), "fp32")
    body, _ = velocity(ReferenceBackend(), "fp8-attention")
    assert fused >= QUANTISED
    assert 0.01 < error(ours, wanted) < 1.25 * error(body, wanted)
