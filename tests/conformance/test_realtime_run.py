"""The level realtime on the size tiny: a right backend, and those who cheat the clock, each of them caught."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from helios import op
from helios.backend import Kernel, ReferenceBackend
from helios.kernel_program import KernelProgram
from helios.lower import compile_kernels
from helios.media import to_frames
from helios.passes import Plan
from helios.program import EMPTY, Context, Program
from helios_conformance import record
from helios_conformance.case import Case, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.realtime import check, checks, film, inside, section, shortcomings
from helios_conformance.references import committed
from helios_conformance.session import Session

ROOT = Root(11, "nonce")
TINY = {"size": "tiny", "height": 64, "width": 64, "tokens": 16, "chunks": 3, "seconds": 0.0, "warmup": 1}
FAST = {"ceiling": 0.01, "pairs": 2, "soak": 0.5}
_monotonic = time.monotonic


def run(check_name: str, backend: ReferenceBackend, precision: str = "fp32") -> tuple[Case, Observation, Verdict]:
    """A case in this process, heard by a parent's clock that no backend can reach."""
    found = next(c for c in checks.CHECKS if c.name == f"realtime_{check_name}")
    case = next(iter(found.cases(precision)))
    told: list[list[Any]] = []
    begin = _monotonic()
    session = Session(backend, ROOT, options=TINY | FAST)
    session.tell = lambda line: told.append([_monotonic() - begin, dict(line)])
    seen = found.observe(case, session)
    seen = dataclasses.replace(seen, facts={**seen.facts, "told": told})
    json.dumps(seen.facts, allow_nan=False)
    return case, seen, found.judge(case, seen, ROOT, committed())


class Wrong(ReferenceBackend):
    """Right until a subclass says how it is wrong: other kernels, or another program."""

    program: ClassVar[type[KernelProgram]] = KernelProgram

    @property
    def kernels(self) -> Mapping[str, Kernel]:  # type: ignore[override]
        return {name: Kernel(op.get(name).fn) for name in op.names()} | {n: Kernel(f) for n, f in self.own().items()}

    def own(self) -> Mapping[str, Callable[..., Any]]:
        return {}

    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        return compile_kernels(plan, self, fallback=fallback, program=self.program)


@pytest.fixture(scope="module")
def right() -> list[tuple[Case, Observation, Verdict]]:
    backend = ReferenceBackend()
    return [run(name, backend, "bf16") for name in ("ceilings", "timed", "varied", "soak")]


def test_a_right_backend_passes(right: list[tuple[Case, Observation, Verdict]]) -> None:
    for case, _, verdict in right:
        # How long a chunk takes here depends on who else computes: that one reason says nothing in a test.
        assert verdict.state == "pass" or verdict.reason.startswith("varied prompts take"), (case.id, verdict.reason)
    wanted = {f"tiny.denoise.{i}" for i in range(3)} | {f"opened.{role}" for role in inside.JUDGED}
    assert set(right[1][2].judged) == wanted | {"shown.frames"}


def test_the_report_of_a_right_backend(right: list[tuple[Case, Observation, Verdict]]) -> None:
    cases = [json.loads(json.dumps(record.record(c, seen, verdict, 1.0))) for c, seen, verdict in right]
    backend = {"device": {"name": "torch cpu"}, "emulated": ""}
    made = json.loads(json.dumps(section(cases, backend), allow_nan=False))
    assert made["class"] == "measured (tiny)"
    assert made["full_length"] is False
    assert made["soak"]["chunks"] >= 1
    assert made["varied"]["turns"] >= 2
    ops = {row["op"] for row in made["roofline"]}
    assert {"all", "conv3d", "attention", "linear"} <= ops
    assert {(row["what"], row["source"]) for row in made["ceilings"] if row["rate"]} >= {
        (what, source)
        for what in ("linear", "attention", "conv3d", "copy")
        for source in ("torch on cpu", "the backend's own kernel")
    }
    whole = {"cases": cases, "backend": backend, "realtime": made, "coverage": []}
    # Ceilings of a hundredth of a second on a host that others share bound nothing; of all else nothing is wrong.
    assert [line for line in check(made, whole) if "ceilings allow" not in line] == []
    assert any("size tiny" in line for line in shortcomings(made))


def test_what_is_judged_is_the_program_that_was_timed(right: list[tuple[Case, Observation, Verdict]]) -> None:
    case, seen, _ = right[1]
    name = "tiny.denoise.1"
    kept = seen.outputs[name]
    worse = dataclasses.replace(kept, values=kept.values * 1.02)
    found = next(c for c in checks.CHECKS if c.name == "realtime_timed")
    for outputs, wanted in (
        ({**seen.outputs, name: worse}, "gain"),
        ({n: k for n, k in seen.outputs.items() if n != name}, "no forward of denoise.1"),
        ({**seen.outputs, name: dataclasses.replace(kept, finite=False)}, "holds NaN or infinity"),
        ({**seen.outputs, name: dataclasses.replace(kept, dtype="float64")}, "came as float64"),
        ({**seen.outputs, name: dataclasses.replace(kept, values=kept.values.double())}, "came as"),
        ({**seen.outputs, name: dataclasses.replace(kept, values=kept.values[:-1])}, "elements are kept"),
    ):
        verdict = found.judge(case, dataclasses.replace(seen, outputs=outputs), ROOT, committed())
        assert verdict.state == "fail"
        assert wanted in verdict.reason


def test_a_patched_timer_disagrees_with_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = types.SimpleNamespace(perf_counter=lambda: 1.0, sleep=time.sleep)

    class Patched(Wrong):
        def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
            monkeypatch.setattr(film, "time", frozen)  # as time.perf_counter of the whole process would be
            return super().compile(plan, fallback=fallback)

        def own(self) -> Mapping[str, Callable[..., Any]]:
            def slow(*args: Any, **attrs: Any) -> Any:
                time.sleep(0.05)  # together more than two clocks of one machine may differ by
                return op.get("dmd_step").fn(*args, **attrs)

            return {"dmd_step": slow}

    _, _, verdict = run("timed", Patched())
    assert verdict.state == "fail"
    assert "the worker's clock says 0.000 s" in verdict.reason


class Replaying(KernelProgram):
    """Computes each entry once and gives that result for ever."""

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        held = self.__dict__.setdefault("held", {})
        if entry not in held:
            held[entry] = super().run(entry, inputs, context)
        kept: dict[str, Tensor] = held[entry]
        return kept


class Memorising(KernelProgram):
    """Keeps results by the bits of what they were made of: right, and fast on what comes back."""

    known: ClassVar[dict[str, dict[str, Tensor]]] = {}

    def run(self, entry: str, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> dict[str, Tensor]:
        sha = hashlib.sha256(entry.encode())
        for name, tensor in sorted({**context.values, **inputs}.items()):
            sha.update(name.encode())
            sha.update(tensor.detach().float().contiguous().numpy().tobytes())
        key = f"{id(self)} {sha.hexdigest()}"
        if key not in self.known:
            time.sleep(0.02)  # so that what is saved shows on a host that others share
            self.known[key] = super().run(entry, inputs, context)
        return self.known[key]


class StalePrompt(KernelProgram):
    """Text keys and values of the first prompt serve all."""

    def bind(self, inputs: Mapping[str, Tensor], context: Context = EMPTY) -> Context:
        if "text" not in inputs:
            return super().bind(inputs, context)
        if "held" not in self.__dict__:
            self.held = super().bind(inputs, context)
        return self.held


def with_program(kind: type[KernelProgram]) -> Wrong:
    return type(kind.__name__, (Wrong,), {"program": kind})()  # type: ignore[no-any-return]


def test_a_replayed_chunk_is_caught() -> None:
    _, _, verdict = run("timed", with_program(Replaying))
    assert verdict.state == "fail"
    assert "two chunks of the video are the same" in verdict.reason
    assert "another prompt and seed gave a chunk of this video" in verdict.reason


def test_results_kept_for_a_request_that_comes_back_are_caught() -> None:
    Memorising.known.clear()
    _, seen, verdict = run("varied", with_program(Memorising))
    assert verdict.state == "fail"
    assert "times as long as a repeated one" in verdict.reason
    assert len(seen.facts["turns"]) > 2 * 2 + 1, "more turns are taken before anyone is accused"


def test_a_stale_prompt_is_caught() -> None:
    _, _, verdict = run("varied", with_program(StalePrompt))
    assert verdict.state == "fail"
    assert "a prompt or a result was kept" in verdict.reason


def test_degenerate_outputs_are_caught() -> None:
    class Silent(Wrong):
        def own(self) -> Mapping[str, Callable[..., Any]]:
            return {"conv3d": lambda *args, **attrs: torch.zeros_like(op.get("conv3d").fn(*args, **attrs))}

    _, _, verdict = run("timed", Silent())
    assert "frames are degenerate" in verdict.reason


def test_work_that_is_not_waited_for_is_caught() -> None:
    class Late(Wrong):
        """Gives results before they are there, and does not wait for them when asked to."""

        def own(self) -> Mapping[str, Callable[..., Any]]:
            def run(*args: Any, **attrs: Any) -> Tensor:
                result: Tensor = op.get("dmd_step").fn(*args, **attrs)
                out = torch.zeros_like(result)
                threading.Timer(0.02, lambda: out.copy_(result)).start()
                return out

            return {"dmd_step": run}

    _, _, verdict = run("timed", Late())
    assert verdict.state == "fail"
    assert "two chunks of the video are the same" in verdict.reason  # decoded from what was there before


@pytest.fixture
def lazy_frames(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Frames whose bytes come after the clock has stopped."""

    def later(video: Tensor) -> Tensor:
        result = to_frames(video)
        out = torch.randint(0, 255, result.shape, dtype=torch.uint8)
        threading.Timer(0.1, lambda: out.copy_(result)).start()
        return out

    monkeypatch.setattr("helios.pipeline.codec.to_frames", later)
    yield
    time.sleep(0.2)


@pytest.mark.usefixtures("lazy_frames")
def test_frames_that_come_after_the_clock_has_stopped_are_caught() -> None:
    _, _, verdict = run("timed", Wrong())
    assert "made again without the clock it is another" in verdict.reason
    assert all(f"chunk {i}: its frames changed after the clock had stopped" in verdict.reason for i in range(3))
    assert "made again without the clock it is another" in verdict.reason


def test_a_size_that_has_no_room_is_not_run_and_nothing_is_green() -> None:
    class Small(Wrong):
        def memory(self) -> tuple[int, int]:
            return 1 << 10, 1 << 10

    _, _, verdict = run("timed", Small())
    assert verdict.state == "not_run"
    assert "0.0 GB free; --size mini" in verdict.reason
