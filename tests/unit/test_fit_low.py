"""Predictions for little memory: what stays on the device, what crosses the bus, and how fast that can be at most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest

from helios.backend import Backend
from helios.fit import devices, low
from helios.fit.costs import Setting
from helios.fit.estimate import RESERVE, Work, count_work
from helios.fit.low import LEFT_FREE, RATES, SLOTS, fit_low, offers_low
from helios.model.presets import SIZES, VARIANTS

GB = 10**9


@pytest.fixture(scope="module")
def work() -> Work:
    return count_work(Setting(SIZES["14b"], VARIANTS["distilled"]))


def test_steps_read_all_weights_but_those_of_the_prompt(work: Work) -> None:
    """The text keys and values of 40 layers, 5120 × 5120 each; and the embedding of the text, small beside them."""
    layers = 40 * 2 * 5120 * 5120 * 2
    assert layers < work.weights - work.step_weights < 1.1 * layers


def test_a_card_of_24_gb(work: Work) -> None:
    memory = devices.find("rtx4090").memory
    found = fit_low(work, memory, 3, 4)
    assert found.fit.fits
    assert found.fit.apart
    assert found.resident == int(memory * (1 - RESERVE)) - LEFT_FREE
    assert found.resident + found.fetched == work.step_weights
    assert found.seconds == found.fetched / RATES[4]
    assert found.fps == pytest.approx(33 / (3 * found.seconds))
    parts = {part.name: part for part in found.fit.parts}
    assert parts["transformer weights"].step == found.resident
    assert parts["transformer weights"].encode == 0
    assert parts["weights on their way from the host"].step == SLOTS
    assert dict(found.fit.host)["weights kept for the device"] == work.weights - found.resident


def test_more_forwards_and_a_slower_bus_cost_frames(work: Work) -> None:
    memory = devices.find("rtx4090").memory
    base = fit_low(work, memory, 3, 5).fps
    assert fit_low(work, memory, 6, 5).fps == pytest.approx(base / 2)
    assert fit_low(work, memory, 3, 4).fps == pytest.approx(base * 25 / 55)
    assert (fit_low(work, memory, 3).fps, fit_low(work, memory, 3).seconds) == (0.0, 0.0)


def test_nothing_is_fetched_where_all_has_room(work: Work) -> None:
    found = fit_low(work, 80 * GB, 3, 5)
    assert (found.resident, found.fetched, found.fps) == (work.weights, 0, 0.0)
    assert all(part.name != "weights on their way from the host" for part in found.fit.parts)
    assert fit_low(work, int((work.step_weights + LEFT_FREE) / (1 - RESERVE)) + 2, 3).fetched == 0


def test_too_little_is_too_little(work: Work) -> None:
    found = fit_low(work, 8 * GB, 3, 4)
    assert found.resident == 0
    assert not found.fit.fits


def test_a_backend_says_whether_it_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not offers_low("reference:cuda")
    assert not offers_low("nobody")

    class Card(Backend):
        name = "card"
        options: ClassVar[Mapping[str, tuple[str, ...]]] = {"memory": ("full", "low")}

    monkeypatch.setattr(low.backends, "load", lambda name: {"card": Card}[name])
    assert offers_low("card:1")
    monkeypatch.setattr(Card, "options", {"memory": ("full", "half")})
    assert not offers_low("card")


def test_every_card_of_the_backend_that_has_it_has_a_bus() -> None:
    assert {device.pcie for device in devices.table().values() if device.backend == "cuda"} == {4, 5}
    assert set(RATES) >= {4, 5}
