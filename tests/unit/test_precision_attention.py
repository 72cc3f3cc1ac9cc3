"""``tools/precision_attention.py``: its draws are what their names say, and its rows what it measures."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("precision_attention")


def test_scores_deviate_as_the_draws_say(tool: ModuleType) -> None:
    found = {}
    for name, x in tool.drawn(256):
        assert {one.dtype for one in x} == {torch.bfloat16}
        keys = x.k.float() - x.k.float().mean(1, keepdim=True)  # what all keys share drops out of the softmax
        scores = torch.einsum("bshd,bthd->bhst", x.q.float(), keys) * 128**-0.5
        found[name.split(":")[0]] = float(scores.std())
    assert found.pop("peaked") == pytest.approx(8, rel=0.1)
    assert list(found.values()) == pytest.approx([1, 1, 1], rel=0.1)


def test_a_row_has_both_precisions_and_e4m3_is_the_worse(tool: ModuleType) -> None:
    name, x = next(iter(tool.drawn(64)))
    line = tool.row(name, x)
    assert line.startswith("| normal | 64 × 64 | ")
    bf16, e4m3 = (float(one) for one in re.findall(r"(\d\.\de-\d+), ", line))
    assert 1e-3 < bf16 < 4e-3
    assert 2e-2 < e4m3 < 0.1


@pytest.mark.slow
def test_operands_of_a_network_are_those_of_self_attention(tool: ModuleType) -> None:
    blocks = list(tool.network(1, 8, 8))
    assert [name for name, _ in blocks] == ["random weights, block 0"]
    q, k, v = blocks[0][1]
    assert q.shape[1] < k.shape[1] == v.shape[1]  # the last block's history rows are read by nobody
    assert q.shape[2:] == (12, 128)
    assert q.dtype == torch.bfloat16
