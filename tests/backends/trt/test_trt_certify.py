"""``helios certify --backend trt`` with the recorder in TensorRT's place: evidence of the plumbing, and never a
certificate."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from trt_process import ran

IN_PLACE = Path(__file__).parents[2] / "shared" / "trt_in_place"


@pytest.mark.slow
@pytest.mark.parametrize(("version", "backend"), [("10", "trt"), ("11", "trt:inputs")])
def test_quick_suite_passes_in_float32_and_certifies_nothing(tmp_path: Path, version: str, backend: str) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(IN_PLACE),
        "RECORDED_TENSORRT": version,
        "XDG_CACHE_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    certify = ["certify", "--backend", backend, "--precision", "fp32", "--level", "pipeline"]
    command = [sys.executable, "-m", "helios", *certify, "--out", str(tmp_path / "bundle")]
    certified = ran(command, environment, 900)
    said = " ".join((certified.stdout + certified.stderr).split())
    assert certified.returncode == 0, said + certified.stderr[-2000:]
    refused = "conv3d[fp32,causal,step_weights], patch_embed[fp32,noisy,step_weights]"  # kernels that are inputs
    assert f"ops: fail: 2 of 507 unsupported: {refused}; diagnostic for an engine" in said
    assert "pipeline: 17 passed" in said
    assert "levels blocks, model and pipeline" in said
    assert "passed, which is not a certification" in said
    verify = [sys.executable, "-m", "helios", "verify", str(tmp_path / "bundle")]
    judged = ran(verify, environment, 300)
    assert "nothing emulated is evidence" in " ".join((judged.stdout + judged.stderr).split())
