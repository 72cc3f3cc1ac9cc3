"""docs/opset.md is what the op records say, and the check can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helios import op
from helios.ops import OPSET

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "opset.md"


def check(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)


def test_the_document_is_up_to_date() -> None:
    run = check(ROOT / "tools" / "make_opset_doc.py")
    assert run.returncode == 0, run.stderr


def test_it_names_the_version_and_every_op() -> None:
    text = DOCUMENT.read_text()
    assert text.startswith(f"# Opset {OPSET}\n")
    assert [name for name in op.names() if f"\n### {name}\n" not in text] == []


def test_a_document_that_differs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "docs").mkdir()
    script = tmp_path / "tools" / "make_opset_doc.py"
    script.write_text((ROOT / "tools" / "make_opset_doc.py").read_text())
    assert check(script).returncode == 1  # no document at all
    (tmp_path / "docs" / "opset.md").write_text(DOCUMENT.read_text())
    assert check(script).returncode == 0
    (tmp_path / "docs" / "opset.md").write_text(DOCUMENT.read_text().replace("Opset", "opset"))
    run = check(script)
    assert run.returncode == 1
    assert "python tools/make_opset_doc.py" in run.stderr
