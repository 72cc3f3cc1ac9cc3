"""The pipeline under the clock: its model with weights drawn from the run's root, its prompts, its requests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from helios.backend import Backend
from helios.errors import InputError
from helios.model.random_weights import spread
from helios.model.safetensors_io import TensorInfo
from helios.model.shapes import keeps_float32, transformer_shapes, vae_shapes
from helios.pipeline.codec import free_memory
from helios.pipeline.model import Model, folder_model, sized_model
from helios.pipeline.pipeline import Pipeline
from helios.pipeline.request import Request
from helios.pipeline.run import Chunk
from helios.pipeline.state import RunState
from helios_conformance.draws import Root, normal
from helios_conformance.realtime.options import Options
from helios_conformance.session import Session

__all__ = ["DrawnWeights", "Scene", "drawn_model", "open_scene", "prompt_of", "refusal", "seed_of"]

ENDLESS = 1_000_000
"""Chunks that a request names where the clock decides when it is enough."""

# fmt: off
_WORDS = (
    "river", "mountain", "lantern", "glass", "copper", "orchard", "harbour", "violin", "thunder", "meadow",
    "falcon", "marble", "canyon", "velvet", "compass", "willow", "ember", "tunnel", "saffron", "glacier",
    "carousel", "anchor", "puppet", "cathedral", "sparrow", "monsoon", "pebble", "tram", "dune", "orchid",
    "slowly", "brightly", "under", "above", "beside", "turning", "drifting", "glowing", "falling", "dancing",
    "waiting", "burning",
)
# fmt: on


class DrawnWeights:
    """Seeded normal weights of stated scale, a ``WeightSource``: keyed by the run's root, the same bits on every host.

    Distributions are those of ``helios.model.random_weights.spread``.

    Args:
        shapes: name -> shape.
        root, label: what keys the draws.
        dtype: of a tensor, by its name.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], root: Root, label: str, dtype: Callable[[str], torch.dtype]
    ) -> None:
        self.root, self.label = root, label
        self.tensors: Mapping[str, TensorInfo] = {n: TensorInfo(tuple(s), dtype(n)) for n, s in shapes.items()}
        self.origin = (
            f"random weights of suite seed {root.seed}: normal, matrices of deviation 1/√fan-in, norms 1 ± 0.1"
        )

    def read(self, name: str) -> Tensor:
        info = self.tensors[name]
        mean, deviation = spread(name, info.shape)
        return normal(self.root.key(self.label, name), info.shape, info.dtype, deviation, mean)

    def where(self, name: str) -> str:
        """The origin: there is no file."""
        return self.origin


def drawn_model(size: str, variant: str, root: Root) -> Model:
    """A model of a named size with weights from the root: unknown before the run begins."""
    model = sized_model(size, variant)
    transformer = DrawnWeights(
        transformer_shapes(model.transformer),
        root,
        "realtime transformer",
        lambda name: torch.float32 if keeps_float32(name) else torch.bfloat16,
    )
    vae = DrawnWeights(vae_shapes(model.vae), root, "realtime vae", lambda name: torch.float32)
    contents = f"{size} {variant} {root.seed} {root.nonce}".encode()
    return dataclasses.replace(
        model,
        name=f"{size} {variant}, {transformer.origin}",
        transformer_weights=transformer,
        vae_weights=vae,
        contents=lambda: contents,
    )


def prompt_of(root: Root, *labels: object) -> str:
    """Twenty words drawn from the root."""
    key = root.key("realtime prompt", *labels)
    return " ".join(_WORDS[(key >> (6 * i)) % len(_WORDS)] for i in range(20))


def seed_of(root: Root, *labels: object) -> int:
    """The seed of a video, below 2⁶³."""
    return root.key("realtime seed", *labels) >> 65


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """A loaded pipeline and how videos are asked of it."""

    pipeline: Pipeline
    options: Options
    origin: str
    """Of the weights: ``random`` or ``checkpoint``."""

    def request(self, prompt: str, seed: int, steps: Sequence[int], chunks: int = ENDLESS) -> Request:
        """A video of these prompts and steps, in the size of the options."""
        o = self.options
        return self.pipeline.request(
            prompt,
            seed=seed,
            steps=tuple(steps),
            height=o.height,
            width=o.width,
            max_sequence_length=o.tokens,
            chunks=chunks,
        )

    def stream(
        self, prompt: str, seed: int, steps: Sequence[int], chunks: int = ENDLESS, state: RunState | None = None
    ) -> Iterator[Chunk]:
        return self.pipeline.run(self.request(prompt, seed, steps, chunks), state)


@dataclasses.dataclass(slots=True)
class _Slot:
    """The scene in use: loading 14B takes minutes, and several cases film in the same one. Never two at a time."""

    key: tuple[object, ...] = ()
    scene: Scene | None = None


_slot = _Slot()


def open_scene(session: Session, precision: str, variant: str) -> Scene:
    """The scene of a session's options, loaded when the first video is made; kept until another one is asked for.

    Raises:
        InputError: the weights alone are more than the device has free; no kernel has run then.
    """
    options = Options.of(session.options)
    key = (session.backend, session.root, session.model, session.fallback, precision, variant, options.size)
    if _slot.scene is not None and _slot.key == key:
        return dataclasses.replace(_slot.scene, options=options)
    _slot.key, _slot.scene = (), None  # free the weights before others are loaded
    model = drawn_model(options.size, variant, session.root)
    if session.model is not None:
        model = folder_model(session.model, variant)
    if why := _no_room(session.backend, model, session.dtype(precision)):
        raise InputError(why, ROOM)
    pipeline = Pipeline(model, session.backend, precision, session.fallback)
    scene = Scene(pipeline, options, "checkpoint" if session.model else "random")
    _slot.key, _slot.scene = key, scene
    return scene


def refusal(session: Session, precision: str, variant: str) -> str:
    """Why there can be no scene on this device, before anything has run; empty where there can."""
    if session.model is not None or session.backend in _slot.key:
        return ""
    model = drawn_model(Options.of(session.options).size, variant, session.root)
    why = _no_room(session.backend, model, session.dtype(precision))
    return f"{why}; {ROOM}" if why else ""


ROOM = "--size mini exercises the level; such figures are none of the published size"


def _no_room(backend: Backend, model: Model, dtype: torch.dtype) -> str:
    needed = sum(
        math.prod(info.shape) * max(dtype.itemsize, 4 if keeps_float32(name) else 0)
        for name, info in model.transformer_weights.tensors.items()
    )
    free = free_memory(backend)
    if needed <= free:
        return ""
    return f"the weights take {needed / 1e9:.1f} GB, and backend {backend.label!r} has {free / 1e9:.1f} GB free"
