"""Convolutions: the kernel in the interpreter by the suite, layouts, and every way against the same oracle."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helios.backend import select
from helios.graph import Builder, Rate
from helios.lower import plan_for
from helios.ops.conv import conv3d as body
from helios_conformance import budget, execute, references, suite
from helios_conformance.draws import Root
from helios_conformance.session import Session
from helios_cuda import convolution
from helios_cuda.choice import Choices, Variant
from helios_cuda.convolution import CHOICES, Filter, Form
from helios_cuda.kernels import conv, conv_boxes
from helios_cuda.launch import recording

BF16, F32 = torch.bfloat16, torch.float32
Triple = tuple[int, int, int]
CASES: dict[str, tuple[tuple[int, ...], int, Triple, Triple, Triple]] = {
    "causal": ((2, 16, 4, 5, 6), 8, (3, 3, 3), (1, 1, 1), (0, 1, 1)),
    "rows": ((1, 6, 2, 5, 7), 3, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    "down": ((1, 4, 2, 9, 7), 4, (1, 3, 3), (1, 2, 2), (0, 0, 0)),
    "time_down": ((2, 4, 5, 2, 3), 4, (3, 1, 1), (2, 1, 1), (0, 0, 0)),
    "point": ((2, 6, 2, 3, 4), 5, (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    "padded_time": ((1, 4, 3, 3, 4), 5, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
}
CHECKS = ("op_values", "op_specials", "op_refuses")
ON_A_DEVICE = {"cudnn": convolution._cudnn, "cudnn_frames": convolution._frames, "cublas": convolution._point}


def drawn(shape: tuple[int, ...], out: int, kernel: Triple, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    fan = shape[1] * kernel[0] * kernel[1] * kernel[2]
    x = torch.randn(shape, generator=random).to(dtype)
    weight = (torch.randn(out, shape[1], *kernel, generator=random) * fan**-0.5).to(dtype)
    return x, weight, torch.randn(out, generator=random).to(dtype)


def judge(result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple, padding: Triple) -> list[str]:
    wide = None if bias is None else bias.double()
    oracle: Tensor = body(x.double(), weight.double(), wide, stride=stride, padding=padding)
    assert result.shape == oracle.shape
    assert result.dtype == x.dtype
    reference = budget.measure(oracle.to(x.dtype), oracle)
    allowed = budget.allowed("reduce", x.dtype, weight[0].numel(), oracle, reference)
    return budget.exceeded(budget.measure(result, oracle), allowed)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_kernel_passes_the_suite(precision: str) -> None:
    session = Session(select("cuda:interpret"), Root(12, "n"))
    listed = suite.choose(precision, "quick", ["ops"])
    cases = [c for c in listed if c.params.get("op") == "conv3d" and c.check in CHECKS]
    verdicts = {case.id: execute.run_here(case, session, references.committed())[1] for case in cases}
    assert {i: v.reason for i, v in verdicts.items() if v.state not in ("pass", "skip")} == {}
    assert len([v for v in verdicts.values() if v.state == "pass"]) > 8


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("outputs", [96, 192, 40])
def test_each_pair_of_tiles(dtype: torch.dtype, outputs: int) -> None:
    """All widths of tiles, the second and ragged ones included."""
    x, weight, bias = drawn((1, 35, 3, 3, 5), outputs, (3, 1, 3), dtype)
    w = Filter(weight, bias)
    assert judge(conv.conv3d(x, w.weight, bias, (1, 1, 1), (0, 0, 1)), x, weight, bias, (1, 1, 1), (0, 0, 1)) == []


def test_operands_of_any_layout_give_channels_last() -> None:
    shape, out, kernel, stride, padding = CASES["causal"]
    x, weight, bias = drawn(shape, out, kernel, F32)
    wanted = conv.conv3d(x, Filter(weight, bias).weight, bias, stride, padding)
    b, c, t, h, w = shape
    spacious = torch.full((b, t + 2, h + 1, w + 3, c + 4), torch.nan)
    view = spacious.permute(0, 4, 1, 2, 3)[:, 1 : c + 1, 2:, 1:, 2:-1]
    view.copy_(x)
    flipped = weight.transpose(3, 4).contiguous().transpose(3, 4)
    came = conv.conv3d(view, Filter(flipped, bias).weight, bias.repeat(2)[out:], stride, padding)
    assert torch.equal(came, wanted)
    assert came.permute(0, 2, 3, 4, 1).is_contiguous()
    pixels = conv.conv3d(x, Filter(weight[:3], None).weight, None, stride, padding)
    assert judge(pixels, x, weight[:3], None, stride, padding) == []
    assert pixels.is_contiguous()  # whole lines are written, plane by plane


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ON_A_DEVICE)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
def test_ways_of_libraries_keep_the_budget(way: str, name: str, dtype: torch.dtype, biased: bool) -> None:
    """Computed by torch on the CPU: what they do around the library is the same there."""
    shape, out, kernel, stride, padding = CASES[name]
    if (way == "cublas" and name != "point") or (way == "cudnn_frames" and padding[0]):
        return
    x, weight, bias = drawn(shape, out, kernel, dtype)
    kept = bias if biased else None
    for _ in range(2):  # the second time with forms that are there already
        result = ON_A_DEVICE[way](x, Filter(weight, kept), stride, padding)
        assert judge(result, x, weight, kept, stride, padding) == []


def test_a_bias_added_after_the_rounding_misses_the_budget() -> None:
    """Which is why the ways through cuDNN carry it as a channel."""
    shape, out, kernel, stride, padding = CASES["causal"]
    x, weight, bias = drawn(shape, out, kernel, BF16)
    late = F.conv3d(x.float(), weight.float(), None, stride, padding).to(BF16) + bias[:, None, None, None]
    assert judge(late, x, weight, bias, stride, padding) != []


@pytest.mark.parametrize(
    ("shape", "kernel", "padding"),
    [
        ((2, 96, 3, 3, 18), (3, 1, 1), (0, 0, 0)),
        ((1, 96, 1, 2, 4), (1, 3, 3), (0, 1, 1)),
        ((1, 96, 2, 1, 3), (3, 1, 1), (1, 0, 0)),
    ],
    ids=["frames", "rows", "padded_time"],
)
def test_boxes_keep_the_budget(shape: tuple[int, ...], kernel: Triple, padding: Triple) -> None:
    """Ragged boxes, and what lies outside of the video on each side."""
    x, weight, bias = drawn(shape, 96, kernel, BF16)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    w = Filter(weight, bias)
    assert conv_boxes.fits(x, w.weight, (1, 1, 1)) == ""
    assert judge(conv_boxes.conv3d(x, w.weight, bias, padding), x, weight, bias, (1, 1, 1), padding) == []


def test_boxes_say_what_they_cannot_fetch() -> None:
    last = torch.channels_last_3d
    x = torch.empty(1, 192, 3, 4, 5, dtype=BF16).contiguous(memory_format=last)
    weight = torch.empty(96, 192, 3, 3, 3, dtype=BF16)
    assert conv_boxes.fits(x, weight, (1, 1, 1)) == ""
    assert conv_boxes.fits(x[:, 8:104], weight[:, :96], (1, 1, 1)) == ""
    for y, w, stride in (
        (x, weight, (1, 2, 2)),
        (x.float(), weight, (1, 1, 1)),
        (x[:, :16], weight, (1, 1, 1)),
        (x, weight[:3], (1, 1, 1)),
        (x[:, 4:100], weight, (1, 1, 1)),
        (x.contiguous(), weight, (1, 1, 1)),
    ):
        assert conv_boxes.fits(y, w, stride) != ""


def test_ways_say_where_they_are_not() -> None:
    x, weight, bias = (y.to("meta") for y in drawn((1, 4, 3, 4, 5), 6, (3, 3, 3), BF16))
    w = Filter(weight, bias)
    reasons = {v.name: v.there(x, w, (1, 1, 1), (0, 1, 1)) for v in convolution.VARIANTS}
    assert reasons.pop("triton") == ""
    assert all(reasons.values())
    assert convolution._bias_fits(w, (0, 2, 2)) != ""
    assert convolution._bias_fits(Filter(weight, None), (0, 2, 2)) == ""


def test_a_form_is_the_same_from_a_plan_and_from_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was settled before the first run is found by it; and what nobody settled runs in Triton, and is recorded."""
    monkeypatch.setattr(CHOICES, "record", {})
    with Builder("one") as build:
        given = build.input("x", (1, 4, 3, 3, 3), F32, Rate.STEP)
        w = build.input("w", (5, 4, 3, 3, 3), F32, Rate.WEIGHTS)
        build.output("y", body(given, w, build.input("b", (5,), F32, Rate.WEIGHTS), padding=(0, 1, 1)))
    (form,) = convolution.forms(plan_for({"one": build.graph()}, select("cuda:interpret")))
    convolution.settle([form], torch.device("cpu"), "nothing")
    assert CHOICES.record == {}
    x, weight, bias = drawn((1, 4, 3, 3, 3), 5, (3, 3, 3), F32)
    kernel = convolution.KERNELS["conv3d"]
    assert kernel.prepare is not None
    handle = kernel.prepare(None, weight, bias, stride=(1, 1, 1), padding=(0, 1, 1))
    out = kernel.run(handle, x, stride=(1, 1, 1), padding=(0, 1, 1))
    assert judge(out, x, weight, bias, (1, 1, 1), (0, 1, 1)) == []
    assert {key: entry["variant"] for key, entry in CHOICES.record.items()} == {str(form): "triton"}
    again, other, *_ = form.drawn(torch.device("cpu"))
    assert (
        Form(tuple(again.shape), tuple(other.weight.shape), F32, other.bias is not None, (1, 1, 1), (0, 1, 1)) == form
    )


@pytest.mark.parametrize("name", ["causal", "point"])
def test_ways_agree_when_they_are_measured(name: str) -> None:
    """As ``settle`` does on a device: on random operands all ways give what ours gives, and the fastest is recorded."""
    shape, out, kernel, stride, padding = CASES[name]
    form = Form(shape, (out, shape[1], *kernel), BF16, True, stride, padding)
    ways = [v for v in convolution.VARIANTS if v.name not in ("triton_boxes", *([] if name == "point" else ["cublas"]))]
    choices = Choices([Variant(v.name, v.run, version=v.version) for v in ways])
    seconds = iter(range(len(ways), 0, -1))

    def clock(call: Callable[[], object]) -> float:
        call()
        return float(next(seconds))

    chosen = choices.choose(str(form), functools.partial(form.drawn, torch.device("cpu")), clock, convolution.alike)
    assert chosen == ways[-1].name
    assert choices.record[str(form)]["why_not"] == {}
    json.dumps(choices.record)


def test_results_are_alike_frame_by_frame() -> None:
    wanted = drawn((1, 4, 3, 8, 8), 1, (1, 1, 1), BF16)[0]
    assert convolution.alike(wanted * (1 + 2**-7), wanted) == ""
    for value in (torch.nan, 1.0):
        wrong = wanted.clone()
        wrong[:, :, 1, 0] = value
        assert "frame 1" in convolution.alike(wrong, wanted)


def test_real_sizes_need_no_memory_to_be_recorded() -> None:
    x = torch.empty(1, 35, 384, 640, 96, dtype=BF16, device="meta").permute(0, 4, 1, 2, 3)
    weight = torch.empty(96, 96, 3, 3, 3, dtype=BF16, device="meta")
    with recording() as launches:
        out = conv.conv3d(x, Filter(weight, None).weight, None, (1, 1, 1), (0, 1, 1))
    assert tuple(out.shape) == (1, 96, 33, 384, 640)
    (launch,) = launches
    tile = launch.constants
    assert launch.kernel is conv.THIRDS
    assert launch.grid == (33 * 384 * 640 // tile["POSITIONS"] * 96 // (tile["WIDE"] + tile["NARROW"]),)


COMPILE = """
import functools
import json
import torch
from helios_cuda import offline, tables
from helios_cuda.kernels import conv, conv_boxes
from helios_cuda.launch import recording

x = torch.empty(1, 35, 384, 640, 96, dtype=torch.bfloat16, device="meta").permute(0, 4, 1, 2, 3)
w = torch.empty(96, 3, 3, 3, 96, dtype=torch.bfloat16, device="meta").permute(0, 4, 1, 2, 3)
b = torch.empty(96, dtype=torch.bfloat16, device="meta")
with tables.assumed("sm_90"), recording() as launches:
    conv.conv3d(x, w, b, (1, 1, 1), (0, 1, 1))
    conv_boxes.conv3d(x, w, b, (0, 1, 1))
rows = []
for launch in launches:
    form = offline.form_of(launch)
    binary = offline.compiled(form, "sm_90")
    rows.append([list(offline.problems(form, "sm_90", binary, chosen=True)), sorted(binary.units)])
print(json.dumps(rows))
"""


def test_compiled_for_hopper_both_use_its_units_and_spill_nothing() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    (wrong, units), (wrong_boxes, units_of_boxes) = json.loads(result.stdout)
    assert (wrong, wrong_boxes) == ([], [])
    assert any(unit.startswith("wgmma") for unit in units)
    assert set(units) < set(units_of_boxes)  # and the copy engine
