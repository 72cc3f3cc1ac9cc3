"""What lies beside whole entries in the folder of engines: JSON of something else, and what was left behind."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from trt_product import Weights, builds, only, opened, unit
from trt_strict import Strict

from helios_trt.store import Store

FACTS = {
    "format": "helios-trt-1",
    "environment": {"model": "", "tensorrt": "11.4.0.106", "device": {"name": "a GPU", "capability": "9.0"}},
    "graphs": {"other": ""},
    "bytes": 0,
    "seconds": 1.5,
    "sha256": "",
}


def test_entry_is_what_its_json_says(tmp_path: Path) -> None:
    (tmp_path / "other-0.json").write_text(json.dumps(FACTS))
    assert [entry.name for entry in Store(tmp_path).entries()] == ["other-0"]


@pytest.mark.parametrize(
    "facts",
    [
        [],
        {**FACTS, "environment": None},
        {**FACTS, "environment": {**FACTS["environment"], "device": None}},  # type: ignore[dict-item]
        {**FACTS, "environment": {**FACTS["environment"], "device": {}}},  # type: ignore[dict-item]
        {**FACTS, "bytes": "many"},
        *({key: value for key, value in FACTS.items() if key != left_out} for left_out in FACTS),
    ],
)
def test_foreign_json_in_the_folder_is_passed_over(make: Any, tmp_path: Path, facts: Any) -> None:
    (tmp_path / "other-0.json").write_text(json.dumps(facts))
    opened(make(), unit(), Weights(1))
    assert [entry.name for entry in Store(tmp_path).entries()] == [only(tmp_path).stem]


def test_entry_that_is_removed_while_all_are_listed(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(make(), unit(), Weights(1))
    opened(make(), unit(), Weights(2))
    first, second = sorted(path.stem for path in tmp_path.glob("*.json"))
    true = Store.entry

    def evicted(self: Store, name: str) -> Any:
        found = true(self, name)
        if name == first:
            (tmp_path / f"{name}.json").unlink()
        return found

    monkeypatch.setattr(Store, "entry", evicted)
    assert [entry.name for entry in Store(tmp_path).entries()] == [second]


def test_engine_whose_json_was_never_written_is_removed_at_the_next_start(
    make: Any, strict: Strict, tmp_path: Path
) -> None:
    """A process was killed between two renames, or while it removed the entry: nothing counts such a file."""
    opened(make(), unit(), Weights(1))
    orphan = only(tmp_path)
    orphan.with_suffix(".json").unlink()
    opened(make(), unit(), Weights(2))
    assert not orphan.exists()
    assert only(tmp_path).with_suffix(".json").exists()
    assert builds(strict) == 2


@pytest.mark.parametrize("doing", ["use", "build"])
def test_engine_without_json_stays_while_somebody_has_it(tmp_path: Path, doing: str) -> None:
    tmp_path.joinpath("x-0.engine").touch()
    other = Store(tmp_path)
    with other.turn("x-0") if doing == "build" else contextlib.nullcontext():
        if doing == "use":
            other.hold("x-0")
        assert Store(tmp_path).clean() == []
        assert only(tmp_path).stem == "x-0"
    del other
    assert Store(tmp_path).clean() == ["x-0"]
    assert not list(tmp_path.glob("*.engine"))


def test_engine_that_gets_its_json_before_its_turn_comes_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process puts it between the first look and the lock."""
    tmp_path.joinpath("x-0.engine").touch()
    true = Store.turn

    def turn(self: Store, name: str, *, wait: bool = True) -> Any:
        (tmp_path / "x-0.json").write_text(json.dumps(FACTS))
        return true(self, name, wait=wait)

    monkeypatch.setattr(Store, "turn", turn)
    assert Store(tmp_path).clean() == []
    assert only(tmp_path).with_suffix(".json").exists()
