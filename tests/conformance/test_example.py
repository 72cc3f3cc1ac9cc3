"""The committed example of a bundle is one that verifies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helios_conformance import manifest, verify
from helios_conformance.report import dumps
from helios_conformance.suite import suite_hash

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "cpu"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    told: dict[str, Any] = json.loads((EXAMPLE / "report.json").read_text())
    return told


def test_it_belongs_to_this_suite(report: dict[str, Any]) -> None:
    assert report["suite"]["hash"] == suite_hash(), "the suite has changed: `make example` makes the bundle anew"


def test_it_is_accepted(report: dict[str, Any]) -> None:
    outcome = verify.verify(EXAMPLE)
    assert outcome.findings == ()
    assert outcome.recomputed > 400
    assert report["verdict"]["word"] == "passed"
    assert "not a certification" in report["verdict"]["sentence"]


def test_the_quick_suite_fits_into_a_small_machine(report: dict[str, Any]) -> None:
    peak = report["peak_rss"]
    assert min(peak.values()) > 0, "measured"
    assert peak["parent"] + peak["worker"] < 4e9


def test_it_was_made_of_the_commit_that_it_names(report: dict[str, Any]) -> None:
    trees = [tree for tree in report["environment"]["git"].values() if tree is not None]
    assert trees, "`make example` runs in a working tree"
    assert not any(tree["dirty"] for tree in trees), "commit first, then `make example`"


def test_an_edited_figure_is_not(tmp_path: Path, report: dict[str, Any]) -> None:
    copy = tmp_path / "cpu"
    shutil.copytree(EXAMPLE, copy)
    told = json.loads((copy / "report.json").read_text())
    numeric = next(out for case in told["cases"] for out in case["outputs"].values() if out.get("errors"))
    numeric["errors"]["norm"] /= 2
    (copy / "report.json").write_bytes(dumps(told))
    (copy / "MANIFEST.json").write_text(json.dumps(manifest.build(copy), indent=1, sort_keys=True))
    assert not verify.verify(copy, levels=("ops",)).accepted
