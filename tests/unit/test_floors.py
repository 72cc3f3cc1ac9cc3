"""The floor and the prediction in docs/performance.md are what the tool computes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helios import op
from helios.graph import Builder, Node, Rate
from helios_cuda import offline

ROOT = Path(__file__).resolve().parents[2]
TERA = 1e12


@pytest.fixture
def floors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("floors")


def test_the_document_says_what_is_computed() -> None:
    """In a process of its own: it imports Triton for the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tools" / "floors.py")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    text = (ROOT / "docs" / "performance.md").read_text()
    written = text.split("<!-- tools/floors.py --write makes what follows -->")[1].split("<!-- tools/floors.py ends")[0]
    assert written.strip() == run.stdout.strip(), "docs/performance.md is stale: python tools/floors.py --write"
    assert "[1, 1, 1] products | 410.3 |" in written  # 24.95 + 44.57 + 123.05 linear, 113.73 qkv, 103.96 gelu
    assert "| fp8 products in e4m3 | 392.4 | 123.5 |" in written  # and 17.9 in bf16: all that bf16 has


def test_a_node_takes_its_work_or_its_bytes_whichever_is_longer(floors: ModuleType) -> None:
    rates = floors.Rates("", product=100 * TERA, attention=50 * TERA, convolution=25 * TERA, memory=TERA)
    work = floors.Work
    assert work("linear", flops=int(TERA), moved=int(1e9)).seconds(rates) == pytest.approx(0.010)
    assert work("linear", flops=int(TERA), moved=int(2e10)).seconds(rates) == pytest.approx(0.020)
    assert work("attention", flops=int(TERA), moved=0).seconds(rates) == pytest.approx(0.020)
    assert work("conv3d", flops=int(TERA), moved=0).seconds(rates) == pytest.approx(0.040)
    assert work("add", flops=0, moved=int(1e9)).seconds(rates) == pytest.approx(0.001)


def test_a_view_takes_no_time_and_no_launch(floors: ModuleType) -> None:
    assert floors.Work("narrow", flops=0, moved=0).seconds(floors.SLOW) == 0.0
    assert floors.Work("add", flops=0, moved=1).seconds(floors.SLOW) == pytest.approx(floors.SLOW.gap)


def made(name: str, *types: tuple[tuple[int, ...], torch.dtype, Rate]) -> Node:
    """A node of that op on inputs of these types."""
    with Builder("one") as build:
        operands = [build.input(f"x{i}", shape, dtype, rate) for i, (shape, dtype, rate) in enumerate(types)]
        result = op.get(name)(*operands)
        build.output("y", result)
    (node,) = build.graph().nodes
    return node


def works(floors: ModuleType, node: Node, moved: int) -> list[tuple[str, int, int]]:
    found = floors.launched(offline.Ran(node, [], moved))
    return [(work.op, work.flops, work.moved) for work in found]


BF16, F32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
WEIGHT = ((48, 32), BF16, Rate.WEIGHTS)
BIAS = ((48,), BF16, Rate.WEIGHTS)


def test_a_quantised_weight_is_read_as_it_is_held(floors: ModuleType) -> None:
    rows, scales = ((1, 4, 32), E4M3, Rate.STEP), ((1, 4, 1), F32, Rate.STEP)
    node = made("quantized_linear", rows, scales, WEIGHT, BIAS)
    flops, held = 2 * 4 * 48 * 32, 48 * (32 + 4)
    assert works(floors, node, 1000 + 2 * 48 * 32) == [("quantized_linear", flops, 1000 + held)]
    node = made("packed_linear", ((1, 4, 32), BF16, Rate.STEP), WEIGHT, BIAS)
    widening = ("dequantize_rows", 0, held + 2 * 48 * 32)
    assert works(floors, node, 5000) == [widening, ("packed_linear", flops, 5000)]
    node = made("linear", ((1, 4, 32), BF16, Rate.STEP), WEIGHT, BIAS)
    assert works(floors, node, 5000) == [("linear", flops, 5000)]


def test_what_attention_quantises_first_is_written_and_read(floors: ModuleType) -> None:
    q, k = ((1, 5, 2, 16), BF16, Rate.STEP), ((1, 7, 2, 16), BF16, Rate.STEP)
    elements, rows, out = (5 + 7 + 7) * 32, (5 + 7 + 7) * 2, 5 * 32
    first, second = works(floors, made("quantized_attention", q, k, k), 2 * elements + 2 * out)
    assert first == ("quantize_rows", 0, 3 * elements + 4 * rows)
    assert second == ("quantized_attention", 4 * 5 * 7 * 32, elements + 4 * rows + 2 * out)


def test_numbers_of_8_bits_are_faster_where_they_are_multiplied(floors: ModuleType) -> None:
    rates = floors.Rates("", 100 * TERA, 50 * TERA, 25 * TERA, TERA, e4m3=2.0, e4m3_attention=1.5)
    times = {name: floors.Work(name, flops=int(TERA), moved=0).seconds(rates) for name in floors.E4M3_PRODUCTS}
    assert times == pytest.approx(dict.fromkeys(floors.E4M3_PRODUCTS, 0.005))
    assert floors.Work("quantized_attention", flops=int(TERA), moved=0).seconds(rates) == pytest.approx(1 / 75)
    assert floors.Work("packed_linear", flops=int(TERA), moved=0).seconds(rates) == pytest.approx(0.010)
