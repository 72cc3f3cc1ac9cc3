"""``tools/on_tensorrt.sh`` with the recorder in TensorRT's place: its order, its log and its tables, no figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trt_process import ran as ended
from trt_rig import EMULATED

ROOT = Path(__file__).parents[3]
IN_PLACE = ROOT / "tests" / "shared" / "trt_in_place"


def run(out: Path, *arguments: str, recorded: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OUT": str(out),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(IN_PLACE) if recorded else "",
        "XDG_CACHE_HOME": str(out / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", str(ROOT / "tools" / "on_tensorrt.sh"), *arguments]
    return ended(command, environment, 300)


def records(out: Path, part: str) -> dict[str, dict[str, object]]:
    lines = map(json.loads, (out / f"{part}.jsonl").read_text().splitlines())
    return {line["id"]: line for line in lines if "status" in line}


def test_engines_are_built_both_ways_and_labelled(tmp_path: Path) -> None:
    ran = run(tmp_path, "engines", "--tiny", "--device", "cpu")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = records(tmp_path, "engines")
    assert {name: r["status"] for name, r in found.items()} == {
        "build/tiny/profiles": "measured",
        "build/tiny/inputs": "measured",
    }
    assert all(r["emulated"] == EMULATED for r in found.values())
    engines = [name.rpartition("-")[0] for name in found["build/tiny/profiles"]["engines"]]  # type: ignore[attr-defined]
    assert "denoise.0" in engines
    assert "denoise.1" not in engines
    assert f"EMULATED     {EMULATED}: nothing below was run on a device" in ran.stdout
    assert ran.stdout.rstrip().endswith("EMULATED: nothing of this was run on a device")


@pytest.mark.slow
def test_everything(tmp_path: Path) -> None:
    ran = run(tmp_path, "all", "--tiny", "--device", "cpu")
    # What is emulated is refused by `helios verify`, so the part that certifies is not well; the others are.
    assert ran.returncode == 1
    (certified,) = records(tmp_path, "certify").values()
    assert certified["levels"]["ops"] == "pass"  # type: ignore[index]
    assert not certified["verified"]
    speed = records(tmp_path, "speed")
    assert {r["status"] for r in speed.values()} == {"measured"}
    assert {r["column"] for r in speed.values()} == {"trt profiles", "trt inputs", "cpu"}
    assert "video  on" in (tmp_path / "tables.txt").read_text()


def test_machine_without_tensorrt_is_told(tmp_path: Path) -> None:
    ran = run(tmp_path, "engines", recorded=False)
    assert ran.returncode == 2
    assert "error: TensorRT is not installed\nfix: pip install tensorrt-cu" in ran.stderr


def test_unknown_part_is_told(tmp_path: Path) -> None:
    ran = run(tmp_path, "everything")
    assert ran.returncode == 2
    assert "no part is called everything" in ran.stderr


def test_the_suite_is_taken_up_to_the_pipeline(tmp_path: Path) -> None:
    """Whole, in each precision and way; asked of the script itself, with the suite's command replaced."""
    code = """
import sys, types, certified, trt_certify
given = []
certified.certify = lambda args, clock, folder, options: given.append(options)
for item in trt_certify._items(types.SimpleNamespace(tiny=False), None, __import__("pathlib").Path(".")):
    item.run()
print(*(" ".join(options) for options in given), sep="\\n")
"""
    paths = [ROOT / "tools" / "trt", ROOT / "tools" / "gpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    told = ended([sys.executable, "-c", code], environment, 120)
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert len(lines) == 6
    assert all("--suite full --level pipeline" in line for line in lines)
