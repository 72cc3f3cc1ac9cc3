"""Videos: every kind of start chunk by chunk, what must be the same to the bit, groups of frames, and a long free run.

Each case is exact or within budget, and says which:

- ``video``: latents within budget of the oracle's, chunk by chunk from the oracle's states; frames within what the
  arithmetic of the VAE allows of what float64 makes of the device's own latents (``frames.py``).
- ``same``: bit for bit. The digests of every run are kept.
- ``codec``: the video in any groups, within budget; in float32, and decoded in the working dtype.
- ``beside``: a video of a batch and the same video alone, both within budget of what it is alone.
- ``free_run``: drawn, not judged; see ``divergence``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from helios.backend import PRECISIONS, ReferenceBackend
from helios.graph import TensorType
from helios.model.vae_split import Split, Tile
from helios.pipeline.codec import Codec, to_host
from helios_conformance import budget, frames
from helios_conformance.beside import Beside
from helios_conformance.budget import Errors
from helios_conformance.case import Case, Check, Judged, Observation, Suite, Verdict
from helios_conformance.divergence import FreeRun
from helios_conformance.draws import Root, normal
from helios_conformance.exact import Same
from helios_conformance.graph_runs import Wanted, chosen_of, judge_kept, keep, largest
from helios_conformance.scenes.vae import VAE
from helios_conformance.selection import digest
from helios_conformance.videos import (
    Video,
    chunk_after,
    coverage_of,
    frame_digests,
    golden_video,
    latents_only,
    pipeline_of,
    vae_weights,
)

if TYPE_CHECKING:
    from helios_conformance.references import References
    from helios_conformance.session import Session

__all__ = ["CHECKS", "videos"]

_TERMS = 64
"""Of the longest sum in the tiny transformer."""


def videos() -> Mapping[str, Video]:
    """By what stands in the id."""
    base: dict[str, Any] = {"variant": "base", "side": 32, "steps": (2,)}
    amplified = (("amplify_first_chunk", True),)
    return {
        "text,distilled": Video("distilled", chunks=2),
        "text,mid": Video("mid", steps=(2, 1, 1)),
        "text,base": Video(**base | {"steps": (3,), "chunks": 3}),
        "image,base": Video(**base, chunks=2, start="image"),
        "video,base": Video(**base, chunks=2, start="video"),
        "interactive,base": Video(**base, chunks=3, schedule=(("a", 1), ("b", 2)), more=(("interpolation_steps", 3),)),
        "batch2,base": Video(**base, chunks=2, prompts=("a", "b")),
        "no_anchor,base": Video(**base, chunks=2, more=(("keep_first_frame", False),)),
        "amplified,distilled": Video("distilled", chunks=2, steps=(2, 2, 2), more=amplified),
        "image,distilled": Video("distilled", chunks=2, start="image"),
        "video,distilled": Video("distilled", chunks=2, start="video"),
        "interactive,distilled": Video("distilled", chunks=4, schedule=(("a", 1), ("b", 3))),
        "text,mid_20": Video("mid", steps=(20, 20, 20)),
        "text,base_50": Video(**base | {"steps": (50,), "chunks": 2}),
    }


_QUICK = 8
"""Of these videos, the first."""


class Videos:
    """Chunks from the oracle's states."""

    name = "video"

    def cases(self, precision: str) -> Iterator[Case]:
        for at, key in enumerate(videos()):
            suite: Suite = "quick" if at < _QUICK else "full"
            params = {"scene": key}
            yield Case(f"video[{precision},{key}]", "pipeline", self.name, precision, params, suite, timeout=600.0)

    def observe(self, case: Case, session: Session) -> Observation:
        video, root = videos()[case.params["scene"]], session.root
        golden = golden_video(video, root, case.precision)
        pipeline = pipeline_of(video.variant, root, case.precision, session.backend, session.fallback)
        chunks = [chunk_after(pipeline, video, root, i, g.state) for i, g in enumerate(golden)]
        outputs = {f"c{i}.latents": chunk.latents for i, chunk in enumerate(chunks)}
        outputs["frames"] = chunks[-1].frames
        shares = _shares(video)
        kept = {name: keep(root, case, name, x, shares[name]) for name, x in outputs.items()}
        facts = {"frames": [frame_digests(chunk.frames) for chunk in chunks], "vae": pipeline.vae_precision}
        return Observation(kept, facts, coverage_of(pipeline))

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        video = videos()[case.params["scene"]]
        shares = _shares(video)
        if set(observation.outputs) != set(shares):
            return Verdict("fail", f"outputs {sorted(observation.outputs)}, wanted {sorted(shares)}")
        golden = golden_video(video, root, case.precision)
        oracle = {f"c{i}.latents": chunk.latents for i, chunk in enumerate(golden)}
        wanted = {name: Wanted(TensorType(video.latents, torch.float32), _TERMS, chain=True) for name in oracle}
        latents = dataclasses.replace(observation, outputs={n: observation.outputs[n] for n in oracle})
        judged, reasons = judge_kept(case, latents, root, references, oracle, wanted, shares)
        reasons += _odd_frames(observation.facts, video.chunks)
        last = observation.outputs[f"c{video.chunks - 1}.latents"]
        whole = last.values.numel() == golden[-1].latents.numel() and last.dtype == "float32"
        if not whole or digest(last.values) != last.digest:
            return Verdict(
                "fail", "; ".join([*reasons, "the last latents are not whole: they cannot be decoded"]), judged
            )
        shown = self._frames(case, observation, last.values.reshape(video.latents), root, shares["frames"])
        if isinstance(shown, str):
            return Verdict("fail", "; ".join([*reasons, shown]), judged)
        judged["frames"] = shown
        reasons += [f"frames: {line}" for line in budget.exceeded(shown.errors, shown.bounds)]
        return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)

    @staticmethod
    def _frames(case: Case, observation: Observation, latents: Tensor, root: Root, share: int) -> Judged | str:
        """The device's frames against the oracle's decoding of the device's own latents."""
        kept, vae = observation.outputs["frames"], observation.facts.get("vae")
        if vae not in frames.allowed_in(case.precision):
            return f"frames were decoded in {vae}, wanted {' or '.join(frames.allowed_in(case.precision))}"
        right = frames.right_frames(VAE, vae_weights(), latents, Split(latents.shape[2]), vae)
        if misfit := kept.misfit(right.exact.shape, torch.uint8):
            return f"frames came as {misfit}"
        chosen = right.map(lambda whole: chosen_of(root, case, "frames", kept, whole, share))
        if chosen.exact.shape != kept.values.shape:
            return f"{kept.values.numel()} values of the frames are kept, their digest chooses {chosen.exact.numel()}"
        return frames.judge(kept.values, chosen, right, vae)

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        video = videos()[case.params["scene"]]
        rows: dict[str, list[Errors]] = {}
        for draw in range(8 if case.suite == "quick" else 3):
            one = Root(64 * root.seed + draw, root.nonce)
            golden = golden_video(video, one, case.precision)
            pipeline = latents_only(pipeline_of(video.variant, one, case.precision, ReferenceBackend()))
            for i, chunk in enumerate(golden):
                latents = chunk_after(pipeline, video, one, i, chunk.state).latents
                rows.setdefault(f"c{i}.latents", []).append(budget.measure(latents, chunk.latents))
        return {name: largest(errors) for name, errors in rows.items()}


def _shares(video: Video) -> dict[str, int]:
    """By how many each output shares the room: the last latents are kept whole, since the frames are made of them."""
    last = video.chunks - 1
    return {f"c{i}.latents": 1 if i == last else 8 * video.chunks for i in range(video.chunks)} | {"frames": 4}


def _odd_frames(facts: Mapping[str, Any], chunks: int) -> list[str]:
    """What is wrong with the frames of all chunks: their number, or one that was shown before."""
    told = facts.get("frames")
    if not isinstance(told, list) or [len(chunk) for chunk in told] != [33] * chunks:
        return [f"{chunks} chunks of 33 frames were wanted"]
    every = [frame for chunk in told for frame in chunk]
    return [] if len(set(every)) == len(every) else [f"{len(every) - len(set(every))} frames repeat others to the bit"]


class Codecs:
    """The autoencoder as a pipeline uses it: any groups of latents give the video of all at once; tiles give tiles'."""

    name = "codec"
    splits: Mapping[str, Split] = {
        "whole": Split(9),
        "group4": Split(4),
        "group1": Split(1),
        "tiles": Split(9, Tile(32, 24)),
    }

    def cases(self, precision: str) -> Iterator[Case]:
        yield Case(f"codec[{precision},groups]", "pipeline", self.name, precision, timeout=300.0)
        if frames.is_narrow(PRECISIONS[precision]):
            params = {"working": True}
            yield Case(f"codec[{precision},half]", "pipeline", self.name, precision, params, timeout=300.0)

    def observe(self, case: Case, session: Session) -> Observation:
        codec = Codec(VAE, vae_weights(), session.backend, _decoding(case), session.fallback)
        outputs = {name: session.to_host(x) for name, x in _coded(codec, session.root, case).items()}
        kept = {n: keep(session.root, case, n, x, len(outputs)) for n, x in outputs.items()}
        return Observation(kept, {}, [row for coverage in codec.coverage for row in coverage.rows()])

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        oracle = _coded(Codec(VAE, vae_weights(), ReferenceBackend(), torch.float64), root, case)
        wanted = {name: Wanted(TensorType(tuple(x.shape), _decoding(case)), 432) for name, x in oracle.items()}
        judged, reasons = judge_kept(case, observation, root, references, oracle, wanted)
        return Verdict("fail" if reasons else "pass", "; ".join(reasons), judged)

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        rows: dict[str, list[Errors]] = {}
        for draw in range(6):
            one = Root(64 * root.seed + draw, root.nonce)
            oracle, came = (
                _coded(Codec(VAE, vae_weights(), ReferenceBackend(), dtype), one, case)
                for dtype in (torch.float64, _decoding(case))
            )
            for name, right in oracle.items():
                rows.setdefault(name, []).append(budget.measure(came[name], right))
        return {name: largest(errors) for name, errors in rows.items()}


def _decoding(case: Case) -> torch.dtype:
    """Of the decoder: float32, or the working dtype."""
    return PRECISIONS[case.precision] if case.params.get("working") else torch.float32


def _coded(codec: Codec, root: Root, case: Case) -> dict[str, Tensor]:
    """A video decoded in each way; and one encoded in groups, which is in float32 always."""
    latents = normal(root.key("codec", "latents"), (1, VAE.z_dim, 9, 4, 6))
    made = {name: to_host(codec.decode(latents, split)) for name, split in Codecs.splits.items()}
    if case.params.get("working"):
        return made
    video = normal(root.key("codec", "video"), (1, 3, 33, 32, 32), scale=0.4).clamp(-1.0, 1.0)
    noise = normal(root.key("codec", "noise"), (1, VAE.z_dim, 9, 4, 4))
    return made | {f"encode_{name}": codec.encode(video, noise, Split(n)) for name, n in (("whole", 9), ("group2", 2))}


CHECKS: tuple[Check, ...] = (Videos(), Codecs(), Same(), Beside(), FreeRun())
