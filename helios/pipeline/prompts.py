"""Which prompt a chunk has: one for all, a schedule, or prompts that arrive while the video is being made.

A new prompt takes over gradually: over the first ``steps`` chunks its embedding is mixed with the one before it, from
all of the old (so that the first of them still has the old prompt) to all of the new. That is how the published
interactive mode does it. With 0 steps it takes over at once.
"""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from helios.errors import InputError

__all__ = ["CHUNKS_PER_PROMPT", "INTERPOLATION_STEPS", "PromptState", "Prompts", "Script", "script_of"]

CHUNKS_PER_PROMPT = 7
INTERPOLATION_STEPS = 3

Texts: TypeAlias = tuple[str, ...]
Prompts: TypeAlias = "Sequence[str | tuple[str, int]] | Callable[[int], str | None] | queue.Queue[str]"
"""A schedule (texts, or texts with their number of chunks), or where to ask before each chunk: a function of the
chunk's number that gives a text or ``None`` for no change, or a queue, of which the newest text counts."""


@dataclasses.dataclass(frozen=True, slots=True)
class PromptState:
    """The prompts in force, one for each prompt of the batch; those before them; and the chunk that changed them.

    ``current`` is empty where embeddings were given instead of text.
    """

    current: Texts = ()
    previous: Texts = ()
    since: int = 0

    def change(self, texts: Texts, chunk: int) -> PromptState:
        """The state with these prompts from that chunk on; the same state if they are in force already."""
        return self if texts == self.current else PromptState(texts, self.current, chunk)

    def weight(self, chunk: int, steps: int) -> float:
        """Share of the current prompts in the embeddings of a chunk; the previous ones have the rest.

        >>> [PromptState(("b",), ("a",), 7).weight(chunk, 3) for chunk in (7, 8, 9, 10)]
        [0.0, 0.5, 1.0, 1.0]
        """
        place = chunk - self.since
        if not self.previous or place >= steps or len(self.previous) != len(self.current):
            return 1.0
        return place / (steps - 1) if steps > 1 else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Script:
    """What ``prompts`` says: a schedule with its end, or somebody to ask.

    Attributes:
        parts: text and number of chunks.
        ask: gives the text wanted at a chunk, or ``None``.
    """

    parts: tuple[tuple[str, int], ...] = ()
    ask: Callable[[int], str | None] | None = None

    @property
    def chunks(self) -> int | None:
        """Length of the schedule; ``None`` where nobody knows."""
        return sum(count for _, count in self.parts) or None

    def wanted(self, chunk: int) -> str | None:
        """The text that this chunk should have, ``None`` for no change. The last part has no end."""
        if self.ask is not None:
            text = self.ask(chunk)
            if text is not None:
                require_text(text)
            return text
        for text, count in self.parts:
            chunk -= count
            if chunk < 0:
                return text
        return self.parts[-1][0]


def script_of(prompts: Any, chunks_per_prompt: int = CHUNKS_PER_PROMPT) -> Script:
    """The script of whatever ``prompts`` is (see ``Prompts``).

    Raises:
        InputError: an empty schedule, an empty text, a number of chunks below 1, or something else altogether.
    """
    if isinstance(prompts, queue.Queue):
        return Script(ask=lambda chunk: _newest(prompts))
    if callable(prompts):
        return Script(ask=prompts)
    if not isinstance(prompts, Sequence) or isinstance(prompts, str) or not prompts:
        raise InputError(
            f"prompts is {prompts!r}, wanted a list of texts, a function of the chunk's number, or a queue",
            "give one prompt as `prompt`",
        )
    return Script(tuple(_part(part, chunks_per_prompt) for part in prompts))


def _part(part: Any, chunks: int) -> tuple[str, int]:
    text, count = (part, chunks) if isinstance(part, str) else part
    require_text(text)
    if not isinstance(count, int) or count < 1:
        raise InputError(f"prompt {text!r} has {count!r} chunks, wanted at least 1", "give a whole number of chunks")
    return text, count


def require_text(text: Any) -> None:
    """Raise InputError unless it is a text with something in it."""
    if not isinstance(text, str):
        raise InputError(f"a prompt must be a text, got {type(text).__name__}", "pass tensors as prompt_embeds")
    if not text.strip():
        raise InputError("the prompt is empty", "describe the video in a sentence or more")


def _newest(waiting: queue.Queue[str]) -> str | None:
    text = None
    while True:
        try:
            text = waiting.get_nowait()
        except queue.Empty:
            return text
