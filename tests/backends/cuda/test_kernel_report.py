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


@pytest.mark.slow
def test_every_candidate_on_every_architecture() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tools" / "kernel_report.py"), "--out", str(ROOT / "out" / "kernels")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-3000:]
    assert run.stdout.rstrip().endswith(", 0 things wrong")
    assert json.loads((ROOT / "out" / "kernels" / "results.json").read_text())
