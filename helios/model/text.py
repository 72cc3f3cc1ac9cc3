"""Prompts to embeddings: cleaning, the UMT5 encoder of a model folder, and a stand-in where there is no folder.

The encoder itself is transformers'; ours is what the published pipelines do around it: clean the text, cut it to a
number of tokens, and set the embeddings behind its end to zero, because the network attends to the padding.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import html
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from helios.errors import CheckpointError, InputError
from helios.model.weights import SafetensorsFolder, WeightSource, check

__all__ = ["Encoded", "NoText", "StandInText", "TextEncoder", "Umt5Text", "clean_prompt", "text_bytes"]

REMEMBERED = 32
"""Embeddings kept on the host, 8 MB each at the published size, so that a prompt that comes back needs no encoder."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One prompt: its embedding ``[tokens, text_dim]``, float32, host; and the end of the text that did not fit."""

    embedding: Tensor
    cut: str = ""


class TextEncoder(Protocol):
    """Turns prompts into embeddings. The same text gives the same bits, whatever was encoded before or beside it."""

    @property
    def origin(self) -> str:
        """What made the embeddings, in words that a report can print."""

    def encode(self, text: str, tokens: int) -> Encoded:
        """The embedding of one prompt, zero behind its end.

        Args:
            text: as the user wrote it.
            tokens: length of the embedding; what is longer is cut.
        """

    def release(self) -> None:
        """Free the encoder's memory; it comes back by itself when it is needed again."""


def text_bytes(encoder: TextEncoder) -> int:
    """What an encoder holds while it encodes, in bytes; 0 for all but UMT5, which are small or not ours to know."""
    return encoder.nbytes if isinstance(encoder, Umt5Text) else 0


def clean_prompt(text: str) -> str:
    """The text as the encoder was trained on it: broken Unicode repaired, HTML entities resolved (twice, as published),
    every run of white space one blank.

    >>> clean_prompt("  a&amp;amp;b\\n\\tc ")
    'a&b c'
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip()


class Umt5Text:
    """The UMT5 encoder and tokenizer of a model folder, read when the first prompt comes.

    Args:
        folder: holds ``text_encoder`` and ``tokenizer``.
        text_dim: width of the embeddings that the transformer takes.
        dtype: of the encoder's arithmetic.
        device: where it runs.
    """

    def __init__(self, folder: Path, *, text_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.text_dim, self.dtype, self.device = folder, text_dim, dtype, device
        self.origin = f"UMT5 of {folder}"
        self._loaded: tuple[Any, Any] | None = None
        self._known: collections.OrderedDict[tuple[str, int], Encoded] = collections.OrderedDict()

    def encode(self, text: str, tokens: int) -> Encoded:
        key = (clean_prompt(text), tokens)
        if key not in self._known:
            self._known[key] = self._encode(*key)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    @property
    def nbytes(self) -> int:
        """Of the weights where it runs; read from the headers of its files."""
        source = SafetensorsFolder(self.folder / "text_encoder")
        names = [name for name in source.tensors if name != _EMBEDDINGS[1] or _EMBEDDINGS[0] not in source.tensors]
        return sum(math.prod(source.tensors[name].shape) for name in names) * self.dtype.itemsize

    def release(self) -> None:
        self._loaded = None

    def _encode(self, text: str, tokens: int) -> Encoded:
        tokenizer, encoder = self._load()
        batch = tokenizer([text], padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
        length = int(batch.attention_mask.sum())
        with torch.no_grad():
            state = encoder(batch.input_ids.to(self.device), batch.attention_mask.to(self.device)).last_hidden_state
        embedding = state[0].to("cpu", torch.float32 if self.dtype != torch.float64 else torch.float64)
        embedding[length:] = 0.0
        return Encoded(embedding, self._rest(tokenizer, text, tokens))

    @staticmethod
    def _rest(tokenizer: Any, text: str, tokens: int) -> str:
        """The end of the text that is not among its first tokens; the last one of them closes the text."""
        ids = tokenizer(text, add_special_tokens=True, verbose=False).input_ids
        return str(tokenizer.decode(ids[tokens - 1 :], skip_special_tokens=True)) if len(ids) > tokens else ""

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            source = SafetensorsFolder(self.folder / "text_encoder")
            with _told(self.folder), _no_bars():
                from transformers import AutoTokenizer

                encoder = _bare_encoder(self.folder / "text_encoder", self.dtype)
                tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)
            if encoder.config.d_model != self.text_dim:
                raise CheckpointError(
                    f"{self.folder}/text_encoder gives embeddings of {encoder.config.d_model} numbers, the transformer "
                    f"takes {self.text_dim}",
                    "use the text encoder that belongs to this transformer",
                )
            _fill(encoder, source, self.device)
            self._loaded = tokenizer, encoder.eval().requires_grad_(False).to(self.device)
        return self._loaded


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What transformers raises, as an error of the folder."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{folder}: text encoder or tokenizer cannot be read: {first}", "download the folder again"
        ) from error


def _bare_encoder(folder: Path, dtype: torch.dtype) -> Any:
    """The network of a config, without memory for its weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return UMT5EncoderModel._from_config(config, dtype=dtype)


_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # one matrix, stored under either name or both


def _fill(encoder: Any, source: WeightSource, device: torch.device) -> None:
    """Give a network its weights: each is read, checked, converted and moved before the next one is read.

    transformers' own reading would fill what is missing with random numbers, drop what is unknown and cast integers.

    Raises:
        CheckpointError: the weights do not fit the config, or one holds NaN or infinity.
    """
    slots: dict[str, Tensor] = encoder.state_dict()
    stored = [name for name in _EMBEDDINGS if name in source.tensors] or [_EMBEDDINGS[0]]
    wanted = [name for name in slots if name not in _EMBEDDINGS or name in stored]
    check(source, {name: tuple(slots[name].shape) for name in wanted})
    _require_one_matrix(source, stored)
    for name in wanted:
        if name in stored[1:]:
            continue
        weight = torch.nn.Parameter(source.read(name).to(device, slots[name].dtype), requires_grad=False)
        for place in _EMBEDDINGS if name == stored[0] else (name,):
            module, _, leaf = place.rpartition(".")
            setattr(encoder.get_submodule(module), leaf, weight)


def _require_one_matrix(source: WeightSource, stored: list[str]) -> None:
    """Two stored copies of the embeddings must be equal: the network has one."""
    if len(stored) == 2 and not torch.equal(*(source.read(name) for name in stored)):
        raise CheckpointError(
            f"{source.where(stored[1])}: {stored[1]!r} differs from {stored[0]!r}, of which it should be a copy",
            "download the folder again",
        )


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars, which know nothing of the program around them."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class StandInText:
    """Embeddings that stand for a text without understanding it: each word is a fixed pseudo-random vector.

    For sizes with random weights, which have no text encoder: different prompts are different inputs, equal prompts
    are equal ones, and nothing more is claimed.
    """

    origin = "stand-in text: a hash of each word, no language model"

    def __init__(self, text_dim: int) -> None:
        self.text_dim = text_dim

    def encode(self, text: str, tokens: int) -> Encoded:
        words = [*clean_prompt(text).split(), "</s>"]
        kept = words if len(words) <= tokens else [*words[: tokens - 1], "</s>"]
        embedding = torch.zeros(tokens, self.text_dim)
        for place, word in enumerate(kept):
            embedding[place] = self._vector(word)
        return Encoded(embedding, " ".join(words[tokens - 1 : -1]) if len(words) > tokens else "")

    def release(self) -> None:
        """Nothing is held."""

    def _vector(self, word: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little", signed=True)
        return torch.randn(self.text_dim, generator=torch.Generator().manual_seed(seed))


class NoText:
    """For models without any text encoder: only given embeddings will do."""

    origin = "no text encoder"

    def encode(self, text: str, tokens: int) -> Encoded:
        raise InputError("this model has no text encoder", "pass prompt_embeds (and negative_prompt_embeds)")

    def release(self) -> None:
        """Nothing is held."""
