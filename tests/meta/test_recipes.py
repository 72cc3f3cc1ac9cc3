"""The backend of CONTRIBUTING, run as it stands there: a stranger's distribution, found by its entry point alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = """
import torch.nn.functional as F
from helios.ops.norm import adaln, rms_norm
def pack_weight(x, weight, bias): return weight.clone(), bias
def run_linear(handle, x): return F.linear(x, *handle)
run_rms_norm, run_adaln = rms_norm.fn, adaln.fn
"""
VENDOR = """
from types import SimpleNamespace
def devices(): return [SimpleNamespace(name="MyChip One", memory=2**30)]
"""


def block(language: str, containing: str) -> str:
    """The one code block of CONTRIBUTING in that language with that text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder like site-packages, with the recipe's distribution installed; the vendor's software is not."""
    package = tmp_path / "helios_mychip"
    package.mkdir()
    (package / "__init__.py").write_text(block("python", "class MyChipBackend"))
    (package / "kernels.py").write_text(KERNELS)
    (group,) = re.findall(r'entry-points\."([\w.]+)"', block("toml", "mychip"))
    (line,) = re.findall(r'^mychip = "(.+)"', block("toml", "mychip"), re.MULTILINE)
    info = tmp_path / "helios_mychip-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: helios-mychip\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nmychip = {line}\n")
    return tmp_path


def python(site: Path, script: str) -> str:
    prelude = f"import sys; sys.path.insert(0, {str(site)!r})\n"
    run = subprocess.run([sys.executable, "-c", prelude + script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


CANDIDATE = """
from helios.backend import candidates
(mine,) = [c for c in candidates() if c.name == "mychip"]
print(mine.available, [d.name for d in mine.devices], mine.why, mine.fix, sep="|")
"""


def test_without_the_vendor_it_is_listed_with_the_reason(site: Path) -> None:
    assert python(site, CANDIDATE).strip() == "False|[]|no mychip software: No module named 'mychip'|pip install mychip"


def test_with_the_vendor_it_is_available(site: Path) -> None:
    (site / "mychip.py").write_text(VENDOR)
    assert python(site, CANDIDATE).strip() == "True|['MyChip One']||"


def test_its_kernels_run_a_graph(site: Path) -> None:
    """On the host instead of the chip, which torch does not know; everything else as the recipe says."""
    (site / "mychip.py").write_text(VENDOR)
    script = """
import torch
from helios.backend import select
from helios.graph import Builder, Rate
from helios.lower import lower
from helios.ops.linear import linear
from helios.ops.norm import rms_norm

backend = select("mychip")
type(backend).device = torch.device("cpu")
with Builder("two") as build:
    x = build.input("x", (1, 5, 8), torch.float32, Rate.STEP)
    w = build.input("w", (6, 8), torch.float32, Rate.WEIGHTS)
    build.output("y", rms_norm(linear(x, w)))
program = lower({"two": build.graph()}, backend)
weight, given = torch.randn(6, 8), torch.randn(1, 5, 8)
program.load(type("Reader", (), {"read": lambda self, name: {"w": weight}[name]})())
got = program.run("two", {"x": given})["y"]
torch.testing.assert_close(got, rms_norm(linear(given, weight)), rtol=0, atol=0)
print(program.coverage.rows())
"""
    assert python(site, script).strip() == "[('linear', 1, 0, 0, ''), ('rms_norm', 1, 0, 0, '')]"
