"""The floor and the prediction in docs/performance.md are what the tool computes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

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


def test_fp8_leaves_two_blocks_of_forty_and_what_only_moves_bytes(floors: ModuleType) -> None:
    product = floors.Work("linear", flops=int(790e9), moved=0)
    plain, faster = product.seconds(floors.FAST), floors.fp8_seconds([product], floors.FAST)
    gap = floors.FAST.gap
    assert faster - gap == pytest.approx((plain - gap) * (0.05 + 0.95 / 1.7))
    copy = floors.Work("add", flops=0, moved=10**9)
    assert floors.fp8_seconds([copy], floors.FAST) == copy.seconds(floors.FAST)
