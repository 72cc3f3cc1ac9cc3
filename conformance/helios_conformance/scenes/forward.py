"""Forwards of the transformer: one or several pyramid stages of any size, as the entries of one program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from helios.graph import Graph, Value
from helios.model.config import TransformerConfig
from helios.model.shapes import transformer_shapes
from helios.model.transformer import DenoiseShape, HistoryShape, denoise_graph
from helios.op import accumulator
from helios.pipeline.history import Window
from helios_conformance.draws import Root, normal
from helios_conformance.golden import Call, Calls, InPrecision
from helios_conformance.scenes.weights import LoudWeights, Spread, loud

__all__ = ["Forward", "held_back", "text_of"]

_TIMESTEPS = (999.0, 512.0, 3.0, 761.0)
"""Of call after call, and of video after video."""


@dataclasses.dataclass(frozen=True)
class Forward(InPrecision):
    """Forwards of a transformer, once a stage and prompt.

    Attributes:
        label: keys the draws, with the shapes.
        config: of the network.
        height, width: of the latents at full size.
        halvings: of the stages, entry by entry: (2, 1, 0) are the published three.
        tokens: of the prompt; the last third is zero, as padding is.
        batch: videos.
        history: whether there is a past; ``keep_first_frame`` as in ``Window``.
        prompts: bound side by side, and used in turns.
        hidden: blocks after which the residual stream is an output too, ``hidden.N``.
        spread: of the weights.
        late: how many of the timesteps are left out at the beginning: the third is 3, whose embedding float32 has to
            the last digit, while of 999 it has five.
    """

    label: str
    config: TransformerConfig
    height: int
    width: int
    halvings: tuple[int, ...] = (0,)
    tokens: int = 16
    batch: int = 1
    history: bool = True
    keep_first_frame: bool = True
    prompts: int = 1
    hidden: tuple[int, ...] = ()
    spread: Spread = loud
    late: int = 0

    forced = False

    @property
    def window(self) -> Window:
        return Window(keep_first_frame=self.keep_first_frame)

    def graphs(self, dtype: torch.dtype) -> Mapping[str, Graph]:
        made: dict[str, Graph] = {}
        for halving in self.halvings:
            size = DenoiseShape(
                self.height >> halving,
                self.width >> halving,
                self.tokens,
                self.window.indices,
                HistoryShape(self.height, self.width) if self.history else None,
                self.batch,
            )
            name = f"stage{len(made)}"
            made[name] = held_back(denoise_graph(self.config, size, dtype=dtype, name=name), self.hidden)
        return made

    def weights(self, dtype: torch.dtype) -> LoudWeights:
        return LoudWeights(transformer_shapes(self.config), f"{self.label} weights", dtype, self.spread)

    def calls(self, root: Root, dtype: torch.dtype) -> Calls:
        """Every stage with every prompt, prompts in the inner loop, so that each follows another."""
        wide = accumulator(dtype)
        past = self._past(root, dtype)
        for at, halving in enumerate(self.halvings):
            shape = (self.batch, self.config.in_channels, 9, self.height >> halving, self.width >> halving)
            for prompt in range(self.prompts):
                where = at + prompt + self.late
                time = [_TIMESTEPS[(where + video) % len(_TIMESTEPS)] for video in range(self.batch)]
                inputs = {
                    "sample": normal(root.key(self.label, "sample", at, prompt), shape, dtype),
                    "timestep": torch.tensor(time, dtype=wide),
                }
                size = (self.batch, self.tokens, self.config.text_dim)
                bound = {f"prompt{prompt}": {"text": text_of(root, self.label, str(prompt), size, dtype)}, **past}
                yield Call(f"stage{at}" if self.prompts == 1 else f"stage{at}.p{prompt}", f"stage{at}", inputs, bound)

    def _past(self, root: Root, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
        if not self.history:
            return {}
        frame = (self.batch, self.config.in_channels)
        size = (self.height, self.width)
        history = normal(root.key(self.label, "history"), (*frame, self.window.length, *size), dtype)
        anchor = normal(root.key(self.label, "anchor"), (*frame, 1, *size), dtype)
        return {"history": self.window.inputs(history, anchor)}


def text_of(root: Root, label: str, prompt: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """An embedding ``[b, tokens, dim]`` whose last third is the padding: zeros, which are attended like any token."""
    text = normal(root.key(label, "text", prompt), shape, dtype)
    text[:, shape[1] - shape[1] // 3 :] = 0.0
    return text


def held_back(graph: Graph, blocks: tuple[int, ...]) -> Graph:
    """The graph with the residual stream after these blocks among its outputs, ``hidden.N``.

    A block ends with the third of its residual additions.
    """
    sums: list[Value] = [node.outputs[0] for node in graph.nodes if node.op == "gated_add"]
    more = tuple((f"hidden.{block}", sums[3 * block + 2]) for block in blocks)
    return dataclasses.replace(graph, outputs=graph.outputs + more)
