"""``kernels``, ``realtime``, ``certify`` and ``diffusers`` end to end on the CPU, through the shell script."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(out: Path, part: str, *options: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """What it printed, and its records; it has to end well."""
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "HELIOS_COMMIT": "abc123"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "on_gpu.sh"), part, "--device", "cpu", "--tiny", *options],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=out,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-3:] == (out / "tables.txt").read_text().splitlines()[-3:]  # the table comes last
    entries = [json.loads(line) for line in (out / f"{part}.jsonl").read_text().splitlines()]
    assert entries[0]["header"]["code"] == "abc123"
    return done.stdout, {entry["id"]: entry for entry in entries if "id" in entry}


def states(records: dict[str, dict[str, Any]], group: str) -> list[str]:
    return [record["status"] for id_, record in records.items() if id_.startswith(f"{group}/")]


@pytest.mark.slow
def test_kernels_are_judged_timed_and_tuned(tmp_path: Path) -> None:
    printed, records = run(tmp_path, "kernels", "--tune")
    assert next(iter(records)).startswith("tune/")
    for group in ("suite", "execution", "speed", "tune"):
        assert set(states(records, group)) == {"measured"}, group
    fused = next(r for id_, r in records.items() if id_.startswith("speed/gated_add_adaln"))
    assert fused["bytes"] > 0
    assert fused["correct"]
    assert "suite bf16 quick: 10 pass, 0 fail" in printed
    assert re.search(r"[1-9]\d* checks, all hold", printed)
    again, kept = run(tmp_path, "kernels")
    assert kept == records  # all finished: nothing is measured twice
    assert "ops of a chunk" in again


@pytest.mark.slow
def test_a_film_is_measured_and_profiled(tmp_path: Path) -> None:
    printed, records = run(tmp_path, "realtime")
    assert records.pop("overlap/tiny")["status"] == "not there"  # the cpu backend has one queue
    assert {record["status"] for record in records.values()} == {"measured"}
    film = records["film/tiny/1-1-1"]
    assert film["fps"] == pytest.approx(33 / film["p50_s"])  # two chunks, so one is steady
    assert sum(film["split_s"].values()) <= film["p50_s"]
    assert film["vae"] == "fp32"  # what this backend declares
    assert "bf16, VAE in fp32: " in printed
    assert records["load/tiny"]["weights"].endswith("drawn on cpu")
    profile = records["profile/tiny/denoise.2"]
    assert sum(row["n"] for row in profile["ops"]) == profile["nodes"]
    assert any(row["op"] == "conv3d" for row in records["profile/tiny/decode"]["ops"])
    assert "no text encoder: a stand-in" in printed


@pytest.mark.slow
def test_a_certification_comes_back_verified_in_one_file(tmp_path: Path) -> None:
    printed, records = run(tmp_path, "certify")
    record = records["certify/quick/bf16"]
    assert record["word"] == "passed"
    assert record["verified"]
    assert "helios verify agrees" in printed
    with zipfile.ZipFile(tmp_path / "certify.zip") as file:
        assert "bf16-quick/report.json" in file.namelist()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.slow
def test_diffusers_does_the_same_work(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    printed, records = run(tmp_path, "diffusers")
    eager = records["film/tiny/eager"]
    assert eager["status"] == "measured"
    assert eager["correct"]
    assert eager["fps"] == pytest.approx(33e3 / eager["ms_median"])
    assert records["film/tiny/compiled"]["status"] == "not there"
    assert "diffusers eager, tiny [1, 1, 1]" in printed
