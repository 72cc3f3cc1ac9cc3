"""A video's length does not show in the memory that making it takes."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import sys
from pathlib import Path
import helios
pipeline = helios.load(size="tiny", variant="distilled", backend="reference", precision="fp32")
made = sum(1 for _ in pipeline.stream("waves", chunks=int(sys.argv[1]), height=64, width=64, seed=1, steps=(1, 1, 1)))
lines = Path("/proc/self/status").read_text().splitlines()
print(made, *(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def peak_kib(chunks: int) -> int:
    """Largest resident size in KiB of a process of its own that makes that many chunks and keeps none.

    Every freed tensor goes straight back to the system there: what the C library keeps for later differs between runs
    of the same program by 40 MB, and would hide what is looked for.
    """
    returned = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", SCRIPT, str(chunks)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=returned)
    made, peak = map(int, result.stdout.split())
    assert made == chunks
    return peak


def test_44_chunks_peak_where_one_does() -> None:
    """Measured: 380 MB with 1 chunk, 382 MB with 44. Kept frames alone would add 18 MB."""
    assert peak_kib(44) - peak_kib(1) < 6 * 1024
