"""The whole report of the kernels, as ``make kernels`` writes it, and the committed one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helios_cuda.launch import Tiled
from helios_cuda.offline import Binary, Form
from helios_cuda.tables import Tile

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("kernel_report")


def row(report: ModuleType, architecture: str, *, chosen: bool = True, wrong: tuple[str, ...] = ()) -> object:
    tile = Tile({"SIZE": 64}, warps=4)

    def made() -> None:
        """A function that has what forms ask of one."""

    vars(made)["cache_key"] = "0"
    form = Form(Tiled(made, "made", (tile,), None), tile, "bf16", {"x": "*bf16"}, {}, (), ("x",))
    return report.Row(
        architecture, form, chosen, 3, Binary(80, 8, 2048, 0.5, {"x": {16: 2}}, {"mma.sync": 4}, 0.1), wrong
    )


def test_the_document_shows_what_is_chosen_and_what_is_wrong(report: ModuleType) -> None:
    rows = [row(report, "sm_80"), row(report, "sm_90", wrong=("8 bytes spilled",)), row(report, "sm_80", chosen=False)]
    text = "\n".join(report._document(rows, {"commit": "abc", "triton": "3", "command": "make kernels"}))
    assert "- sm_90 made [bf16] SIZE=64 warps=4 stages=2: 8 bytes spilled" in text
    assert "| made | 1 | 80 · 2.0 · 50% · **8 B spilled** | 80 · 2.0 · 50% · **8 B spilled** |" in text
    assert "| made, bf16 | SIZE=64 warps=4 stages=2 | 3 | 80 | 2048 | 50% | x 16 | 4 mma.sync | 0.1 |" in text


def test_what_was_compiled_is_remembered_by_form_and_architecture(report: ModuleType, tmp_path: Path) -> None:
    form = row(report, "sm_90").form  # type: ignore[attr-defined]
    first = report.Compiler(tmp_path)
    binary = Binary(80, 0, 0, 0.5, {"x": {16: 2}}, {}, 0.1)
    first.known[f"{first.version} sm_90 {form.name}"] = report.dataclasses.asdict(binary)
    first.save()
    again = report.Compiler(tmp_path)
    assert again(form, "sm_90") == binary
    assert again.fresh == 0


PLANS = """
import collections, dataclasses, json, sys
sys.path.insert(0, sys.argv[1])
import kernel_report as report

sizes = report.SIZES["14b"]
report.SIZES = {"14b": dataclasses.replace(sizes, transformer=dataclasses.replace(sizes.transformer, num_layers=2))}
plans = {name: report.plan_graphs(name) for name in report.PLANS}
ops = {name: sorted({node.op for graph in graphs.values() for node in graph.nodes}) for name, graphs in plans.items()}
counts, converts = {}, {}
for name in ("sm_80", "sm_89", "sm_90"):
    found = report.uses(plans, name)
    counts[name] = collections.Counter()
    for use in found:
        counts[name][use.form.kernel.name] += use.count
    converts[name] = sorted({use.form.constants["CONVERTS"] for use in found if "scales" in use.form.signature})
print(json.dumps([[name for name in plans if "decode" in plans[name]], ops, counts, converts]))
"""


@pytest.mark.slow
def test_plans_with_quantised_products_are_there_where_they_can_run() -> None:
    """With two blocks, which are quantised though a precision leaves out one at each end; nothing is compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PLANS, str(ROOT / "tools")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    decoding, ops, counts, converts = json.loads(run.stdout)
    assert decoding == ["bf16"]
    fused = {"adaln_quantize", "gated_add_adaln_quantize", "gelu_quantize", "layer_norm_quantize", "quantize_rows"}
    assert fused | {"quantized_attention", "quantized_linear", "quantized_qkv_linear"} <= set(ops["fp8-attention"])
    assert not {"scaled_linear", "scaled_attention", "dequantize_rows"} & set(ops["fp8-attention"])  # all are fused
    assert "packed_linear" in ops["fp8-weights"]
    assert not fused & {*ops["bf16"], *ops["fp8-weights"]}
    assert not {"scaled_linear", "scaled_attention", "laid"} & set(counts["sm_80"])
    for name in ("sm_89", "sm_90"):  # at each of three stages
        assert counts[name]["scaled_attention"] == 2 * 3
        assert counts[name]["norm_quantize"] == 2 * 3
        # Queries of the last block are fewer than its keys, so that a norm is quantised in two ways.
        assert counts[name]["residual_norm_quantize"] == 3 * 3
        assert counts[name]["scaled_linear"] == (6 + 8) * 3 + 2 * 2
    # Keys and values of the text are made once; eight others of a block at each stage.
    assert {counts[name]["dequantize"] for name in counts} == {2 * 8 * 3 + 2 * 2}
    assert converts == {"sm_80": [False], "sm_89": [False], "sm_90": [False, True]}


@pytest.mark.slow
def test_every_candidate_on_every_architecture() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tools" / "kernel_report.py"), "--out", str(ROOT / "out" / "kernels")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-3000:]
    assert run.stdout.rstrip().endswith(", 0 things wrong")
    assert json.loads((ROOT / "out" / "kernels" / "results.json").read_text())
