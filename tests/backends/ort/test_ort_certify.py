"""``helios certify --backend ort``: the suite's verdict, and the provider's words where a precision is withheld."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helios.cli import main

SOME = (
    "attention[fp32,cross]",
    "block[fp32,tiny,stages]",
    "vae[fp32,decode]",
    "steps[fp32,tiny,distilled]",
    "same[fp32,resume]",
)


def certify(out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    code = main(["certify", "--backend", "ort", "--out", str(out), *more])
    return code, json.loads((out / "report.json").read_text())


def passed(report: dict[str, Any]) -> None:
    assert {case["state"] for case in report["cases"]} == {"pass"}
    assert report["backend"]["kind"] == "engine"
    assert report["backend"]["precisions"] == ["fp32"]
    assert report["backend"]["emulated"] == ""
    assert not any(fallback for case in report["cases"] for _, _, _, fallback, _ in case["coverage"])


def test_cases_of_every_level_pass(tmp_path: Path) -> None:
    _, report = certify(tmp_path / "run", *(word for case in SOME for word in ("--filter", case)))
    passed(report)
    assert {case["level"] for case in report["cases"]} == {"ops", "blocks", "model", "pipeline"}


@pytest.mark.slow
def test_the_quick_suite_passes_and_is_verified(tmp_path: Path) -> None:
    code, report = certify(tmp_path / "run", "--level", "pipeline")
    assert code == 0
    passed(report)
    assert len(report["cases"]) > 500
    assert main(["verify", str(tmp_path / "run")]) == 0


def test_a_precision_that_the_provider_refuses_is_told_in_its_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = certify(tmp_path / "run", "--precision", "bf16", "--filter", "silu[bf16,small]")
    assert code == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "the backend does not offer bf16, but fp32; CPUExecutionProvider: NOT_IMPLEMENTED: Could not find an" in told
