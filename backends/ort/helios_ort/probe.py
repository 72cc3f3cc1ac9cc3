"""What a provider runs, asked of ONNX Runtime itself: sessions of one node, and tiny networks in each precision."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios.graph import Builder, Graph, Node, Rate
from helios.precision import DTYPES
from helios_ort.dialect import forms
from helios_ort.providers import CPU, Provider
from helios_ort.sessions import Refused, build

__all__ = ["PRECISIONS", "idle", "supports", "withheld", "written_for"]

PRECISIONS = ("fp32", "bf16", "fp16")
"""Which a provider may offer, its default first. Quantised products have no form in ONNX."""

OPSETS = (23, 20, 18)
"""Those that change how Helios' ops are written: 23 brought attention and RMSNorm, 20 GELU."""

_WIDENED = f"{CPU}: most float16 kernels are missing; ONNX Runtime puts casts to float32 and back around such nodes"
# Seen in the optimised model (ONNX Runtime 1.31.1: InsertedPrecisionFreeCast around Gemm and Add); placement hides it.

_answers: dict[tuple[Any, ...], str | None] = {}


def supports(node: Node, provider: Provider) -> str | None:
    """Why the provider does not run a node, in its own words; ``None`` if it does.

    A session of this one node is made, and nothing in it is computed or allocated: every operand is an input.
    """
    from helios.export.forms import unsupported

    reason = unsupported(node, forms(provider))
    if reason is not None:
        return reason
    types = tuple(tuple(v.type for v in x) if isinstance(x, tuple) else x and x.type for x in node.inputs)
    key = (provider, node.op, types, node.attrs)
    if key not in _answers:
        _answers[key] = _refusal(node, provider)
    return _answers[key]


def _refusal(node: Node, provider: Provider) -> str | None:
    inputs = {value.name: value for value in node.values}
    graph = Graph("node", tuple(inputs.values()), (node,), tuple((value.name, value) for value in node.outputs))
    try:
        session = build(graph, provider, optimise=False)
    except Refused as error:
        return error.why
    if session.misplaced:
        found = session.misplaced[0]
        return f"{provider.name} does not run {found.kind}: ONNX Runtime gives it to {found.provider}"
    return None


@functools.cache
def written_for(provider: Provider) -> Provider:
    """The provider with the opset of ONNX in which it runs most; the newest of several.

    Newer opsets have attention and RMSNorm as single ops, which not every provider knows.
    """
    written = [dataclasses.replace(provider, opset=opset) for opset in OPSETS]
    return min(written, key=lambda candidate: len(_refusals(candidate, "fp32")))


def idle(provider: Provider) -> str | None:
    """Why it runs nothing at all: one of its refusals, where all kinds of arithmetic are refused; else ``None``."""
    refusals = _refusals(provider, "fp32")
    return refusals[0] if len(refusals) == len(_network(torch.float32).nodes) else None


def withheld(provider: Provider) -> Mapping[str, str]:
    """Why the provider does not compute in a precision, by name, of those in which it does not.

    fp32 is always offered: a node that does not run in it is told by name, when a graph has one.
    """
    found = {name: _refusals(provider, name) for name in PRECISIONS[1:]}
    if provider.name == CPU and not found["fp16"]:
        found["fp16"] = (_WIDENED,)
    return {name: reasons[0] for name, reasons in found.items() if reasons}


@functools.cache
def _refusals(provider: Provider, name: str) -> tuple[str, ...]:
    """The reasons of the nodes of a tiny network that the provider does not run in a precision."""
    answers = (supports(node, provider) for node in _network(DTYPES[name]).nodes)
    return tuple(told if provider.name in told else f"{provider.name}: {told}" for told in answers if told is not None)


def _network(dtype: torch.dtype) -> Graph:
    """Each kind of arithmetic that a run needs, as small as can be."""
    with Builder("probe") as build:
        x = build.input("x", (1, 4, 8), dtype, Rate.STEP)
        weight = build.input("weight", (8, 8), dtype, Rate.WEIGHTS)
        y = op.get("gelu")(op.get("linear")(op.get("rms_norm")(x), weight))
        heads = op.get("split_heads")(y, heads=2)
        z = op.get("reshape")(op.get("attention")(heads, heads, heads), shape=(1, 4, 8))
        build.output("y", op.get("add")(op.get("layer_norm")(z), x))
    return build.graph()
