"""What the core imports: little at first, no vendor ever."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VENDORS = {
    "cupy",
    "diffusers",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "tensorrt",
    "torch_npu",
    "torch_tensorrt",
    "triton",
}
HEAVY = {"PIL", "av", "diffusers", "huggingface_hub", "onnx", "onnx_ir", "rich", "transformers", "typer"}


def loaded(statement: str) -> set[str]:
    """Top-level names in sys.modules after a fresh interpreter ran the statement."""
    script = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    return set(run.stdout.split())


def imported(path: Path) -> Iterator[str]:
    """Top-level names that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_the_probe_sees_what_is_imported() -> None:
    assert "wave" in loaded("import wave")
    assert "wave" not in loaded("pass")


@pytest.mark.parametrize("statement", ["import helios", "import helios.backend, helios.lower", "import helios_cpu"])
def test_import_is_light(statement: str) -> None:
    assert "helios" in loaded(statement)
    assert not loaded(statement) & HEAVY


def test_listing_backends_loads_no_vendor_package() -> None:
    names = loaded("from helios.backend import names\nassert {'cpu', 'reference'} <= set(names())")
    assert not names & VENDORS


def test_the_core_never_imports_a_vendor_or_a_backend() -> None:
    files = sorted((ROOT / "helios").rglob("*.py"))
    assert files
    wrong = {
        str(path.relative_to(ROOT)): bad
        for path in files
        if (bad := {name for name in imported(path) if name in VENDORS or name.startswith("helios_")} - allowed(path))
    }
    assert wrong == {}


def allowed(path: Path) -> set[str]:
    """ONNX is a format and no vendor; one package writes it."""
    return {"onnx"} if (ROOT / "helios" / "export") in path.parents else set()


def test_one_package_alone_knows_onnx() -> None:
    found = {path for path in (ROOT / "helios").rglob("*.py") if {"onnx", "onnx_ir"} & set(imported(path))}
    assert found
    assert [path for path in found if not allowed(path)] == []


def test_the_import_reader_sees_imports_inside_functions(tmp_path: Path) -> None:
    path = tmp_path / "sly.py"
    path.write_text("import os.path\ndef f():\n    from torch_npu.npu import x\n")
    assert set(imported(path)) == {"os", "torch_npu"}


def test_the_core_asks_for_no_device_by_name() -> None:
    """``torch.cuda`` and its like are the business of backends."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "helios").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in {"cuda", "npu", "mps", "xpu"}
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ]
    assert wrong == []
