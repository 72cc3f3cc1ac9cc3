"""What is read of the machine, and what may not be read."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from helios.ops import OPSET, opset_hash, opset_text
from helios_conformance import environment

BACKEND = {"class": "helios_cpu:CpuBackend", "distribution": "helios-hal"}


def test_this_machine() -> None:
    told = environment.read(BACKEND)
    assert told["packages"]["torch"] == torch.__version__
    assert told["packages"]["helios-hal"]
    assert told["cores"]["usable"] <= told["cores"]["logical"]
    assert told["memory"] > 1 << 28
    assert told["opset"] == {"version": OPSET, "hash": opset_hash()}
    json.dumps(told, allow_nan=False)


def test_what_cannot_be_read_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    told = environment.read({"class": None, "distribution": "no-such-distribution"})
    assert told["packages"]["no-such-distribution"] is None
    assert told["git"] == {"helios": None, "backend": None}
    assert set(told["drivers"].values()) == {None}


def test_commands_that_fail_or_hang_tell_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hang(*args: Any, **kwargs: Any) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 15)

    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 550.1, 96.00\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert environment.read(BACKEND)["drivers"]["nvidia"] == "550.1, 96.00"
    script.write_text("#!/bin/sh\necho no devices\nexit 6\n")
    assert environment.read(BACKEND)["drivers"]["nvidia"] is None
    monkeypatch.setattr(subprocess, "run", hang)
    assert environment.read(BACKEND)["drivers"]["nvidia"] is None


def test_variables_that_matter_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "HELIOS_FALLBACK": "error",
        "OMP_NUM_THREADS": "3",
        "CUDA_VISIBLE_DEVICES": "1",
        "HELIOS_API_TOKEN": "hunter2",
        "TORCH_SECRET": "hunter2",
        "EDITOR": "ed",
    }.items():
        monkeypatch.setenv(name, value)
    told = environment.read(BACKEND)["variables"]
    assert {k: told.get(k) for k in ("HELIOS_FALLBACK", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")} == {
        "HELIOS_FALLBACK": "error",
        "OMP_NUM_THREADS": "3",
        "CUDA_VISIBLE_DEVICES": "1",
    }
    assert "hunter2" not in str(told)
    assert "EDITOR" not in told


def test_the_commit_is_that_of_the_packages_own_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for name in ("tracked_backend", "ignored_backend"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')\n")
    git("init", "-q")
    git("add", "tracked_backend")
    git("commit", "-q", "-m", "one")
    monkeypatch.syspath_prepend(str(tmp_path))
    clean = environment.read({"class": "tracked_backend.sub:Own"})["git"]["backend"]
    assert clean == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "tracked_backend" / "__init__.py").write_text("changed = 1\n")
    assert environment.read({"class": "tracked_backend:Own"})["git"]["backend"]["dirty"]
    # Installed inside somebody's repository, but no part of it.
    assert environment.read({"class": "ignored_backend:Own"})["git"]["backend"] is None


def test_the_opset_has_a_line_for_every_op_and_a_hash_of_them() -> None:
    from helios import op

    lines = opset_text().splitlines()
    assert [line.split()[0] for line in lines] == op.names()
    assert "attention reduce [b s h d, b t h d, b t h d -> b s h d] (q, k, v) {scale=None}" in lines
    assert len(opset_hash()) == 64
