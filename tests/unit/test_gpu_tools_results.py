"""The log that a run goes on with, the clock, the timer, and the sums, on made-up figures."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "tools" / "gpu"
HEADER = {"part": "ceilings", "device": "H100", "torch": "2.11", "commit": "a"}


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def item(id_: str, run: Any = lambda: {"ms_median": 1.0}, **more: Any) -> Any:
    return script("results").Item(id_, "work", "row", "column", run, **more)


def take(path: Path, items: list[Any], header: dict[str, Any] = HEADER, budget: float = 100.0) -> dict[str, Any]:
    results = script("results")
    log = results.Results(path, header)
    results.run_items(items, log, results.Clock(budget, lambda: 0.0))
    records: dict[str, Any] = log.records
    return records


def test_what_failed_or_was_not_there_is_tried_again_and_what_is_finished_is_not(tmp_path: Path) -> None:
    results, path = script("results"), tmp_path / "ceilings.jsonl"
    runs: list[str] = []

    def run(name: str, error: Exception | None) -> dict[str, float]:
        runs.append(name)
        if error is not None:
            raise error
        return {"ms_median": 1.0}

    first = [
        item("fine", lambda: run("fine", None)),
        item("absent", lambda: run("absent", results.NotThereError("no library"))),
        item("broken", lambda: run("broken", ValueError("odd\nmore"))),
    ]
    found = take(path, first)
    assert {name: record["status"] for name, record in found.items()} == {
        "fine": "measured",
        "absent": "not there",
        "broken": "failed",
    }
    assert found["absent"]["why"] == "not there: no library"
    assert found["broken"]["why"] == "ValueError: odd"
    runs.clear()
    take(path, [item(name, lambda name=name: run(name, None)) for name in ("fine", "absent", "broken")])
    assert runs == ["absent", "broken"]


@pytest.mark.parametrize(
    ("changed", "again"), [({"torch": "2.12"}, True), ({"device": "H200"}, True), ({"commit": "b"}, False)]
)
def test_figures_of_another_machine_do_not_count(tmp_path: Path, changed: dict[str, str], again: bool) -> None:
    path, runs = tmp_path / "ceilings.jsonl", itertools.count()
    take(path, [item("one", lambda: {"ms_median": next(runs)})])
    take(path, [item("one", lambda: {"ms_median": next(runs)})], {**HEADER, **changed})
    assert next(runs) == (2 if again else 1)
    headers = [json.loads(line)["header"] for line in path.read_text().splitlines() if "header" in line]
    assert headers == [HEADER, {**HEADER, **changed}]


def test_nothing_is_begun_that_there_is_no_time_for(tmp_path: Path) -> None:
    long, short = item("long", seconds=30.0), item("short", seconds=5.0)
    found = take(tmp_path / "log.jsonl", [long, short], budget=10.0)
    assert found["long"]["why"] == "not measured: out of time"
    assert found["long"]["status"] == "not measured"
    assert found["short"]["status"] == "measured"
    assert take(tmp_path / "log.jsonl", [long, short], budget=100.0)["long"]["status"] == "measured"


def test_the_clock_counts_down() -> None:
    times = iter([5.0, 6.0, 20.0])
    clock = script("results").Clock(10.0, lambda: next(times))
    assert [clock.left(), clock.left()] == [9.0, -5.0]


def test_what_takes_the_device_with_it_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, path = script("results"), tmp_path / "log.jsonl"

    def crash() -> dict[str, float]:
        raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(results, "_device_lives", lambda: False)
        with pytest.raises(results.DeviceLostError, match="bad"):
            take(path, [item("bad", crash), item("next")])
    found = take(path, [item("bad", crash), item("next")])
    assert found["bad"]["status"] == "died"
    assert "illegal memory access" in found["bad"]["why"]
    assert found["next"]["status"] == "measured"


def test_what_kills_its_process_is_begun_twice_at_most(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"

    class Killed(BaseException):
        """Stands for a process that ends at once: nothing is written after it."""

    def kill() -> dict[str, float]:
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            take(path, [item("bad", kill), item("next")])
    with path.open("a") as file:
        file.write('{"id": "half a li')
    found = take(path, [item("bad", kill), item("next")])
    assert found["bad"]["status"] == "died"
    assert "begun 2 times" in found["bad"]["why"]
    assert found["next"]["status"] == "measured"


class FakeEvent:
    """An event on a device whose clock stands still unless something runs on it."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1.0

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


@pytest.fixture
def _fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: None, raising=False)


@pytest.mark.usefixtures("_fake_cuda")
@pytest.mark.parametrize("cost", [0.004, 2.0, 40.0])
def test_events_give_the_time_of_one_call_and_inputs_take_turns(cost: float) -> None:
    seen = [0, 0, 0]

    def work(index: int) -> None:
        seen[index] += 1
        FakeEvent.now += cost

    timing = script("timing").measure([lambda i=i: work(i) for i in range(3)], torch.device("cuda"))
    assert [timing.median, timing.least, timing.most] == pytest.approx([cost] * 3, rel=1e-6)
    assert 5 <= timing.n <= 100
    assert max(seen) - min(seen) <= 1
    assert timing.n * cost < 1000


@pytest.mark.usefixtures("_fake_cuda")
def test_what_is_hopelessly_slow_is_not_timed_for_long() -> None:
    calls = itertools.count()

    def work() -> None:
        next(calls)
        FakeEvent.now += 3000.0

    assert script("timing").measure([work], torch.device("cuda")).median == 3000.0
    assert next(calls) <= 5


def test_the_median_is_of_single_times() -> None:
    timing = script("timing").Timing.of([3.0, 1.0, 2.0, 10.0])
    assert timing.record() == {"ms_median": 2.5, "ms_min": 1.0, "ms_max": 10.0, "n": 4}


def record(row: str, column: str, ms: float | None, counts: dict[str, int], status: str = "measured") -> dict[str, Any]:
    known = {"id": f"vae/{column}/{row}", "row": row, "column": column, "counts": counts, "status": status}
    return {**known, "ms_median": ms, "flops": 10**9, "tflops": None if ms is None else 1 / ms}


FAKES = [
    record("a", "one", 2.0, {"vae": 6}),
    record("b", "one", 5.0, {"vae": 1}),
    record("a", "two", 3.0, {"vae": 6}),
    record("b", "two", 1.0, {"vae": 1}),
    record("c", "two", 100.0, {"other": 7}),
    record("a", "three", 0.1, {"vae": 6}, status="wrong"),
]


def test_totals_weigh_each_shape_by_how_often_it_occurs() -> None:
    totals = script("totals")
    one = totals.totals(FAKES, "vae", ["one"])
    assert one["ms"] == 6 * 2.0 + 5.0
    assert one["tflops"] == pytest.approx(7 * 1e9 / 17.0 / 1e9)
    best = totals.totals(FAKES, "vae")
    assert best["ms"] == 6 * 2.0 + 1.0  # the wrong one is faster and does not count
    assert best["choice"] == {"a": "one", "b": "two"}
    assert totals.totals(FAKES, "other")["ms"] == 700.0


def test_a_total_that_lacks_a_shape_is_no_total() -> None:
    total = script("totals").totals([*FAKES, record("d", "one", None, {"vae": 2}, status="failed")], "vae")
    assert total["ms"] is None
    assert total["missing"] == ["d"]
    assert total["measured_ms"] == 13.0
    assert script("totals").totals([], "vae")["ms"] is None


def test_the_chunk_is_the_sum_of_its_parts_and_only_if_all_are_there() -> None:
    part = script("part_ceilings")
    stages = [f"stage{i}" for i in range(3)]
    fakes = [{**record(s, "addmm", 10.0, {s: 2}), "id": f"gemm/addmm/{s}"} for s in stages]
    fakes += [{**record(s, "cudnn BSHD", 5.0, {s: 4}), "id": f"attention/cudnn BSHD/{s}"} for s in stages]
    fakes += [{**record(s, "FA3 fp8", 0.1, {s: 4}), "id": f"attention/FA3 fp8/{s}"} for s in stages]
    fakes.append({**record("conv", "conv3d bf16", 30.0, {"vae": 3})})
    head = {"device": "d", "torch": "t", "driver": "r", "commit": "c"}
    chunk = "a chunk at [1,1,1], products, attention and convolutions alone: 210 ms, 157.1 FPS at most"
    assert chunk in list(part.report(head, fakes))
    assert not any("a chunk" in line for line in part.report(head, fakes[1:]))


def test_a_table_shows_rates_marks_and_reasons() -> None:
    absent = {**record("a", "four", None, {}, "not there"), "why": "not there: no library"}
    text = list(script("totals").table("convolutions", [*FAKES, absent]))
    assert text[0] == "-- convolutions"
    assert text[1].split() == ["one", "two", "three"]
    assert text[2].split() == ["a", "0.5", "0.3", "WRONG"]
    assert text[4].split() == ["c", ".", "0.0", "."]
    assert text[-1] == "four: not there: no library"
    assert script("totals").problems(FAKES) == ["WRONG vae/three/a: error None"]


def test_shares_are_of_the_data_sheet_and_of_nothing_for_an_unknown_device() -> None:
    rig = script("rig")
    h100 = rig.Rig(torch.device("cuda"), False, "NVIDIA H100 80GB HBM3")
    assert h100.share(494.5, None, "bfloat16") == "0.50 of 989 TFLOP/s, data sheet"
    assert h100.share(989.0, None, "float8_e4m3fn").startswith("0.50 of 19")
    assert h100.share(None, 3350.0, "bfloat16") == "1.00 of 3350 GB/s, data sheet"
    assert h100.share(50.0, None, "float32") == ""
    assert rig.Rig(torch.device("cuda"), False, "abacus").share(1.0, None, "bfloat16") == ""
