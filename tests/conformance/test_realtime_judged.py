"""What the checks of the level realtime judge of a run, and what they measure beside it."""

from __future__ import annotations

import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from realtime_report import CEILINGS, ID, ROOT, facts, record, sha, told_lines

from helios.errors import InputError
from helios_conformance.case import Observation
from helios_conformance.realtime import (
    ceilings,
    checks,
    clocks,
    roofline,
    section,
    sensors,
    soak,
    timed,
    varied,
)
from helios_conformance.realtime.options import Options
from helios_conformance.references import References


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda f: f.pop("told"), "nobody outside the worker took the time"),
        (lambda f: f["told"].pop(4), "nobody outside the worker took the time"),
        (lambda f: f["told"][2].__setitem__(0, "soon"), "nobody outside the worker took the time"),
        (lambda f: f.update(seconds=1.0), "the worker's clock says"),
        (lambda f: f.update(drain=3.0), "after the clock had stopped"),
        (lambda f: f["rehashed"][0].__setitem__(1, sha(1)), "its frames changed after the clock had stopped"),
        (lambda f: f["checked"].pop(0), "the first chunks were not made again"),
        (lambda f: f["checked"][3].__setitem__(1, sha(1)), "made again without the clock it is another"),
        (lambda f: f["chunks"][9].update(frames=sha("f", 8)), "two chunks of the video are the same"),
        (lambda f: f["looks"].update(finite=False), "not finite"),
        (lambda f: f["looks"].update(latents_std=[0.0, 1.0]), "latents are degenerate"),
        (lambda f: f["looks"].update(latents_std=[1.0, None]), "latents are degenerate"),
        (lambda f: f["looks"].update(frames_std=[0.0, 9.0]), "frames are degenerate"),
        (lambda f: f["looks"].update(changed=0.001), "change from one chunk to another"),
        (lambda f: f["looks"].update(distinct=1), "all frames of a chunk are the same picture"),
        (lambda f: f.update(other=sha("l", 3)), "another prompt and seed gave a chunk of this video"),
        (lambda f: f["setting"].update(seed=1), "seed is 1"),
        (lambda f: f["setting"].update(steps=[2, 2, 2]), "steps is"),
        (lambda f: f["chunks"][5]["split"].update(denoise=99.0), "the parts of a chunk take longer"),
        (lambda f: f["shown"].update(chunk=f["shown"]["chunk"] + 1), "was wanted"),
        (lambda f: f["shown"].update(frames=[sha("frame")] * 33), "has 1 different frames"),
        (lambda f: f.update(checked=[row for row in f["checked"] if row[0] != f["shown"]["chunk"]]), "not made again"),
    ],
)
def test_a_timed_run_fails_for_each_of_its_reasons(change: Callable[[dict[str, Any]], Any], wanted: str) -> None:
    case = next(c for c in checks.Timed().cases("bf16") if c.id == ID)
    right = facts(weights="checkpoint")
    assert timed.judge(case, Observation(facts=right), ROOT, References({})).state == "pass"
    change(right)
    verdict = timed.judge(case, Observation(facts=right), ROOT, References({}))
    assert verdict.state == "fail"
    assert wanted in verdict.reason


def turns(repeated: float, other: float, count: int = 5) -> dict[str, Any]:
    rows, lines, at = [], [], 0.0
    for i in range(count):
        for kind, seconds in (("repeated", repeated), ("varied", other)):
            latents = sha("same") if kind == "repeated" else sha("varied", i)
            rows.append({"kind": kind, "turn": i, "seconds": seconds, "latents": latents})
            of = {"of": f"{kind} {i}"}
            lines += [
                [at, {"event": "begin", **of}],
                [at + seconds, {"event": "chunk", "index": 0, "latents": latents, **of}],
            ]
            at += seconds + 0.1
    return {"turns": rows, "told": lines}


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (turns(1.0, 1.08), ""),
        (turns(1.0, 1.2), "1.20 times as long"),
        (turns(0.05, 1.0), "20.00 times as long"),
        ({**turns(1.0, 1.0), "told": []}, "nobody outside the worker"),
    ],
)
def test_varied_prompts_may_be_a_tenth_slower(made: dict[str, Any], wanted: str) -> None:
    case = next(iter(checks.Varied().cases("bf16")))
    verdict = varied.judge(case, Observation(facts=made))
    assert verdict.state == ("fail" if wanted else "pass")
    assert wanted in verdict.reason


def test_a_prompt_that_changes_nothing_and_a_request_that_gives_something_else_fail() -> None:
    case = next(iter(checks.Varied().cases("bf16")))
    for kind, wanted in (("varied", "a prompt or a result was kept"), ("repeated", "gave different latents")):
        made = turns(1.0, 1.0)
        row = next(r for r in made["turns"] if r["kind"] == kind)
        row["latents"] = sha("same") if kind == "varied" else sha("else")
        line = next(line for _, line in made["told"] if line["of"] == f"{kind} 0" and line["event"] == "chunk")
        line["latents"] = row["latents"]
        verdict = varied.judge(case, Observation(facts=made))
        assert wanted in verdict.reason


def long_run(rss: list[int], latencies: list[float]) -> dict[str, Any]:
    shots = [
        {"index": i, "seconds": s, "rss": r, "device": None, "latents": sha("l", i), "finite": True, "std": 1.0}
        for i, (s, r) in enumerate(zip(latencies, rss, strict=True))
    ]
    total = sum(latencies)
    return {"chunks": shots, "seconds": total, "asked": total, "sensors": None, "told": told_lines("soak", latencies)}


def test_the_long_run_judges_memory_and_shows_the_drift() -> None:
    case = next(iter(checks.Soak().cases("bf16")))
    latencies = [1.0] * 60 + [1.4] * 20
    right = long_run([4_000_000_000] * 80, latencies)
    assert soak.judge(case, Observation(facts=right)).state == "pass"
    told = soak.summary(right)
    assert told is not None
    assert told["drift"]["p99"] == pytest.approx(1.4)
    leak = long_run([4_000_000_000 + 10_000_000 * i for i in range(80)], latencies)
    verdict = soak.judge(case, Observation(facts=leak))
    assert "host memory grew by 590 MB" in verdict.reason
    right["asked"] = 1800.0
    assert "asked were 1800 s" in soak.judge(case, Observation(facts=right)).reason


def test_the_parent_hears_a_video_only_in_order() -> None:
    lines = told_lines("timed", [1.0, 2.0])
    heard = clocks.heard(lines, "timed")
    assert heard is not None
    assert heard.latencies == [1.0, 2.0]
    assert heard.seconds == 3.0
    assert clocks.heard(lines, "other") is None
    assert clocks.heard([*lines[:2], [0.0, lines[2][1]]], "timed") is None  # time does not run backwards
    assert clocks.heard([*lines, lines[0]], "timed") is None  # nothing begins twice
    assert clocks.heard([[float("nan"), lines[0][1]], *lines[1:]], "timed") is None
    assert clocks.heard("told", "timed") is None


def test_ceilings_stand_on_the_shapes_of_the_published_size() -> None:
    found = ceilings.shapes(Options(), "distilled", "bf16")
    named = {(s.what, str(s)) for s in found}
    assert ("linear", "1×11040×5120 · 13824×5120 bfloat16") in named
    assert ("attention", "1×11040×40×128 bfloat16") in named
    assert {s.what for s in found} == set(ceilings.KINDS)
    assert {s.dtype for s in found if s.what == "conv3d"} == {"float32"}
    half = ceilings.shapes(Options(), "distilled", "bf16", torch.bfloat16)
    assert {s.dtype for s in half if s.what == "conv3d"} == {"bfloat16"}
    assert all(s.moved >= 128 << 20 for s in found if s.what == "copy")
    assert all(s.moved <= ceilings.LARGEST for s in found)


def test_what_a_chunk_costs_is_counted_from_the_shapes_alone() -> None:
    flops = roofline.chunk_flops("14b", "distilled", 384, 640, 512, (1, 1, 1))
    assert {kind: round(n / 1e12) for kind, n in flops.items()} == {"linear": 410, "attention": 128, "conv3d": 69}
    least = roofline.least_seconds(flops, CEILINGS)
    assert least == pytest.approx(410.3e12 / 7.5e14 + 128.0e12 / 6e14 + 69.0e12 / 3e14, rel=1e-3)
    with pytest.raises(InputError):
        roofline.chunk_flops("14b", "distilled", 384, 640, 512, (1, 1))


def test_the_drivers_tool_is_read_as_far_as_it_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda: Any = types.SimpleNamespace(device=torch.device("cuda", 1))
    asked: list[list[str]] = []

    def answer(command: list[str], **how: Any) -> Any:
        asked.append(command)
        return types.SimpleNamespace(stdout="1980, 2619, [N/A], 61\n")

    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("subprocess.run", answer)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: types.SimpleNamespace(uuid="ab-12"))
    with sensors.Sensors(cuda, period=0.01) as watched:
        time.sleep(0.1)
    told = watched.told()
    assert told is not None
    assert asked[0][1] == "--id=GPU-ab-12"
    assert told["clock_mhz"] == {"first": 1980.0, "last": 1980.0, "min": 1980.0, "mean": 1980.0, "max": 1980.0}
    assert told["temperature_c"]["max"] == 61.0
    assert "power_w" not in told
    monkeypatch.setattr("subprocess.run", lambda command, **how: 1 / 0)
    with sensors.Sensors(cuda) as broken:
        pass
    assert broken.told() is None


def test_options() -> None:
    made = Options.of({"size": "mini", "soak": "30m", "steps": "2,2,2", "height": None, "stranger": 1})
    assert (made.size, made.soak, made.steps, made.height) == ("mini", 1800.0, (2, 2, 2), 384)
    for wrong in (
        {"size": "15b"},
        {"soak": "long"},
        {"chunks": 0},
        {"chunks": 1.5},
        {"steps": "3,3,3"},
        {"height": True},
    ):
        with pytest.raises(InputError):
            Options.of(wrong)


@pytest.mark.parametrize("name", ["realtime_timed", "realtime_varied", "realtime_soak", "realtime_ceilings"])
@pytest.mark.parametrize("wrong", [{}, {"setting": 3}, {"turns": 1, "told": {}}, {"chunks": None, "rows": [None]}])
def test_whatever_a_worker_hands_back_fails_with_a_sentence(name: str, wrong: dict[str, Any]) -> None:
    found = next(c for c in checks.CHECKS if c.name == name)
    case = next(iter(found.cases("fp32")))
    verdict = found.judge(case, Observation(facts=wrong), ROOT, References({}))
    assert verdict.state == "fail"
    assert verdict.reason
    assert section([record(name, case.id, wrong)], {"device": None}) is None
