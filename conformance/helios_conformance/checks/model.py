"""Whole forwards of small sizes at every stage and step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from helios.model import presets
from helios.model.config import TransformerConfig
from helios.model.random_weights import spread
from helios_conformance.case import Case, Check, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.golden import Scene, golden
from helios_conformance.graph_runs import SceneCheck, chosen_of
from helios_conformance.scenes.forward import Forward
from helios_conformance.scenes.trajectory import Trajectory

if TYPE_CHECKING:
    from helios_conformance.references import References

__all__ = ["CHECKS", "LAYERS", "forwards", "trajectories"]

LAYERS = 40
"""Of the published size: so many blocks add to one residual stream."""


def _of(size: str) -> TransformerConfig:
    return presets.size(size).transformer


def forwards() -> Mapping[str, Forward]:
    """By what stands in the id. Prompts are bound side by side and used in turns. Into the program of
    ``tiny,one_stage`` other weights are loaded first."""
    return {
        "tiny,stages": Forward("model", _of("tiny"), 8, 8, (2, 1, 0), prompts=2),
        "tiny,batch2": Forward("model", _of("tiny"), 8, 8, (2, 1, 0), batch=2),
        "tiny,one_stage": Forward("model", _of("tiny"), 4, 6, prompts=3, tokens=24),
        "mini,stages": Forward("model", _of("mini"), 24, 40, (2, 1, 0), tokens=512),
        "mini,prompts": Forward("model", _of("mini"), 8, 8, (2, 1, 0), tokens=64, prompts=2),
    }


def trajectories() -> Mapping[str, Trajectory]:
    """By what stands in the id: steps and chunks along the oracle's own way."""
    tiny, mini = _of("tiny"), _of("mini")
    return {
        "tiny,distilled": Trajectory("steps", tiny, "distilled", 8, 8, (1, 1, 1), chunks=3),
        "tiny,distilled_amplified": Trajectory("steps", tiny, "distilled", 8, 8, (2, 2, 2), chunks=2, amplify=True),
        "tiny,distilled_batch2": Trajectory("steps", tiny, "distilled", 8, 8, (1, 1, 1), chunks=2, batch=2),
        "tiny,mid": Trajectory("steps", tiny, "mid", 8, 8, (2, 2, 2), chunks=2),
        "tiny,base": Trajectory("steps", tiny, "base", 4, 6, (4,), chunks=2),
        "tiny,base_20": Trajectory("steps", tiny, "base", 4, 6, (20,)),
        "tiny,mid_6": Trajectory("steps", tiny, "mid", 8, 8, (6, 6, 6)),
        "mini,distilled": Trajectory("steps", mini, "distilled", 8, 8, (1, 1, 1), chunks=2, tokens=64),
        "mini,mid": Trajectory("steps", mini, "mid", 8, 8, (1, 1, 1), tokens=64),
    }


class Forwards(SceneCheck):
    """All layers of a network at one or more stages."""

    name = "forward"

    def cases(self, precision: str) -> Iterator[Case]:
        for key in forwards():
            suite = "full" if key.startswith("mini") else "quick"
            params = {"scene": key} | ({"reload": True} if key == "tiny,one_stage" else {})
            yield Case(f"forward[{precision},{key}]", "model", self.name, precision, params, suite, timeout=900.0)  # type: ignore[arg-type]

    def scene(self, case: Case) -> Scene:
        return forwards()[case.params["scene"]]


class Trajectories(SceneCheck):
    """Every forward, guidance and solver step of some chunks."""

    name = "steps"

    def cases(self, precision: str) -> Iterator[Case]:
        for key in trajectories():
            suite = "full" if key.startswith("mini") or key in ("tiny,base_20", "tiny,mid_6") else "quick"
            params = {"scene": key}
            yield Case(f"steps[{precision},{key}]", "model", self.name, precision, params, suite, timeout=600.0)  # type: ignore[arg-type]

    def scene(self, case: Case) -> Scene:
        return trajectories()[case.params["scene"]]


class Energy(SceneCheck):
    """What is left in the residual stream after as many additions as the published size makes.

    Each addition rounds. Rounding to nearest leaves the energy ‖y‖² where it is; truncation takes a little each time,
    always in the same direction.
    """

    name = "energy"

    def cases(self, precision: str) -> Iterator[Case]:
        yield Case(f"energy[{precision},tiny,{LAYERS}]", "model", self.name, precision, timeout=300.0)

    def scene(self, case: Case) -> Scene:
        # Weights as published models start: gates of a tenth, so that what the first additions lose is still
        # lost after the last.
        config = dataclasses.replace(_of("tiny"), num_layers=LAYERS)
        hidden = (LAYERS // 2 - 1, LAYERS - 1)
        return Forward("energy", config, 8, 8, hidden=hidden, spread=spread, late=2)

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        verdict = super().judge(case, observation, root, references)
        lines = [verdict.reason] if verdict.reason else []
        dtype = self.scene(case).dtype(case.precision)
        oracle = golden(self.scene(case), root, dtype).outputs
        for name, judged in verdict.judged.items():
            if ".hidden." not in name:
                continue
            kept = observation.outputs[name]
            right = chosen_of(root, case, name, kept, oracle[name], len(observation.outputs)).square().sum()
            ratio = float(kept.values.double().square().sum() / right)
            # ‖y‖² is ‖o‖²·(1 + 2·gain) + ‖y − o‖², whatever the errors are.
            allowed = 2 * judged.bounds.gain + judged.bounds.norm**2
            if not abs(ratio - 1.0) <= allowed:
                lines.append(f"{name}: energy is {ratio:.6g} of what it should be, beyond 1 ± {allowed:.2g}")
        return Verdict("fail" if lines else "pass", "; ".join(lines), verdict.judged)


CHECKS: tuple[Check, ...] = (Forwards(), Trajectories(), Energy())
