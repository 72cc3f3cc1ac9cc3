"""The counts behind the prediction for Ascend: made by the kernels themselves, and what the document says."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def floors() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        module = importlib.import_module("ascend_floors")
    yield module
    sys.modules.pop("ascend_floors", None)


def test_the_document_says_what_is_counted(floors: ModuleType) -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    written = text.split(floors.BEGIN)[1].split(floors.END)[0]
    assert written.strip() == floors.section().strip(), "docs/performance.md is stale: tools/ascend_floors.py --write"


def test_fusing_saves_launches_and_bytes(floors: ModuleType) -> None:
    counts = [floors.launches(floors.chunk((1, 1, 1), form)) for form in (floors.BODIES, floors.CORE, floors.FUSED)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 2 * counts[2]


def test_a_linear_with_its_bias_is_one_operator(floors: ModuleType) -> None:
    linears = [work for work in floors.counted()["denoise.2"] if work.op == "linear"]
    assert linears
    assert {len(work.moved) for work in linears} == {1}
    attentions = [work for work in floors.counted()["denoise.2"] if work.op == "attention"]
    assert {len(work.moved) for work in attentions} == {1}
