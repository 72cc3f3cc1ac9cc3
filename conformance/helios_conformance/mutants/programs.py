"""Right kernels in a wrong program: stale contexts, replayed results, a graph rewritten for the worse."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from helios.backend import Backend
from helios.graph import Graph, Node, Rate, Value
from helios.model.vae import CACHE
from helios.passes import Plan
from helios.program import EMPTY, Context, Program, WeightReader
from helios_conformance.mutants.mutant import FP32, Mutant, backend_with, program_with

__all__ = ["MUTANTS"]


class _FirstPrompt(Program):
    """Text keys and values are computed once."""

    _held: Context | None = None

    def bind(self, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> Context:
        if self.phase_of(inputs) != Rate.PROMPT:
            return super().bind(inputs, context)
        self._held = self._held or super().bind(inputs, context)
        return self._held


class _FirstHistory(Program):
    _held: Context | None = None

    def bind(self, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> Context:
        if self.phase_of(inputs) != Rate.CHUNK:
            return super().bind(inputs, context)
        self._held = self._held or super().bind(inputs, context)
        return self._held


class _SharedContext(Program):
    """There is room for one prompt: a second one overwrites what the first context holds."""

    _held: Context | None = None

    def bind(self, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> Context:
        made = super().bind(inputs, context)
        if self.phase_of(inputs) != Rate.PROMPT:
            return made
        if self._held is None:
            self._held = Context({name: tensor.clone() for name, tensor in made.values.items()})
        for name, tensor in self._held.values.items():
            tensor.copy_(made.values[name])
        return self._held


class _Replayed(Program):
    """From the fourth call of an entry on the results of the first three come again."""

    _results: dict[str, list[dict[str, Tensor]]] | None = None
    _calls: collections.Counter[str] | None = None

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        self._results = {} if self._results is None else self._results
        self._calls = collections.Counter() if self._calls is None else self._calls
        held = self._results.setdefault(entry, [])
        self._calls[entry] += 1
        if len(held) < 3:
            held.append(super().run(entry, inputs, context))
            return dict(held[-1])
        return dict(held[self._calls[entry] % 3])


class _SkippedSteps(Program):
    """Every second call of an entry returns the result of the call before: a step cache that nobody asked for."""

    _last: dict[str, dict[str, Tensor]] | None = None

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        self._last = {} if self._last is None else self._last
        if entry in self._last:
            return self._last.pop(entry)
        self._last[entry] = super().run(entry, inputs, context)
        return dict(self._last[entry])


class _Autotunes(Program):
    """From the thirteenth call of an entry on another kernel is taken, which sums in another order."""

    _calls: collections.Counter[str] | None = None

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        self._calls = collections.Counter() if self._calls is None else self._calls
        self._calls[entry] += 1
        outputs = super().run(entry, inputs, context)
        if self._calls[entry] > 12 and "velocity" in outputs:
            velocity = outputs["velocity"].clone()
            last = velocity.flatten()[::7]
            velocity.view(-1)[::7] = torch.nextafter(last, torch.zeros_like(last))
            outputs["velocity"] = velocity
        return outputs


class _LazyHistory(Program):
    """The history of the bind before last is used: uploads are not waited for."""

    _before: Context | None = None

    def bind(self, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> Context:
        made = super().bind(inputs, context)
        if self.phase_of(inputs) != Rate.CHUNK:
            return made
        given, self._before = self._before or made, made
        return given


class _NoCaches(Program):
    """The VAE begins every group of frames as if it were the first."""

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        empty = {name: torch.zeros_like(t) if name.startswith(CACHE) else t for name, t in inputs.items()}
        return super().run(entry, empty, context)


class _LastFrameDropped(Program):
    """The last frame of a group is the one before, shown twice."""

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        outputs = super().run(entry, inputs, context)
        if "video" in outputs and outputs["video"].shape[2] > 1:
            video = outputs["video"].clone()
            video[:, :, -1] = video[:, :, -2]
            outputs["video"] = video
        return outputs


class _LoadsOnce(Program):
    """A second load is taken for done."""

    def load(self, weights: WeightReader) -> None:
        if not self._loaded:
            super().load(weights)


class _BatchInTurn(Program):
    """Of a batch of prompts, each video reads the next one's."""

    def bind(self, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> Context:
        rolled = {name: t.roll(1, 0) if self.phase_of(inputs) == Rate.PROMPT else t for name, t in inputs.items()}
        return super().bind(rolled, context)


class _NarrowPlace(Program):
    """Everything passes through bfloat16 on its way to the device."""

    def place(self, tensor: Tensor, value: Value, owner: str = "the graph") -> Tensor:
        narrow = tensor.bfloat16() if tensor.is_floating_point() else tensor
        return super().place(narrow.to(tensor.dtype), value, owner)


class _AnyShape(Program):
    """Inputs of other shapes are bent until they fit."""

    def place(self, tensor: Tensor, value: Value, owner: str = "the graph") -> Tensor:
        if tuple(tensor.shape) != value.shape:
            tensor = tensor.flatten().resize_(value.type.numel).reshape(value.shape)
        return super().place(tensor, value, owner)


Rewrite = Callable[[Graph, int, Node], Node]


def _rewritten(change: Rewrite) -> Callable[[Backend], Backend]:
    """Backends that compile other nodes than they were given."""

    def graph(of: Graph) -> Graph:
        return dataclasses.replace(of, nodes=tuple(change(of, i, node) for i, node in enumerate(of.nodes)))

    class Compiling(Backend):
        def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
            phases = {rate: graph(g) for rate, g in plan.phases.items()}
            steps = {name: graph(g) for name, g in plan.steps.items()}
            return super().compile(Plan(phases, steps), fallback=fallback)

    return lambda backend: backend_with(backend, Compiling, fusions=())


def _with_attrs(node: Node, **attrs: Any) -> Node:
    return dataclasses.replace(node, attrs=tuple(sorted((node.attributes | attrs).items())))


def _feeds(of: Graph, node: Node, part: str) -> bool:
    return any(part in v.name for v in node.values)


def _bias_of_one_layer(of: Graph, i: int, node: Node) -> Node:
    if node.op != "linear" or not _feeds(of, node, "blocks.1.attn1.to_out"):
        return node
    return dataclasses.replace(node, inputs=(*node.inputs[:2], None))


def _gate_of_one_layer(of: Graph, i: int, node: Node) -> Node:
    """Of the second gated residual in a graph."""
    gated = [n for n in of.nodes if n.op == "gated_add" and n.inputs[2] is not None]
    if len(gated) < 2 or node is not gated[1]:
        return node
    return dataclasses.replace(_with_attrs(node, gate_split=0), inputs=(*node.inputs[:2], None))


def _scale_of_text(of: Graph, i: int, node: Node) -> Node:
    """Attention whose keys are not as many as its queries is cross-attention here."""
    if node.op != "attention" or node.values[0].shape[1] == node.values[1].shape[1]:
        return node
    return _with_attrs(node, scale=1.1 * node.values[0].shape[-1] ** -0.5)


def _late_frames(of: Graph, i: int, node: Node) -> Node:
    frames = node.attributes.get("frames")
    if node.op != "rope_table" or not isinstance(frames, tuple) or len(frames) < 3 or frames[0] == 1:
        return node
    return _with_attrs(node, frames=tuple(int(f) + 1 for f in frames))  # type: ignore[arg-type]


def _pool_first(of: Graph, i: int, node: Node) -> Node:
    """Tables of pooled history take other frequencies."""
    if node.op != "rope_table" or node.attributes["pool"] == (1, 1, 1):
        return node
    return _with_attrs(node, theta=5e3)


def _larger_eps(of: Graph, i: int, node: Node) -> Node:
    return _with_attrs(node, eps=1e-3) if node.op in ("layer_norm", "rms_norm") else node


def _zero_timestep_one(of: Graph, i: int, node: Node) -> Node:
    """History's timestep 0 is compiled in as 1."""
    return _with_attrs(node, value=1.0) if node.op == "full" else node


def _mutant(name: str, wrong: str, apply: Callable[[Backend], Backend], level: Any, **told: Any) -> Mutant:
    return Mutant(name, wrong, "programs", apply, level, **told)


MUTANTS: tuple[Mutant, ...] = (
    _mutant(
        "text_stale",
        "Text keys and values are computed for the first prompt only.",
        program_with(_FirstPrompt),
        "model",
    ),
    _mutant(
        "text_overwritten",
        "A second prompt overwrites the first one's context.",
        program_with(_SharedContext),
        "model",
    ),
    _mutant(
        "text_of_neighbour", "In a batch each video reads another one's prompt.", program_with(_BatchInTurn), "model"
    ),
    _mutant("history_stale", "History is embedded for the first chunk only.", program_with(_FirstHistory), "model"),
    _mutant("history_late", "Each chunk reads the history of the chunk before.", program_with(_LazyHistory), "model"),
    _mutant("results_replayed", "Results of the first calls come again.", program_with(_Replayed), "model"),
    _mutant(
        "steps_skipped",
        "Every second step returns the velocity of the step before.",
        program_with(_SkippedSteps),
        "model",
    ),
    _mutant("vae_cache_lost", "Groups of frames do not see the frames before.", program_with(_NoCaches), "blocks"),
    _mutant(
        "last_frame_dropped",
        "The last frame of a group is the one before, shown twice.",
        program_with(_LastFrameDropped),
        "blocks",
    ),
    _mutant(
        "bits_change_when_warm",
        "After twelve calls another kernel is taken, with other last bits.",
        program_with(_Autotunes),
        "pipeline",
    ),
    _mutant("second_load_ignored", "A second load of weights changes nothing.", program_with(_LoadsOnce), "model"),
    _mutant(
        "transfers_bfloat16",
        "Transfers to the device pass through bfloat16.",
        program_with(_NarrowPlace),
        "ops",
        precisions=FP32,
    ),
    _mutant("any_shape_taken", "Inputs of another shape are bent until they fit.", program_with(_AnyShape), "ops"),
    _mutant(
        "bias_of_one_layer", "One projection of the second block has no bias.", _rewritten(_bias_of_one_layer), "blocks"
    ),
    _mutant("gate_of_one_layer", "One residual is added without its gate.", _rewritten(_gate_of_one_layer), "blocks"),
    _mutant("scale_of_text", "Cross-attention takes a scale of 1.1 d^-1/2.", _rewritten(_scale_of_text), "blocks"),
    _mutant("frames_one_late", "Noisy frames are placed one frame late.", _rewritten(_late_frames), "blocks"),
    _mutant("history_frequencies", "Tables of pooled history take theta = 5e3.", _rewritten(_pool_first), "blocks"),
    _mutant("epsilon_compiled_in", "Norms are compiled with an epsilon of 1e-3.", _rewritten(_larger_eps), "ops"),
    _mutant(
        "history_timestep_one",
        "History's timestep is compiled in as 1, not 0.",
        _rewritten(_zero_timestep_one),
        "blocks",
    ),
)
