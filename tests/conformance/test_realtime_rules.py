"""The rules of the level realtime on figures that no device made: classes, published speeds, contradictions."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helios.errors import InputError
from helios.fit import devices
from helios_conformance.case import Observation
from helios_conformance.draws import Root
from helios_conformance.realtime import (
    ceilings,
    check,
    checks,
    classes,
    clocks,
    roofline,
    section,
    sensors,
    shortcomings,
    shown,
    soak,
    targets,
    timed,
    varied,
)
from helios_conformance.realtime.options import Options
from helios_conformance.realtime.scene import prompt_of, seed_of
from helios_conformance.references import References

ROOT = Root(3, "nonce")
H100 = "NVIDIA H100 80GB HBM3"
ID = "realtime[bf16,distilled,1-1-1]"


def sha(*labels: object) -> str:
    return hashlib.sha256(repr(labels).encode()).hexdigest()


def told_lines(label: str, latencies: list[float], start: float = 5.0) -> list[list[Any]]:
    at, lines = start, [[start, {"event": "begin", "of": label}]]
    for i, seconds in enumerate(latencies):
        at += seconds
        chunk = {"event": "chunk", "of": label, "index": i, "frames": sha("f", i), "latents": sha("l", i)}
        lines.append([at, chunk])
    return [*lines, [at, {"event": "end", "of": label, "chunks": len(latencies)}]]


def facts(chunk: float = 2.8, chunks: int = 50, **setting: Any) -> dict[str, Any]:
    """A right run of the published size, that many seconds a chunk."""
    latencies = [1.6 * chunk, *[chunk] * (chunks - 1)]
    parts = {"text": 0.0, "history": 0.01 * chunk, "denoise": 0.7 * chunk, "decode": 0.2 * chunk}
    shots = [
        {"index": i, "seconds": s, "hash": 0.01, "frames": sha("f", i), "latents": sha("l", i), "split": dict(parts)}
        | {"rss": 3_000_000_000, "device": 40_000_000_000}
        for i, s in enumerate(latencies)
    ]
    run = {"size": "14b", "variant": "distilled", "steps": [1, 1, 1], "amplify": True, "height": 384, "width": 640}
    run |= {
        "tokens": 512,
        "batch": 1,
        "precision": "bf16",
        "weights": "random",
        "model": "",
        "text": "",
        "emulated": "",
    }
    run |= {"asked": {"chunks": 45, "seconds": 120.0}, "prompt": prompt_of(ROOT, ID), "seed": seed_of(ROOT, ID)}
    seen = shown.drawn(ROOT, ID, shots[-1]["latents"], min(chunks, 64))
    return {
        "setting": run | setting,
        "load_seconds": 90.0,
        "warmup": {"chunks": 2, "seconds": 3 * chunk},
        "chunks": shots,
        "seconds": sum(latencies),
        "drain": 0.01,
        "rehashed": [[0, sha("f", 0)], [chunks - 1, sha("f", chunks - 1)]],
        "looks": {"finite": True, "latents_std": [0.9, 1.1], "frames_std": [40.0, 60.0], "changed": 1.0}
        | {"distinct": 33, "of": chunks},
        "memory": {"host": 3_000_000_000, "device": 40_000_000_000},
        "sensors": None,
        "checked": [[i, sha("f", i), sha("l", i)] for i in (0, 1, 7, chunks - 1, seen)],
        "shown": {"chunk": seen, "frames": [sha("frame", i) for i in range(33)]},
        "vae": {"group": 9},
        "opened": None,
        "other": sha("other"),
        "profile": [
            {"entry": "denoise.2", "op": "linear", "dtype": "bfloat16", "nodes": 1}
            | {"flops": 2 * 10**14, "bytes": 10**10, "seconds": 0.4 * chunk},
            {"entry": "decode", "op": "conv3d", "dtype": "float32", "nodes": 1}
            | {"flops": 6 * 10**13, "bytes": 10**10, "seconds": 0.2 * chunk},
        ],
        "told": told_lines("timed", latencies),
    }


def ceiling(what: str, best: float, unit: str = "FLOP/s") -> dict[str, Any]:
    told = {
        "what": what,
        "shape": "",
        "dtype": "bfloat16",
        "source": "torch on cuda",
        "rate": 0.97 * best,
        "best": best,
    }
    return told | {"unit": unit, "seconds": 1.5, "windows": 10}


CEILINGS = [
    ceiling("linear", 7.5e14),
    ceiling("attention", 6e14),
    ceiling("conv3d", 3e14),
    ceiling("copy", 3e12, "B/s"),
]


def record(check_name: str, case: str, told: dict[str, Any], state: str = "pass") -> dict[str, Any]:
    one = {"id": case, "level": "realtime", "check": check_name, "precision": "bf16", "required": True, "state": state}
    return one | {"reason": "", "seconds": 1.0, "facts": told, "coverage": [["linear", 300, 20, 0, ""]], "outputs": {}}


def report(told: dict[str, Any] | None = None, device: str = H100, emulated: str = "") -> dict[str, Any]:
    cases = [
        record("realtime_ceilings", "ceilings[bf16,distilled]", {"rows": copy.deepcopy(CEILINGS)}),
        record("realtime_timed", ID, told or facts()),
    ]
    whole: dict[str, Any] = {"cases": cases, "backend": {"device": {"name": device}, "emulated": emulated}}
    whole |= {"weights": {"origin": "random"}, "scope": {"precision": "bf16"}, "coverage": []}
    whole["realtime"] = section(cases, whole["backend"])
    copied: dict[str, Any] = json.loads(json.dumps(whole, allow_nan=False))
    return copied


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


def test_a_right_report_has_no_contradiction() -> None:
    whole = report()
    assert check(whole["realtime"], whole) == []
    assert shortcomings(whole["realtime"]) == ["repeated and varied prompts were not compared"]


def edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set what a path names, in the section's primary run and in its list of runs alike."""

    def change(whole: dict[str, Any]) -> None:
        for one in (whole["realtime"], whole["realtime"]["runs"][0]):
            *keys, last = path.split(".")
            functools.reduce(lambda part, key: part[key], keys, one)[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("fps.steady", 24.5),
        ("fps.wall", 30.0),
        ("latency.p99", 0.9),
        ("latency.chunks", [1.0] * 50),
        ("class", "playback"),
        ("class", "published"),
        ("size", "14B"),
        ("steps", [1, 1, 2]),
        ("chunks", 500),
        ("seconds", 1e9),
        ("full_length", False),
        ("published", None),
        ("split.decode", 0.0),
        ("parent_clock.worker_seconds", 1.0),
        ("roofline", []),
        ("least_seconds", 0.0),
        ("weights", "checkpoint"),
        ("amplify", False),
    ],
)
def test_no_edit_of_the_section_stands(path: str, value: Any) -> None:
    whole = report()
    edit(path, value)(whole)
    assert check(whole["realtime"], whole)


def both(told: dict[str, Any], device: str = H100) -> list[str]:
    """What is wrong with a report whose section was made from records that were edited as well."""
    whole = report(told, device)
    return check(whole["realtime"], whole)


def test_a_speed_above_the_ceilings_is_refused_though_all_else_agrees() -> None:
    assert both(facts(0.9, 200)) == []  # 36 FPS of at most 51
    wrong = both(facts(0.3, 500))
    assert len(wrong) == 1
    assert "110.00 FPS, and the measured ceilings allow" in wrong[0]


def test_a_ceiling_above_the_data_sheet_is_refused() -> None:
    whole = report()
    whole["cases"][0]["facts"]["rows"][0]["best"] = 1.2e15
    whole["realtime"] = section(whole["cases"], whole["backend"])
    wrong = check(whole["realtime"], whole)
    assert len(wrong) == 1
    assert "the data sheet of NVIDIA H100 SXM 80GB has 9.89e+14" in wrong[0]
    whole["backend"]["device"]["name"] = "a device without data sheet"
    whole["realtime"] = section(whole["cases"], whole["backend"])
    assert check(whole["realtime"], whole) == []


def test_a_patched_timer_contradicts_the_parents_clock() -> None:
    told = facts()
    told["seconds"] /= 10
    assert any("the worker's clock says" in line for line in both(told))


def test_a_timed_run_that_is_not_the_checked_one_is_refused() -> None:
    told = facts()
    told["checked"][2][2] = sha("another")
    assert any("not those of the checked run" in line for line in both(told))
    told = facts()
    told["told"][3][1]["frames"] = sha("another")
    assert any("the parent heard of" in line for line in both(told))


def test_parts_of_a_chunk_that_are_more_than_the_chunk_are_refused() -> None:
    told = facts()
    for shot in told["chunks"]:
        shot["split"]["decode"] = 5.0
    assert any("the parts of a chunk sum to" in line for line in both(told))


def test_weights_and_precision_are_those_of_the_report() -> None:
    whole = report()
    whole["weights"]["origin"] = "checkpoint"
    whole["scope"]["precision"] = "fp32"
    assert len(check(whole["realtime"], whole)) == 2


def test_a_section_without_run_and_a_run_without_section_are_refused() -> None:
    whole = report()
    assert check(None, whole)
    assert check(whole["realtime"], {**whole, "cases": []})
    assert check(None, {**whole, "cases": []}) == []


@pytest.mark.parametrize(
    "hostile", [{}, {"runs": 3}, {"runs": [{}]}, {"runs": [{"case": 1, "latency": {"chunks": []}}]}, 7, "x"]
)
def test_whatever_a_section_holds_nothing_is_raised(hostile: Any) -> None:
    assert check(hostile, report())
    assert check(hostile, {"cases": [{"level": "realtime"}], "backend": None})


def test_hostile_shapes_are_refused_before_anything_is_computed() -> None:
    told = facts(height=10**9, width=10**9)
    whole = report()
    whole["cases"][1]["facts"] = told
    assert any("disagree on whether there was a timed run" in line for line in check(whole["realtime"], whole))


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
