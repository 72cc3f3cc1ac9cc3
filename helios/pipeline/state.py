"""The state of a run between two chunks: with the weights and the request, all that the next chunk depends on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from helios.errors import StateError
from helios.pipeline.prompts import PromptState

__all__ = ["RunState"]

FORMAT = "1"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RunState:
    """Pure data; never changed, so any state of a run can be kept and continued from, as often as one likes.

    Attributes:
        chunk: index of the chunk that comes next.
        history: window of past latents ``[b, 16, 19 or 20, h/8, w/8]``, float32, host.
        anchor: ``[b, 16, 1, h/8, w/8]`` float32, or None before the first chunk of a video from text.
        rng: saved random generator, uint8 ``[n]``; empty for ``rng="helios"``, whose draws need no state.
        prompt: texts in force.
        settings: what the run was asked for, as JSON values (see ``Request.settings``).
        plan: how it is executed, as JSON values: backend, precision, groups of the VAE, digest of the graphs.
    """

    chunk: int
    history: Tensor
    anchor: Tensor | None
    rng: Tensor
    prompt: PromptState
    settings: Mapping[str, Any]
    plan: Mapping[str, Any]

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata, as ``safetensors.torch.save_file(tensors, path, metadata)`` takes them."""
        tensors = {"history": self.history.contiguous(), "rng": self.rng.contiguous()}
        if self.anchor is not None:
            tensors["anchor"] = self.anchor.contiguous()
        metadata = {
            "format": FORMAT,
            "chunk": str(self.chunk),
            "prompt": json.dumps(dataclasses.asdict(self.prompt)),
            "settings": json.dumps(dict(self.settings), sort_keys=True),
            "plan": json.dumps(dict(self.plan), sort_keys=True),
        }
        return tensors, metadata

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> RunState:
        """The state that ``to_tensors`` gave. Raises StateError where it is not one."""
        if metadata.get("format") != FORMAT:
            came = metadata.get("format", "none")
            raise StateError(f"saved state of format {came}, this Helios reads format {FORMAT}", "start the run again")
        try:
            prompt = json.loads(metadata["prompt"])
            return RunState(
                chunk=int(metadata["chunk"]),
                history=tensors["history"],
                anchor=tensors.get("anchor"),
                rng=tensors["rng"].to(torch.uint8),
                prompt=PromptState(tuple(prompt["current"]), tuple(prompt["previous"]), int(prompt["since"])),
                settings=json.loads(metadata["settings"]),
                plan=json.loads(metadata["plan"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"saved state is damaged: {error!r}", "continue from an earlier chunk's state") from error

    def differences(self, settings: Mapping[str, Any], plan: Mapping[str, Any] | None = None) -> list[str]:
        """One line for each setting (and part of the plan) that is not as in this state: name, saved, asked for.

        Empty means that a run with them continues to the same bits.
        """
        pairs = [(self.settings, settings)] + ([(self.plan, plan)] if plan is not None else [])
        return [
            f"{name}: {old.get(name)!r} was saved, {new.get(name)!r} is asked for"
            for old, new in pairs
            for name in sorted({*old, *new})
            if _json(old.get(name)) != _json(new.get(name))
        ]


def _json(value: Any) -> Any:
    """As it reads after a trip through a file."""
    return json.loads(json.dumps(value))
