"""Which library runs attention: measured with a clock that tests set, recorded, replayed, refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helios.backend import select
from helios.errors import BackendError, InputError
from helios.graph import Builder, Graph, Rate
from helios.lower import lower, plan_for
from helios.ops.attention import attention
from helios_cuda import CudaBackend
from helios_cuda.attention import MEASURE, Chooser, forms
from helios_cuda.attention_libraries import TRITON, Device, Form, Library, Run

DEVICE = Device("Test GPU", (9, 0))
SMALL = Form(1, 24, 16, 2, 8, torch.bfloat16)
OTHER = Form(1, 24, 32, 2, 8, torch.bfloat16)


class Bench:
    """Libraries whose calls take a time that is told, and a clock that knows it."""

    def __init__(self, **ms: float | Sequence[float]) -> None:
        self.ms = {name: [times] if isinstance(times, (int, float)) else list(times) for name, times in ms.items()}
        self.calls: list[str] = []

    def clock(self, call: Callable[[], object]) -> float:
        call()
        times = self.ms[self.calls[-1]]
        return float(times.pop(0) if len(times) > 1 else times[0])

    def library(self, name: str, *, run: Run | None = None, version: str = "1", **fields: Any) -> Library:
        def counted(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            self.calls.append(name)
            return (run or right)(q, k, v, scale)

        return Library(name, fields.pop("there", lambda form, device: None), counted, lambda: version, **fields)

    def chooser(self, *libraries: Library, described: Device = DEVICE) -> Chooser:
        listed = libraries or tuple(self.library(name) for name in self.ms)
        return Chooser(torch.device("cpu"), listed, self.clock, described)


def right(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    wide_q, wide_k, wide_v = (x.float().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=scale).transpose(1, 2).to(q.dtype)


def operands(form: Form) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (form.queries, form.keys, form.keys)
    q, k, v = (torch.randn(form.batch, n, form.heads, form.width, generator=generator).to(form.dtype) for n in sizes)
    return q, k, v


def test_the_fastest_is_chosen_and_all_that_was_measured_is_recorded() -> None:
    bench = Bench(slow=3.0, fast=1.0, triton=2.0)
    chooser = bench.chooser()
    chooser.settle([SMALL])
    wanted = {"library": "fast", "version": "1", "device": "Test GPU, sm_90", "refused": {}}
    assert chooser.plan == {"bf16 b=1 s=24 t=16 h=2 d=8": {**wanted, "ms": {"slow": 3.0, "fast": 1.0, "triton": 2.0}}}
    bench.calls.clear()
    q, k, v = operands(SMALL)
    assert torch.equal(chooser.run(q, k, v), right(q, k, v, 8**-0.5))
    assert bench.calls == ["fast"]


def test_each_form_has_its_own() -> None:
    bench = Bench(a=[1.0] * 9 + [5.0], triton=2.0)
    chooser = bench.chooser()
    chooser.settle([SMALL, OTHER, SMALL])
    assert [entry["library"] for entry in chooser.plan.values()] == ["a", "triton"]


def test_a_draw_goes_to_the_first_in_the_list() -> None:
    for second, wins in ((0.985, "first"), (0.975, "second")):
        chooser = Bench(first=1.0, second=second, triton=2.0).chooser()
        chooser.settle([SMALL])
        assert chooser.plan[str(SMALL)]["library"] == wins


def test_one_outlier_does_not_decide() -> None:
    chooser = Bench(a=[50.0] + [1.0] * 8, triton=2.0).chooser()
    chooser.settle([SMALL])
    assert chooser.plan[str(SMALL)]["ms"] == {"a": 1.0, "triton": 2.0}


@pytest.mark.parametrize(("ms", "calls"), [(1.0, 9), (100.0, 5), (400.0, 1), (60_000.0, 1)])
def test_timed_calls_of_all_take_about_a_second(ms: float, calls: int) -> None:
    bench = Bench(a=ms, triton=ms)
    bench.chooser().settle([SMALL])
    assert bench.calls.count("a") == bench.calls.count("triton") == calls + 1  # the first call is checked, not timed


def test_a_wrong_result_is_never_chosen_however_fast() -> None:
    def nearly(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return right(q, k, v, 1.2 * scale)

    def half(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = right(q, k, v, scale)
        out[:, :, 1] = float("nan")
        return out

    bench = Bench(nearly=0.1, half=0.1, triton=2.0)
    libraries = (bench.library("nearly", run=nearly), bench.library("half", run=half), bench.library("triton"))
    chooser = bench.chooser(*libraries)
    chooser.settle([SMALL])
    entry = chooser.plan[str(SMALL)]
    assert (entry["library"], entry["ms"]) == ("triton", {"triton": 2.0})
    assert set(entry["refused"]) == {"nearly", "half"}
    assert all("its result is wrong" in why for why in entry["refused"].values())


def test_what_is_not_there_or_fails_is_recorded_with_the_reason() -> None:
    def fails(*_: Any) -> Tensor:
        raise RuntimeError("no engine found\nand much more")

    bench = Bench(triton=2.0, other=3.0)
    absent = bench.library("absent", there=lambda form, device: f"no kernel for {device}")
    chooser = bench.chooser(absent, bench.library("fails", run=fails), bench.library("triton"), bench.library("other"))
    chooser.settle([SMALL])
    refused = {"absent": "no kernel for Test GPU, sm_90", "fails": "no engine found"}
    assert chooser.plan[str(SMALL)]["refused"] == refused
    none = bench.chooser(absent, bench.library("triton", run=fails), bench.library("fails", run=fails))
    with pytest.raises(BackendError, match=r"no attention library runs bf16 b=1 .*absent: no kernel.*fails: no engine"):
        none.settle([SMALL])


def test_one_alone_is_taken_unmeasured() -> None:
    bench = Bench(triton=2.0)
    chooser = bench.chooser()
    chooser.settle([SMALL])
    assert (chooser.plan[str(SMALL)]["ms"], bench.calls) == ({}, [])


def test_a_run_never_measures_and_what_it_took_stays() -> None:
    bench = Bench(fast=1.0, triton=2.0)
    chooser = bench.chooser()
    chooser.run(*operands(SMALL))
    assert bench.calls == ["triton"]
    chooser.settle([SMALL])
    assert bench.calls == ["triton"]
    assert (chooser.plan[str(SMALL)]["library"], chooser.plan[str(SMALL)]["ms"]) == ("triton", {})


def test_a_plan_goes_through_json_and_gives_the_same_choice_unmeasured() -> None:
    first = Bench(a=1.0, triton=2.0).chooser()
    first.settle([SMALL])
    bench = Bench(a=9.0, triton=2.0)  # another day: a would lose
    again = bench.chooser()
    again.use(json.loads(json.dumps(first.plan)))
    again.settle([SMALL])
    assert (again.plan, bench.calls) == (first.plan, [])
    again.run(*operands(SMALL))
    assert bench.calls == ["a"]
    again.settle([OTHER])
    assert again.plan[str(OTHER)]["library"] == "triton"


def test_a_plan_changes_its_own_forms_alone() -> None:
    first = Bench(a=1.0, triton=2.0).chooser()
    first.settle([SMALL])
    bench = Bench(a=9.0, triton=2.0)
    chooser = bench.chooser()
    chooser.settle([SMALL, OTHER])
    bench.calls.clear()
    chooser.use(first.plan)
    for form in (SMALL, OTHER):
        chooser.run(*operands(form))
    assert bench.calls == ["a", "triton"]
    assert chooser.plan[str(OTHER)]["ms"] == {"a": 9.0, "triton": 2.0}


def test_a_plan_is_a_copy() -> None:
    chooser = Bench(a=1.0, triton=2.0).chooser()
    chooser.settle([SMALL])
    chooser.plan[str(SMALL)]["library"] = "triton"
    assert chooser.plan[str(SMALL)]["library"] == "a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"library": "gone"}, "library 'gone' for bf16 b=1 s=24.*known are a, triton"),
        ({"version": "2"}, "the plan has 2 for attention of bf16 .*; here it is 1"),
        ({"device": "Test GPU, sm_80"}, "chose attention of bf16 .* for Test GPU, sm_80, this is Test GPU, sm_90"),
        ({"library": None}, "library 'None'"),
    ],
)
def test_a_plan_of_something_else_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    chooser = Bench(a=1.0, triton=2.0).chooser()
    chooser.settle([SMALL])
    before = chooser.plan
    with pytest.raises(BackendError, match=message) as caught:
        chooser.use({str(SMALL): {**before[str(SMALL)], **change}})
    assert caught.value.fix
    assert chooser.plan == before


def test_a_plan_whose_library_cannot_run_here_is_refused_when_settled() -> None:
    bench = Bench(a=1.0, triton=2.0)
    first = bench.chooser()
    first.settle([SMALL])
    absent = bench.library("a", there=lambda form, device: "its file is damaged")
    again = bench.chooser(absent, bench.library("triton"))
    again.use(first.plan)
    with pytest.raises(BackendError, match=r"the plan has a for attention of bf16 .*: its file is damaged"):
        again.settle([SMALL])


def test_a_library_that_is_gone_has_no_version() -> None:
    def version() -> str:
        raise ModuleNotFoundError("No module named 'a'")

    bench = Bench(a=1.0, triton=2.0)
    first = bench.chooser()
    first.settle([SMALL])
    gone = Library("a", lambda form, device: None, right, version)
    with pytest.raises(BackendError, match="here it is not installed"):
        bench.chooser(gone, bench.library("triton")).use(first.plan)


def test_a_library_by_name_is_taken_unmeasured_or_refused() -> None:
    bench = Bench(fast=1.0, slow=3.0, triton=2.0)
    narrow = bench.library("narrow", there=lambda form, device: "head size 8" if form.keys == 32 else None)
    chooser = bench.chooser(bench.library("fast"), bench.library("slow"), narrow, bench.library("triton"))
    chooser.use("slow")
    chooser.settle([SMALL])
    assert (chooser.plan[str(SMALL)]["library"], bench.calls) == ("slow", [])
    chooser.run(*operands(OTHER))
    assert bench.calls == ["slow"]
    chooser.use("narrow")
    chooser.settle([SMALL])
    with pytest.raises(
        BackendError, match=r"narrow was asked for, which cannot run bf16 .*t=32.*: head size 8"
    ) as caught:
        chooser.settle([OTHER])
    assert "'measure'" in caught.value.fix
    chooser.use(MEASURE)
    chooser.settle([SMALL])
    assert chooser.plan[str(SMALL)]["library"] == "fast"
    with pytest.raises(InputError, match=r"fsat.*did you mean.*fast"):
        chooser.use("fsat")


def test_libraries_get_whole_sixteen_bytes_and_operands_stay() -> None:
    seen: list[Tensor] = []

    def look(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        seen.extend((q, k, v))
        return right(q, k, v, scale)

    bench = Bench(strict=1.0, triton=2.0)
    chooser = bench.chooser(bench.library("strict", run=look), bench.library("triton"))
    chooser.settle([SMALL])
    seen.clear()
    q, k, v = operands(SMALL)
    shifted = torch.cat([q.new_zeros(3), q.flatten()])[3:].view(q.shape)
    one_head = k[:, :, :1].expand(k.shape)
    out = chooser.run(shifted, one_head, torch.stack([k, k, v], 2)[:, :, 2])
    assert torch.equal(out, right(q, one_head, v, 8**-0.5))
    assert seen[0].data_ptr() % 16 == 0
    assert seen[1].stride(2) > 0
    assert seen[2].stride(1) == 48  # a third of a fused buffer, as it was


def test_off_a_gpu_triton_runs_and_nothing_is_recorded() -> None:
    bench = Bench(a=1.0)
    chooser = Chooser(torch.device("cpu"), (bench.library("a"), TRITON), bench.clock)
    chooser.settle([SMALL])
    q, k, v = operands(SMALL)
    torch.testing.assert_close(chooser.run(q, k, v, scale=0.5), right(q, k, v, 0.5), atol=2e-2, rtol=2e-2)
    assert (chooser.plan, bench.calls) == ({}, [])


def test_operands_on_meta_go_to_triton() -> None:
    from helios_cuda.launch import recording

    bench = Bench(a=1.0, triton=2.0)
    q, k, v = (x.to("meta") for x in operands(SMALL))
    with recording() as launches:
        bench.chooser().run(q, k, v)
    assert ([launch.kernel.name for launch in launches], bench.calls) == (["attention"], [])


def step() -> Graph:
    builder = Builder("step")
    with builder:
        q = builder.input("q", (1, 24, 2, 8), torch.bfloat16, Rate.STEP)
        text = builder.input("text", (1, 16, 2, 8), torch.bfloat16, Rate.PROMPT)
        x = attention(attention(q, q, q), text, text)
        builder.output("y", attention(x, text, text))
    return builder.graph()


def test_the_forms_of_a_plan_are_its_different_attentions() -> None:
    plan = plan_for({"step": step()}, select("reference"))
    assert forms(plan) == [Form(1, 24, 24, 2, 8, torch.bfloat16), SMALL]


def test_a_backend_settles_when_it_compiles_and_says_what_it_took() -> None:
    backend = CudaBackend("interpret")
    bench = Bench(a=1.0, triton=2.0)
    backend.attention = bench.chooser()
    program = lower({"step": step()}, backend)
    chosen = backend.execution_plan()["attention"]
    assert [entry["library"] for entry in chosen.values()] == ["a", "a"]
    bench.calls.clear()
    program.load({})  # type: ignore[arg-type]
    q, _, _ = operands(SMALL)
    text = program.bind({"text": operands(SMALL)[1]})
    program.run("step", {"q": q}, text)
    assert bench.calls == ["a"] * 3
