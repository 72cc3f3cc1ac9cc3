"""Row kernels out of parts of larger buffers, and a sampler step, as the compiler makes them for Hopper."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COMPILE = """
import json, torch
from helios_cuda import offline
from helios_cuda.kernels import KERNELS
from helios_cuda.launch import recording
from helios_cuda.tables import assumed

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

weight, table = meta(5120), meta(11040, 64, 2, dtype=torch.float32)
q, k, _ = meta(1, 11040, 15360).split(5120, dim=2)
state = meta(1, 16, 9, 96, 160, dtype=torch.float32)
with assumed("sm_90"), recording() as launches:
    KERNELS["qk_norm_rope"].run(q[:, 2400:], k, weight, weight, table, heads=40, eps=1e-6)
    KERNELS["layer_norm"].run(meta(1, 11040, 5120)[:, 2400:], weight, weight, eps=1e-6, dtype=None)
    KERNELS["dmd_step"].run(state, state.bfloat16(), state, meta(3, dtype=torch.float32))
forms = [offline.form_of(launch) for launch in launches]
made = [offline.compiled(form, "sm_90") for form in forms]
problems = [list(offline.problems(form, "sm_90", binary, chosen=True)) for form, binary in zip(forms, made)]
print(json.dumps([[form.even for form in forms], [binary.registers for binary in made], problems]))
"""


@pytest.mark.slow
def test_parts_of_buffers_are_read_16_bytes_at_a_time_and_nothing_spills() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    even, registers, problems = json.loads(result.stdout)
    assert even == [["q", "k", "q_out", "k_out"], ["x", "out"], ["a", "c", "out"]]  # what is judged for its width
    assert problems == [[], [], []]
    # Four programs of 128 threads, or four of 256, fit a multiprocessor's 65,536 registers.
    assert registers[0] <= 128
    assert registers[1] <= 64
