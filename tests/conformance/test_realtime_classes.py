"""Published speeds, and the class that the figures of a run make it."""

from __future__ import annotations

from typing import Any

import pytest
from realtime_report import H100, facts, report

from helios.fit import devices
from helios_conformance.realtime import (
    classes,
    section,
    shortcomings,
    targets,
)


def test_every_row_of_the_table_says_what_was_published_or_that_nothing_was() -> None:
    for name, row in targets.table().items():
        assert bool(row.published) != bool(row.none), name
        assert all(f.wording and f.source and (f.comparable or f.why) for f in row.published), name
        if row.peak:
            assert row.source
            assert devices.recognise(row.aliases[0]) is not None or name.startswith("ascend-910c-p")
    wanted = {
        "h100",
        "h200",
        "a100-80",
        "rtx4090",
        "l20",
        "h20",
        "ascend-910b",
        "ascend-910c-die",
        "ascend-910c-package",
    }
    assert wanted <= set(targets.table())
    aliases = [a.casefold() for row in targets.table().values() for a in row.aliases]
    assert len(set(aliases)) == len(aliases)


def test_peaks_are_those_of_the_one_table_that_has_them() -> None:
    h100 = targets.find("nvidia h100 80gb hbm3")
    assert h100 is not None
    assert (h100.peak, h100.bandwidth) == (devices.find("h100").peak, devices.find("h100").bandwidth)


@pytest.mark.parametrize(
    "name", ["NVIDIA H100", "H100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100 NVL", "cpu", ""]
)
def test_a_name_that_is_not_exactly_the_devices_has_no_published_figure(name: str) -> None:
    assert targets.find(name) is None
    assert classes.published(name, "distilled", [1, 1, 1], 384, 640) is None


def test_a_figure_with_unstated_steps_is_shown_and_never_compared() -> None:
    told = classes.published("NVIDIA B300 SXM6 AC", "distilled", [2, 2, 2], 384, 640)
    assert told is not None
    assert told["fps"] is None
    assert told["others"][0]["fps"] == 14.0
    assert "steps" in told["others"][0]["why"]


@pytest.mark.parametrize(
    ("chunk", "change", "device", "emulated", "wanted"),
    [
        (1.2, {}, H100, "", "measured (short run)"),  # 60 s for 50 chunks
        (2.8, {}, H100, "", "measured"),
        (1.65, {"chunks": 120}, H100, "", "published"),
        (1.65, {"chunks": 120}, "NVIDIA H200", "", "measured"),
        (1.65, {"chunks": 120}, "H100", "", "measured"),
        (1.65, {"chunks": 120, "steps": [2, 2, 2]}, H100, "", "measured"),
        (1.2, {"chunks": 120}, "anything", "", "playback"),
        (1.2, {"chunks": 120, "height": 192, "width": 320}, H100, "", "measured (another picture size)"),
        (1.2, {"chunks": 120, "size": "mini"}, H100, "", "measured (mini)"),
        (1.2, {"chunks": 120, "weights": "checkpoint"}, H100, "", "measured (checkpoint)"),
        (1.2, {"chunks": 120}, H100, "qemu", "measured (emulated)"),
        (3.0, {"chunks": 44}, H100, "", "measured (short run)"),
    ],
)
def test_class(chunk: float, change: dict[str, Any], device: str, emulated: str, wanted: str) -> None:
    made = report(facts(chunk, **change), device, emulated)["realtime"]
    assert made["class"] == wanted
    assert bool(shortcomings(made)) or wanted in ("playback", "published", "measured")


def test_a_fallback_has_no_class_and_a_failed_case_has_no_figures_that_may_stand() -> None:
    whole = report(facts(1.2, 120))
    whole["cases"][1]["coverage"].append(["attention", 0, 0, 40, "no kernel"])
    made = section(whole["cases"], whole["backend"])
    assert made is not None
    assert made["class"] == "measured (fallback)"
    whole["cases"][1]["state"] = "fail"
    made = section(whole["cases"], whole["backend"])
    assert made is not None
    assert made["class"] == "refused"
    assert "did not pass" in shortcomings(made)[0]


def test_a_speed_says_in_what_frames_were_decoded() -> None:
    whole = report(facts(1.2, 120))
    assert whole["realtime"]["vae"] == "fp32"  # of a run that does not say
    whole["cases"][1]["facts"]["vae"] = {"group": 9, "precision": "bf16"}
    made = section(whole["cases"], whole["backend"])
    assert made is not None
    assert made["vae"] == "bf16"


def test_the_section_has_everything_that_a_speed_needs_beside_it() -> None:
    made = report()["realtime"]
    assert made["fps"] == pytest.approx({"steady": 33 / 2.8, "first_chunk": 33 / 4.48, "wall": 33 * 50 / (50.6 * 2.8)})
    assert made["latency"]["p50"] == pytest.approx(2.8)
    assert len(made["latency"]["chunks"]) == made["chunks"] == 50
    assert set(made["split"]) == {"text", "history", "denoise", "decode", "hash"}
    assert made["datasheet"]["bf16"] == 989e12
    assert made["roofline"][-1]["op"] == "all"
    assert made["roofline"][-1]["share"] == pytest.approx(made["roofline"][-1]["predicted"] / 2.8)
    assert made["roofline"][0] == {
        "op": "linear",
        "flops": 2 * 10**14,
        "bytes": 10**10,
        "seconds": pytest.approx(1.12),
        "predicted": pytest.approx(2e14 / (0.97 * 7.5e14)),
        "share": pytest.approx(2e14 / (0.97 * 7.5e14) / 1.12),
        "bound": "linear",
    }
    assert {"warmup", "memory", "clocks", "parent_clock", "published", "full_length", "steps", "amplify"} <= set(made)
