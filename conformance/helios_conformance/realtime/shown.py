"""The frames of a timed chunk against float64's decoding of that chunk's own latents, as at level pipeline.

The autoencoder is causal: the first frames of a chunk depend on its first latents alone. As many are decoded as a host
can afford: all nine of a small picture, one at the published size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from helios import op
from helios.errors import InputError
from helios.fit.costs import LATENT_FRAMES
from helios.model import presets
from helios.model.vae import decode_graph, frames_of
from helios.model.vae_split import Split, Tile
from helios.pipeline.codec import split_of
from helios.pipeline.run import Chunk
from helios_conformance import budget, selection
from helios_conformance.case import Case, Judged, Kept, Observation
from helios_conformance.draws import Root
from helios_conformance.frames import Right, allowed_in, right_frames
from helios_conformance.frames import judge as judge_frames
from helios_conformance.realtime.film import frame_digests
from helios_conformance.realtime.options import Options
from helios_conformance.realtime.scene import drawn_model

__all__ = ["LABEL", "affordable", "drawn", "judge", "keep"]

LABEL = "shown"

AFFORDABLE = 3e12
"""FLOP of the oracle; the first latent at 384×640 takes 2.7e12, a third of them on the zeros before it. Of a decoder in
16 bits as many more, for rounded operations."""


def drawn(root: Root, case: str, last: str, count: int) -> int:
    """The chunk that is looked at, from the digest of the run's last latents."""
    return root.key("shown", case, last) % max(count, 1)


def affordable(options: Options, plan: Mapping[str, Any]) -> tuple[int, Split]:
    """How many latents the oracle decodes, 0 where even one is too much, and how they are cut.

    Raises:
        InputError: tiles that the pipeline would not choose.
    """
    tile = split_of(plan).tile
    if tile not in (None, Tile()):
        raise InputError(f"frames were decoded in tiles of {plan['tile']} pixels; a pipeline takes {Tile().size}")
    count = _affordable(options.size, options.height, options.width, tile)
    return count, Split(max(count, 1), tile)


@functools.lru_cache(maxsize=32)
def _affordable(size: str, height: int, width: int, tile: Tile | None) -> int:
    config = presets.size(size).vae
    cut = Split(1, tile).tiled(height, width)
    sides = [cut.spans(side, 1) if cut else [(0, side)] for side in (height, width)]
    parts = [(bottom - top, right - left) for top, bottom in sides[0] for left, right in sides[1]]
    for count in range(LATENT_FRAMES, 0, -1):
        costs = {part: _flops(config, count, *part) for part in set(parts)}
        if sum(costs[part] for part in parts) <= AFFORDABLE:
            return count
    return 0


def _flops(config: Any, latents: int, height: int, width: int) -> int:
    graph = decode_graph(config, batch=1, latents=latents, height=height, width=width, dtype=torch.float64)
    return sum(op.cost(node).flops for node in graph.nodes)


def keep(
    root: Root, case: Case, options: Options, chunk: Chunk, plan: Mapping[str, Any]
) -> tuple[dict[str, Kept], dict[str, Any]]:
    """What is kept of a chunk that was made again: its latents whole, its first frames in part; and the fact."""
    fact: dict[str, Any] = {"chunk": chunk.index, "frames": frame_digests(chunk.frames)}
    count, _ = affordable(options, plan)
    if not count:
        return {}, fact
    first = chunk.frames[:, : frames_of(presets.size(options.size).vae, count)]
    latents = chunk.latents.contiguous()
    told = selection.digest(latents)
    kept = Kept(latents.reshape(-1), tuple(latents.shape), "float32", told, selection.all_finite(latents))
    return {f"{LABEL}.latents": kept, f"{LABEL}.frames": selection.keep(root, case.id, "frames", first)}, fact


def judge(
    case: Case, observation: Observation, setting: Mapping[str, Any], root: Root, kept: int
) -> tuple[dict[str, Judged], list[str]]:
    """Judge them. ``kept``: of how many chunks the one was drawn."""
    options, shots = Options.of(setting), observation.facts["chunks"]
    index = drawn(root, case.id, shots[-1]["latents"], min(kept, len(shots)))
    told = observation.facts["shown"]
    if told["chunk"] != index:
        return {}, [f"shown: chunk {index} was wanted"]
    again = index in [row[0] for row in observation.facts["checked"]]
    reasons = [] if again else [f"shown: chunk {index} was not made again"]
    if len(set(told["frames"])) != frames_of(presets.size(options.size).vae, LATENT_FRAMES):
        reasons.append(f"shown: chunk {index} has {len(set(told['frames']))} different frames")
    count, split = affordable(options, observation.facts["vae"])
    if setting["weights"] != "random" or not count:
        return {}, reasons
    latents, frames = (observation.outputs.get(f"{LABEL}.{what}") for what in ("latents", "frames"))
    shape = _shape(options)
    if latents is None or frames is None or latents.shape != shape or latents.values.numel() != _numel(shape):
        return {}, [*reasons, "shown: latents or frames are missing, or of another shape"]
    if not selection.digest(latents.values) == latents.digest == shots[index]["latents"]:
        return {}, [*reasons, "shown: the latents are not those of the timed chunk"]
    vae = observation.facts["vae"].get("precision", "fp32")
    if vae not in allowed_in(case.precision):
        return {}, [*reasons, f"shown: frames were decoded in {vae}, wanted {' or '.join(allowed_in(case.precision))}"]
    model = drawn_model(options.size, setting["variant"], root)
    first = latents.values.reshape(shape)[:, :, :count]
    found = _frames(case, root, frames, right_frames(model.vae, model.vae_weights, first, split, vae), vae)
    if isinstance(found, str):
        return {}, [*reasons, found]
    wrong = budget.exceeded(found.errors, found.bounds)
    return {f"{LABEL}.frames": found}, [*reasons, *(f"shown, chunk {index}: frames: {line}" for line in wrong)]


def _shape(options: Options) -> tuple[int, ...]:
    config = presets.size(options.size).vae
    factor = config.scale_factor_spatial
    return (1, config.z_dim, LATENT_FRAMES, options.height // factor, options.width // factor)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _frames(case: Case, root: Root, kept: Kept, right: Right, vae: str) -> Judged | str:
    if misfit := kept.misfit(right.exact.shape, torch.uint8):
        return f"shown: frames came as {misfit}"
    elements = selection.selection(root, case.id, "frames", kept.shape, kept.values.dtype, kept.digest)
    chosen = right.map(lambda whole: elements.take(selection.as_matrix(whole)))
    if chosen.exact.shape != kept.values.shape:
        return f"shown: {kept.values.numel()} values are kept, their digest chooses {chosen.exact.numel()}"
    return judge_frames(kept.values, chosen, right, vae)
