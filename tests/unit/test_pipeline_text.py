"""Text to embeddings: cleaning, cutting, zeros behind the end, and memory given back."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import helios
from helios.errors import CheckpointError, InputError
from helios.model import text as text_module
from helios.model.room import KEPT
from helios.model.text import NoText, StandInText, Umt5Text, clean_prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    out: Path = tmp_path_factory.mktemp("model") / "tiny"
    make_checkpoint.write_checkpoint(out, size_name="tiny", variant_name="distilled")
    return out


def umt5(folder: Path, text_dim: int = 32) -> Umt5Text:
    return Umt5Text(folder, text_dim=text_dim, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a \n\t cat  ", "a cat"),
        ("a &amp;amp; b", "a & b"),
        ("schÃ¶n", "schön"),
        ("\u201ca\u201d", '"a"'),
        ("猫が 歩く", "猫が 歩く"),
    ],
)
def test_cleaning(raw: str, clean: str) -> None:
    assert clean_prompt(raw) == clean


def test_the_embedding_ends_with_the_text(folder: Path) -> None:
    encoder = umt5(folder)
    short = encoder.encode("a cat", 12)
    assert short.embedding.shape == (12, 32)
    assert short.cut == ""
    ends = [
        int(encoder.encode(text, 12).embedding.abs().sum(1).nonzero()[-1]) + 1 for text in ("a", "a cat", "a cat in")
    ]
    assert ends == [2, 3, 4]  # one token a word, and the closing one
    assert torch.equal(encoder.encode(" a\ncat ", 12).embedding, short.embedding)
    # the padding is masked: its length changes nothing
    torch.testing.assert_close(encoder.encode("a cat", 20).embedding[:3], short.embedding[:3])


def test_what_is_cut(folder: Path) -> None:
    encoder = umt5(folder)
    words = "a cat in the snow at night"
    assert encoder.encode(words, 8).cut == ""
    assert encoder.encode(words, 7).cut == "night"
    assert encoder.encode(words, 4).cut == "the snow at night"
    assert torch.equal(encoder.encode(words, 4).embedding, encoder.encode("a cat in", 4).embedding)


def held(encoder: Umt5Text) -> bool:
    return encoder._loaded is not None


def test_released_memory_comes_back_and_known_texts_need_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = umt5(folder)
    first = encoder.encode("a cat", 8).embedding
    encoder.release()
    assert not held(encoder)
    assert encoder.encode("a cat", 8).embedding is first
    assert not held(encoder)
    encoder.encode("a dog", 8)
    assert held(encoder)
    monkeypatch.setattr(text_module, "REMEMBERED", 1)
    encoder.encode("a bird", 8)
    assert torch.equal(encoder.encode("a cat", 8).embedding, first)
    assert len(encoder._known) == 1


@pytest.mark.parametrize("plenty", [False, True])
def test_a_run_releases_the_encoder_unless_there_is_plenty_of_room(plenty: bool, folder: Path) -> None:
    pipeline = helios.load(folder, backend="reference")
    *both, free = pipeline._room
    assert sum(both) < KEPT * free  # where a test runs, there is
    room = math.ceil(sum(both) / KEPT) - (not plenty)
    pipeline.__dict__["_room"] = (*both, room)
    settings: Any = {"height": 64, "width": 64, "steps": 1, "max_sequence_length": 8}
    stream = pipeline.stream("a cat", chunks=2, **settings)
    next(stream)
    assert isinstance(pipeline.text, Umt5Text)
    assert held(pipeline.text) is plenty
    assert len(list(stream)) == 1
    assert held(pipeline.text) is plenty
    pipeline.release()
    assert not held(pipeline.text)


def test_no_progress_bars(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    umt5(folder).encode("a cat", 8)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_encoder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gives embeddings of 32 numbers, the transformer takes 16"):
        umt5(folder, text_dim=16).encode("a", 8)
    with pytest.raises(CheckpointError, match="text_encoder is not a folder"):
        umt5(tmp_path).encode("a", 8)
    shutil.copytree(folder / "text_encoder", tmp_path / "text_encoder")
    with pytest.raises(CheckpointError, match="text encoder or tokenizer cannot be read"):
        umt5(tmp_path).encode("a", 8)


def test_the_stand_in_tells_texts_apart_and_nothing_more() -> None:
    encoder = StandInText(16)
    one, two = (encoder.encode(text, 6).embedding for text in ("a cat", "a dog"))
    assert one.shape == (6, 16)
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])
    assert not one[3:].any()
    assert torch.equal(StandInText(16).encode(" a  cat", 6).embedding, one)
    assert encoder.encode("a b c d e f", 6).cut == "f"
    assert encoder.encode("a b c d e", 6).cut == ""
    assert "no language model" in encoder.origin
    encoder.release()


def test_without_an_encoder_only_embeddings_will_do() -> None:
    with pytest.raises(InputError, match="no text encoder") as error:
        NoText().encode("a", 8)
    assert "prompt_embeds" in error.value.fix
