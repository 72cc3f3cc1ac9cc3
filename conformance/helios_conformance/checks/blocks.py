"""Transformer blocks, VAE blocks and sampler steps, teacher-forced."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from helios.backend import PRECISIONS
from helios.model import presets
from helios.model.config import SchedulerConfig, TransformerConfig
from helios_conformance.case import Case, Check, Level, Suite
from helios_conformance.frames import is_narrow
from helios_conformance.golden import Scene
from helios_conformance.graph_runs import SceneCheck
from helios_conformance.scenes.forward import Forward
from helios_conformance.scenes.sampler import Sampler
from helios_conformance.scenes.vae import VAE, VaeBlocks, VaeVideo
from helios_conformance.scenes.weights import calm

__all__ = ["CHECKS", "blocks", "half_vaes", "samplers", "vaes"]


def _config(size: str, layers: int, **changes: Any) -> TransformerConfig:
    return dataclasses.replace(presets.size(size).transformer, num_layers=layers, **changes)


def blocks() -> Mapping[str, Forward]:
    """By what stands in the id. One layer is a last block, whose history rows nobody reads; of two, the first is any
    other block, and its whole output is judged beside that of the network."""
    one, two = _config("tiny", 1), _config("tiny", 2)
    square, whole = (8, 8), (24, 40)
    amplified, scalar = {"is_amplify_history": True}, {"history_scale_mode": "scalar"}
    return {
        "tiny,stages": Forward("block", one, *square, (2, 1, 0)),
        "tiny,no_history": Forward("block", one, *square, history=False),
        "tiny,no_anchor": Forward("block", one, *square, keep_first_frame=False),
        "tiny,odd": Forward("block", one, 6, 10),
        "tiny,batch2": Forward("block", one, *square, batch=2),
        "tiny,first": Forward("block", two, *square, hidden=(0,)),
        "tiny,first_batch2": Forward("block", two, *square, batch=2, hidden=(0,)),
        "tiny,amplified": Forward("block", _config("tiny", 2, **amplified), *square, hidden=(0,), spread=calm),
        "tiny,amplified_scalar": Forward("block", _config("tiny", 1, **amplified, **scalar), *square, spread=calm),
        "tiny,all_see_text": Forward("block", _config("tiny", 2, guidance_cross_attn=False), *square, hidden=(0,)),
        "tiny,no_zero_row": Forward("block", _config("tiny", 1, zero_history_timestep=False), *square),
        "tiny,no_text_norm": Forward("block", _config("tiny", 1, cross_attn_norm=False), *square),
        "mini,last": Forward("block", _config("mini", 1), *square, tokens=64),
        "mini,first": Forward("block", _config("mini", 2), *whole, tokens=512, hidden=(0,)),
        "mini,batch2": Forward("block", _config("mini", 2), *square, tokens=64, batch=2, hidden=(0,)),
        "14b,stages": Forward("block", _config("14b", 2), *whole, (2, 1, 0), tokens=512, hidden=(0,)),
    }


_FULL = {"mini,first", "mini,batch2", "14b,stages"}


class Blocks(SceneCheck):
    """One transformer block, or two."""

    name = "block"

    def cases(self, precision: str) -> Iterator[Case]:
        for key in blocks():
            timeout = 1800.0 if key.startswith("14b") else 300.0
            suite = "full" if key in _FULL else "quick"
            params = {"scene": key}
            yield Case(f"block[{precision},{key}]", "blocks", self.name, precision, params, suite, timeout=timeout)  # type: ignore[arg-type]

    def scene(self, case: Case) -> Scene:
        return blocks()[case.params["scene"]]


def vaes() -> Mapping[str, Scene]:
    """By what stands in the id: every block by itself, and whole videos in groups."""
    wide = dataclasses.replace(VAE, base_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2)
    decoded, encoded = (VaeVideo(VAE, half, (2, 1), 32, 32) for half in ("decode", "encode"))
    return {
        "decode_blocks": VaeBlocks(decoded),
        "decode_blocks_next": VaeBlocks(decoded, 1),
        "encode_blocks": VaeBlocks(encoded),
        "encode_blocks_next": VaeBlocks(encoded, 1),
        "decode": VaeVideo(VAE, "decode", (3,), 32, 48),
        "decode_groups": VaeVideo(VAE, "decode", (1, 2, 2), 16, 32),
        "decode_batch2": VaeVideo(VAE, "decode", (2, 1), 16, 16, batch=2),
        "encode": VaeVideo(VAE, "encode", (3,), 32, 48),
        "encode_groups": VaeVideo(VAE, "encode", (1, 2, 2), 16, 32),
        "wide_decode_blocks": VaeBlocks(VaeVideo(wide, "decode", (3,), 64, 96)),
        "wide_encode_blocks": VaeBlocks(VaeVideo(wide, "encode", (3,), 64, 96)),
        "wide_decode": VaeVideo(wide, "decode", (3, 3), 64, 96),
    }


class Vaes(SceneCheck):
    """The autoencoder in float32, as published: decoders of most backends, and encoders of all."""

    name = "vae"

    def cases(self, precision: str) -> Iterator[Case]:
        for key in vaes():
            suite = "full" if key.startswith("wide") else "quick"
            params = {"scene": key}
            yield Case(f"vae[{precision},{key}]", "blocks", self.name, precision, params, suite, timeout=300.0)  # type: ignore[arg-type]

    def scene(self, case: Case) -> Scene:
        return vaes()[case.params["scene"]]


def half_vaes() -> Mapping[str, Scene]:
    """The decoders of ``vaes`` in the working dtype, by what stands in the id."""
    return {key: _working(scene) for key, scene in vaes().items() if "decode" in key}


def _working(scene: Scene) -> Scene:
    if isinstance(scene, VaeBlocks):
        return dataclasses.replace(scene, video=dataclasses.replace(scene.video, working=True))
    assert isinstance(scene, VaeVideo)
    return dataclasses.replace(scene, working=True)


class HalfVaes(SceneCheck):
    """The decoder in the working dtype, where that is narrower than float32: blocks, and whole videos at level model.

    Of every backend, whatever it decodes in by default: a user may ask for the other.
    """

    name = "vae_half"

    def cases(self, precision: str) -> Iterator[Case]:
        if not is_narrow(PRECISIONS[precision]):
            return
        for key in half_vaes():
            level: Level = "blocks" if "blocks" in key else "model"
            suite: Suite = "full" if key.startswith("wide") else "quick"
            params = {"scene": key}
            yield Case(f"vae_half[{precision},{key}]", level, self.name, precision, params, suite, timeout=300.0)

    def scene(self, case: Case) -> Scene:
        return half_vaes()[case.params["scene"]]


def _scheduler(variant: str, **changes: Any) -> SchedulerConfig:
    return dataclasses.replace(presets.variant(variant).scheduler, **changes)


def samplers() -> Mapping[str, Sampler]:
    """By what stands in the id: each solver over a whole schedule."""
    return {
        "dmd": Sampler(_scheduler("distilled"), (1, 1, 1)),
        "dmd_amplified": Sampler(_scheduler("distilled"), (2, 2, 2), amplify=True),
        "dmd_batch2": Sampler(_scheduler("distilled"), (2, 1, 1), batch=2),
        "unipc_pyramid": Sampler(_scheduler("mid"), (4, 4, 4), zero_star=True),
        "unipc_batch2": Sampler(_scheduler("mid"), (2, 2, 2), zero_star=True, batch=2),
        "unipc": Sampler(_scheduler("base"), (20,), zero_star=False, height=4),
        "unipc_first_order": Sampler(_scheduler("base", solver_order=1), (6,), height=4),
        "euler": Sampler(_scheduler("base", scheduler_type="euler"), (10,), height=4),
        "euler_pyramid": Sampler(_scheduler("mid", scheduler_type="euler"), (3, 3, 3), zero_star=True),
        "unipc_50": Sampler(_scheduler("base"), (50,), zero_star=False, height=4),
        "unipc_pyramid_20": Sampler(_scheduler("mid"), (20, 20, 20), zero_star=True),
    }


class Samplers(SceneCheck):
    """Every step of a schedule, with guidance and what lies between stages."""

    name = "sampler"

    def cases(self, precision: str) -> Iterator[Case]:
        for key in samplers():
            suite = "full" if key in ("unipc_50", "unipc_pyramid_20") else "quick"
            params = {"scene": key}
            yield Case(f"sampler[{precision},{key}]", "blocks", self.name, precision, params, suite)  # type: ignore[arg-type]

    def scene(self, case: Case) -> Scene:
        return samplers()[case.params["scene"]]


CHECKS: tuple[Check, ...] = (Blocks(), Vaes(), HalfVaes(), Samplers())
