"""The rig of tools/ascend for tests: built once, and run in processes of its own."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools" / "ascend"
IMPOSSIBLE = 3
"""Exit code of setup.sh where there is no compiler, or neither index nor wheel."""


@functools.cache
def build() -> str:
    """Build it; why it cannot be built here, or nothing."""
    done = subprocess.run(
        ["bash", str(TOOLS / "setup.sh"), "--python", sys.executable], capture_output=True, text=True, check=False
    )
    if done.returncode == IMPOSSIBLE:
        return done.stderr.strip().splitlines()[-1]
    assert done.returncode == 0, done.stderr
    return ""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Python with the rig on its path, in another process: only one kind of device has a place in each."""
    if why := build():
        pytest.skip(why)
    environment = os.environ | {"PYTHONPATH": str(TOOLS), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )


def told(*command: str) -> str:
    """The last line that it prints, where it succeeds: torch_npu's warnings may stand before it."""
    done = run(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()[-1]
