"""What of a model runs on a device, as graphs by entry, and the calls that make a chunk of them.

For those who take graphs away to run them elsewhere: here is what the pipeline runs, and in which order, as data.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from helios.errors import InputError, unknown_name
from helios.graph import Graph
from helios.model.vae import frames_of
from helios.model.vae_run import decode_graphs, encode_graphs
from helios.model.vae_split import Split
from helios.passes import Plan, build_plan, expand, prune
from helios.pipeline.calls import Calls, chunk_calls, decode_calls, encode_calls
from helios.pipeline.denoise import Layout, denoise_graphs
from helios.pipeline.history import CHUNK_LATENTS, Window
from helios.pipeline.model import Model
from helios.precision import Precision, precision
from helios.sampler import build_schedule, pyramid_tokens

__all__ = ["PARTS", "BothWeights", "Entries", "short_name"]

PARTS = ("transformer", "sampler", "vae-decoder", "vae-encoder")
"""What can be taken: the forwards; the steps of solver and guidance and the changes of stage; the halves of the VAE."""

Graphs: TypeAlias = dict[str, Graph]


class BothWeights:
    """The weights of the transformer and the VAE in one reader; no name is in both."""

    def __init__(self, model: Model) -> None:
        self._sources = (model.transformer_weights, model.vae_weights)

    def read(self, name: str) -> Tensor:
        source = next(source for source in self._sources if name in source.tensors)
        return source.read(name)


@dataclasses.dataclass(frozen=True, slots=True)
class Entries:
    """Some parts of a model at one size.

    Args:
        model: of which configs are read, and no weight.
        height, width: of the video in pixels.
        batch: videos that run together.
        text_tokens: length of a prompt's embedding.
        precision: of the transformer.
        parts: names of ``PARTS``.
        stage: of the pyramid, alone; ``None`` takes all.
        decoding: dtype of the VAE's decoder; the encoder is in float32.
        group: latents that the VAE takes at a time.

    Raises:
        InputError: no such part, precision or stage, or pixels that do not divide as the model needs.
    """

    model: Model
    height: int = 384
    width: int = 640
    batch: int = 1
    text_tokens: int = 512
    precision: Precision = dataclasses.field(default_factory=lambda: precision("bf16"))
    parts: Sequence[str] = PARTS[:2]
    stage: int | None = None
    decoding: torch.dtype = torch.float32
    group: int = 3

    def __post_init__(self) -> None:
        for name in self.parts:
            if name not in PARTS:
                raise InputError(unknown_name("part", name, PARTS), f"--part with one of {', '.join(PARTS)}")
        for name in ("batch", "text_tokens", "group"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, wanted at least 1")
        self._require_pixels()
        if self.stage is not None and not 0 <= self.stage < self.stages:
            last = self.stages - 1
            known = f"stages 0 to {last}" if last else "one stage, 0, at the full size"
            raise InputError(f"{self.model.name} has no pyramid stage {self.stage}: it has {known}")

    def _require_pixels(self) -> None:
        multiple = self.multiple
        if min(self.height, self.width) < multiple or self.height % multiple or self.width % multiple:
            near = [max(multiple, round(side / multiple) * multiple) for side in (self.height, self.width)]
            raise InputError(
                f"{self.height}×{self.width} pixels: {self.model.name} needs multiples of {multiple}",
                f"--height {near[0]} --width {near[1]}",
            )

    @property
    def stages(self) -> int:
        """Of the pyramid."""
        return self.model.scheduler.stages

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this: whole patches even at the coarsest stage."""
        patch = math.lcm(*self.model.transformer.patch_size[1:])
        return self.model.vae.scale_factor_spatial * patch * (1 << (self.stages - 1))

    @property
    def layout(self) -> Layout:
        """As the denoiser's graphs are made for it."""
        factor = self.model.vae.scale_factor_spatial
        return Layout(self.batch, self.height // factor, self.width // factor, self.text_tokens, Window())

    @property
    def whole(self) -> bool:
        """Whether everything is there that turns noise into latents."""
        return self.stage is None and {"transformer", "sampler"} <= set(self.parts)

    def graphs(self) -> Graphs:
        """Every graph by entry name, in the order of use."""
        found = self._denoising()
        if "vae-decoder" in self.parts:
            found |= self._decoding()
        if "vae-encoder" in self.parts:
            found |= self._encoding()
        return {short_name(name): dataclasses.replace(graph, name=short_name(name)) for name, graph in found.items()}

    def plan(self, *, local_constants: bool = False) -> Plan:
        """The graphs in core ops, split into phases; see ``build_plan``."""
        core = {name: expand(prune(graph)[0])[0] for name, graph in self.graphs().items()}
        return build_plan(core, local_constants=local_constants)

    def _denoising(self) -> Graphs:
        kinds = {"transformer": ("denoise",), "sampler": ("shrink", "enter", "guide", "step")}
        wanted = [kind for part in self.parts for kind in kinds.get(part, ())]
        if not wanted:
            return {}
        model = self.model
        made = denoise_graphs(model.transformer, model.scheduler, model.pipeline, self.layout, self.precision)
        stages = range(self.stages) if self.stage is None else (self.stage,)
        names = ["shrink"] if 0 in stages else []
        names += [f"{kind}.{i}" for i in stages for kind in ("enter", "denoise", "guide", "step")]
        return {name: made[name] for name in names if name in made and name.partition(".")[0] in wanted}

    def _decoding(self) -> Graphs:
        size = {"batch": self.batch, "height": self.height, "width": self.width}
        return decode_graphs(
            self.model.vae, **size, latents=CHUNK_LATENTS, dtype=self.decoding, split=Split(self.group)
        )

    def _encoding(self) -> Graphs:
        size = {"batch": 1, "height": self.height, "width": self.width}
        found: Graphs = {}
        for frames in self._encoded.values():
            found |= encode_graphs(self.model.vae, **size, frames=frames, dtype=torch.float32, split=Split(self.group))
        return found

    @property
    def _encoded(self) -> dict[str, int]:
        """Frames of what is encoded: a picture, and a section of a video."""
        section = frames_of(self.model.vae, CHUNK_LATENTS)
        return {"encode_image": 1, "encode_video": section}

    def programs(self) -> dict[str, Calls]:
        """The calls of the parts that are there, by what they are for: ``chunk`` (and ``first_chunk`` where that one
        has other steps), ``decode``, ``encode_image``, ``encode_video``; in the variant's published settings."""
        found: dict[str, Calls] = {}
        if self.whole:
            found["chunk"] = self._chunk(first=False)
            if self.model.variant.amplify_first_chunk:
                found["first_chunk"] = self._chunk(first=True)
        vae, split, factor = self.model.vae, Split(self.group), self.model.vae.scale_factor_spatial
        if "vae-decoder" in self.parts:
            latents = (self.batch, vae.z_dim, CHUNK_LATENTS, self.height // factor, self.width // factor)
            found["decode"] = decode_calls(vae, latents, self.decoding, split)
        if "vae-encoder" in self.parts:
            for name, frames in self._encoded.items():
                video = (1, vae.in_channels, frames, self.height, self.width)
                found[name] = encode_calls(vae, video, torch.float32, split)
        for made in found.values():
            for call in made["calls"]:
                call["model"] = short_name(call["model"])
        return found

    def _chunk(self, *, first: bool) -> Calls:
        model, layout = self.model, self.layout
        config, patch = model.scheduler, model.transformer.patch_size
        tokens = pyramid_tokens(CHUNK_LATENTS, layout.height, layout.width, config.stages, patch)
        schedule = build_schedule(config, model.variant.steps, tokens, amplify=first)
        return chunk_calls(model.transformer, config, model.pipeline, layout, self.precision, schedule, model.variant)


def short_name(name: str) -> str:
    """A graph's name without the sizes that all graphs of an export share.

    >>> short_name("vae_decode_next_1x3x384x640"), short_name("denoise.2")
    ('vae_decode_next_3', 'denoise.2')
    """
    return re.sub(r"_\d+x(\d+)x\d+x\d+$", r"_\1", name)
